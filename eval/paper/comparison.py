"""Tables of ours beside the paper's: built from measured scores, written as text, JSON, CSV and LaTeX."""

import csv
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from eval.metrics.bootstrap import Measured
from eval.paper.published import (
    RetrievalRow,
    RetrievalTable,
    Setup,
    classification_protocol,
    published,
    score_of,
)
from pipeline.core.text_table import align

_RECALLS = {
    "t2i/r1": "text-to-image R@1",
    "t2i/r5": "text-to-image R@5",
    "t2i/r10": "text-to-image R@10",
    "i2t/r1": "image-to-text R@1",
    "i2t/r5": "image-to-text R@5",
    "i2t/r10": "image-to-text R@10",
    "mean_recall": "mean recall",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One figure: ours with its interval, the comparable published one, and every other published one."""

    label: str
    ours: Measured | None  # percent
    paper: float | None  # percent; None where no published row may stand beside ours
    others: tuple[float | None, ...] = ()  # as the table's `others`

    @property
    def difference(self) -> Measured | None:
        """Ours - paper, with the interval of ours: the paper prints none for its own."""
        if self.ours is None or self.paper is None:
            return None
        return Measured(*(value - self.paper for value in (self.ours.value, self.ours.low, self.ours.high)))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One table of the paper, or one set of one's own (number None)."""

    number: int | None
    title: str
    setup: Setup
    model: str  # ours
    paper_model: str | None  # the row that ours stands beside
    lines: tuple[Line, ...]
    others: tuple[str, ...] = ()  # published rows that are shown without a difference
    notes: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        table = f"Table {self.number}, " if self.number is not None else ""
        beside = f" beside {self.paper_model}" if self.paper_model else ""
        return f"{table}{self.title}, {self.setup}: {self.model}{beside}"


def compare_retrieval(
    name: str,
    scores: Mapping[str, Measured],
    *,
    protocol: str | None,
    setup: Setup,
    model: str,
    paper_model: str | None,
    notes: Sequence[str] = (),
) -> Comparison:
    """A retrieval set beside its table; `protocol` is None where its counts are not met or it is one's own.

    `scores` are those of `eval.metrics.bootstrap.recall_intervals`.
    """
    table = next((item for item in published().retrieval if item.protocol == protocol), None)
    if table is None:
        lines = tuple(Line(_RECALLS[key], value, None) for key, value in scores.items())
        return Comparison(None, name, setup, model, None, lines, (), tuple(notes))
    rows = [row for row in table.rows if row.setup == setup and row.t2i is not None]
    beside = next((row for row in rows if row.model == paper_model), None)
    others = [row for row in rows if row is not beside]
    lines = tuple(
        Line(
            _RECALLS[key],
            value,
            None if beside is None else _figure(beside, key),
            tuple(_figure(row, key) for row in others),
        )
        for key, value in scores.items()
    )
    notes = [*notes, *_retrieval_notes(table, setup)]
    names = tuple(row.model for row in others)
    return Comparison(
        table.table,
        table.title,
        setup,
        model,
        None if beside is None else beside.model,
        lines,
        names,
        tuple(notes),
    )


def compare_classification(
    scores: Mapping[str, Measured],
    *,
    model: str,
    paper_model: str | None,
    notes: Mapping[str, Sequence[str]] = MappingProxyType({}),
    differing: Collection[str] = (),
) -> list[Comparison]:
    """Measured sets of ICinW beside Tables 12 and 5; the average where all sets of Table 12 were measured.

    `notes` are by set. `differing` sets are not those of the protocol: no published figure stands beside
    them. Table 5 has no row of one checkpoint, so it is shown without differences.
    """
    found = []
    for table in sorted(published().classification, key=lambda item: -item.table):
        names = [name for name in table.datasets if name in scores]
        if not names:
            continue
        beside = next((row for row in table.rows if row.model == paper_model and not row.best_of_sizes), None)
        others = [row for row in table.rows if row is not beside]
        lines = [
            Line(
                _title(name),
                scores[name],
                None if beside is None or name in differing else score_of(table, beside, name),
                tuple(None if name in differing else score_of(table, row, name) for row in others),
            )
            for name in names
        ]
        complete = len(names) == len(table.datasets) and not set(names) & set(differing)
        if beside is not None and beside.average is not None and complete:
            lines.append(Line("Average", _mean([scores[name] for name in names]), beside.average))
        remarks = [note for name in names for note in notes.get(name, ())] if table.table == 12 else []
        if any(row.best_of_sizes for row in table.rows):
            remarks.append(
                "the CN-CLIP column takes the best of several sizes: no checkpoint is compared with it"
            )
        missing = len(table.datasets) - len(names)
        if missing:
            remarks.append(f"{missing} of {len(table.datasets)} sets were not measured: no average")
        columns = tuple(f"{row.model} (best of sizes)" if row.best_of_sizes else row.model for row in others)
        found.append(
            Comparison(
                table.table,
                table.title,
                "zero-shot",
                model,
                None if beside is None else beside.model,
                tuple(lines),
                columns,
                tuple(remarks),
            )
        )
    own = {name: value for name, value in scores.items() if classification_protocol(name) is None}
    if own:
        lines = [Line(name, value, None) for name, value in own.items()]
        remarks = [note for name in own for note in notes.get(name, ())]
        found.append(
            Comparison(
                None, "Classification, own sets", "zero-shot", model, None, tuple(lines), (), tuple(remarks)
            )
        )
    return found


def table_rows(table: Comparison) -> list[tuple[str, ...]]:
    """The table as words, its header first: ours | interval | paper | difference.

    Other published rows follow only where none is comparable.
    """
    others = () if table.paper_model else table.others
    rows = [("", "ours", "95 % interval", "paper", "difference", *others)]
    for line in table.lines:
        shown = line.others if others else ()
        shown = shown or tuple(None for _ in others)
        rows.append(
            (
                line.label,
                _value(line.ours),
                _interval(line.ours),
                _number(line.paper),
                _signed(line.difference),
                *(_number(value) for value in shown),
            )
        )
    return rows


def to_text(tables: Sequence[Comparison]) -> str:
    """Aligned columns of `table_rows`, and the notes."""
    blocks = []
    for table in tables:
        rows = table_rows(table)
        text = align(rows, (False, *[True] * (len(rows[0]) - 1)))
        blocks.append("\n".join([table.heading, text, *(f"note: {note}" for note in table.notes)]))
    return "\n\n".join(blocks)


def records(tables: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The tables as plain values, with differences and with the other published rows by name."""
    body = []
    for table in tables:
        record = asdict(table)
        for line, found in zip(table.lines, record["lines"], strict=True):
            difference = line.difference
            found["difference"] = None if difference is None else asdict(difference)
            found["others"] = dict(zip(table.others, line.others, strict=False))
        del record["others"]
        body.append(record)
    return body


def to_json(tables: Sequence[Comparison], facts: Mapping[str, Any]) -> str:
    """`records` beside the facts."""
    return json.dumps({**facts, "tables": records(tables)}, ensure_ascii=False, indent=1)


def to_csv(tables: Sequence[Comparison]) -> str:
    """One row a figure; empty cells where there is none."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        [
            "table",
            "title",
            "setup",
            "model",
            "paper_model",
            "figure",
            "ours",
            "low",
            "high",
            "paper",
            "difference",
        ]
    )
    for table in tables:
        head = [table.number, table.title, table.setup, table.model, table.paper_model]
        for line in table.lines:
            ours = [None] * 3 if line.ours is None else [line.ours.value, line.ours.low, line.ours.high]
            difference = None if line.difference is None else line.difference.value
            values = [*ours, line.paper, difference]
            cells = [None if value is None or math.isnan(value) else f"{value:.4f}" for value in values]
            writer.writerow([*head, line.label, *cells])
    return file.getvalue()


