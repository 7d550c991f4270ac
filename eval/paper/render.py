"""The tables of `eval.paper.comparison` as text, JSON, CSV, LaTeX and Markdown."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from eval.metrics.bootstrap import Measured
from eval.paper.comparison import Comparison
from pipeline.core.text_table import align


def table_rows(table: Comparison) -> list[tuple[str, ...]]:
    """Return the table as words, its header first: ours | interval | paper | difference.

    Other published rows follow only if none is comparable.
    """
    others = () if table.paper_model else table.others
    rows = [("", "ours", "95% interval", "paper", "difference", *others)]
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
    """Return aligned columns of `table_rows`, and the notes."""
    blocks = []
    for table in tables:
        rows = table_rows(table)
        text = align(rows, (False, *[True] * (len(rows[0]) - 1)))
        blocks.append("\n".join([table.heading, text, *(f"note: {note}" for note in table.notes)]))
    return "\n\n".join(blocks)


def records(tables: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the tables as plain values, with differences and with the other published rows by name."""
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
    """Return `records` with the facts."""
    return json.dumps({**facts, "tables": records(tables)}, ensure_ascii=False, indent=1)


def to_csv(tables: Sequence[Comparison]) -> str:
    """Return one row for each figure, with empty cells for missing values."""
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
    """Return a model card in Markdown: what was measured on what, next to the published figures."""
    lines = [f"# {facts['model']}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items() if isinstance(value, str | int)]
    for table in tables:
        lines += [
            "",
            f"## {table.heading}",
            "",
            "| | ours | 95% interval | paper | difference |",
            "|---|--:|--:|--:|--:|",
        ]
        lines += [
            f"| {_cell(line.label)} | {_value(line.ours)} | {_interval(line.ours)} |"
            f" {_number(line.paper)} | {_signed(line.difference)} |"
            for line in table.lines
        ]
        lines += ["", *(f"Note: {note}." for note in table.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _value(value: Measured | None) -> str:
    return _number(None if value is None else value.value)


def _interval(value: Measured | None) -> str:
    return "–" if value is None or math.isnan(value.low) else f"{value.low:.1f} … {value.high:.1f}"


def _signed(value: Measured | None) -> str:
    return "–" if value is None else f"{value.value:+.1f}"


def _escape(text: str) -> str:
    """Escape LaTeX's special characters."""
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