def to_latex(tables: Sequence[Comparison]) -> str:
    r"""A booktabs table each; needs `\usepackage{booktabs}`, and for Chinese names a font."""
    blocks = []
    for table in tables:
        rows = [
            " & ".join(
                [
                    _escape(line.label),
                    _value(line.ours),
                    _escape(_interval(line.ours)),
                    _number(line.paper),
                    f"${_signed(line.difference)}$" if line.difference else "--",
                ]
            )
            + r" \\"
            for line in table.lines
        ]
        blocks.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    r"\begin{tabular}{lrrrr}",
                    r"\toprule",
                    r" & ours & 95\,\% interval & paper & difference \\",
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    rf"\caption{{{_escape('. '.join([table.heading, *table.notes]))}.}}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(blocks) + "\n"


def to_card(tables: Sequence[Comparison], facts: Mapping[str, Any]) -> str:
    """Model card in Markdown: what was measured on what, beside the published figures."""
    lines = [f"# {facts['model']}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items() if isinstance(value, str | int)]
    for table in tables:
        lines += [
            "",
            f"## {table.heading}",
            "",
            "| | ours | 95 % interval | paper | difference |",
            "|---|--:|--:|--:|--:|",
        ]
        lines += [
            f"| {_cell(line.label)} | {_value(line.ours)} | {_interval(line.ours)} |"
            f" {_number(line.paper)} | {_signed(line.difference)} |"
            for line in table.lines
        ]
        lines += ["", *(f"Note: {note}." for note in table.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _figure(row: RetrievalRow, key: str) -> float | None:
    """A published figure; mean recall is computed from the row's own recalls where the table prints none."""
    if key == "mean_recall":
        if row.mean_recall is not None:
            return row.mean_recall
        values = [*(row.t2i or ()), *(row.i2t or ())]
        return round(math.fsum(values) / len(values), 1) if values else None
    direction, cutoff = key.split("/")
    recalls = row.t2i if direction == "t2i" else row.i2t
    return None if recalls is None else recalls[("r1", "r5", "r10").index(cutoff)]


def _retrieval_notes(table: RetrievalTable, setup: Setup) -> list[str]:
    notes = []
    if table.table in (3, 4):
        notes.append("the paper prints no mean recall here: it is the mean of its six recalls")
    if table.table == 4 and setup == "zero-shot":
        notes.append(
            "the paper prints its zero-shot figures in grey: translated COCO is in its pretraining corpus"
        )
    return notes


def _title(name: str) -> str:
    protocol = classification_protocol(name)
    return name if protocol is None else protocol.title


def _mean(scores: Sequence[Measured]) -> Measured:
    """Mean of independent scores; its interval from theirs by adding squared half-widths."""
    count = len(scores)
    value = math.fsum(score.value for score in scores) / count
    below = math.sqrt(math.fsum((score.value - score.low) ** 2 for score in scores)) / count
    above = math.sqrt(math.fsum((score.high - score.value) ** 2 for score in scores)) / count
    return Measured(value, value - below, value + above)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _value(value: Measured | None) -> str:
    return _number(None if value is None else value.value)


def _interval(value: Measured | None) -> str:
    return "–" if value is None or math.isnan(value.low) else f"{value.low:.1f} … {value.high:.1f}"


def _signed(value: Measured | None) -> str:
    return "–" if value is None else f"{value.value:+.1f}"


def _escape(text: str) -> str:
    """LaTeX's special characters as themselves."""
    replacements = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "…": r"\dots{}",
    }
    replacements |= {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(replacements.get(character, character) for character in text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
