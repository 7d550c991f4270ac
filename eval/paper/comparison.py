"""Tables of our figures next to the paper's, built from measured scores."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from eval.metrics.bootstrap import Measured
from eval.paper.published import (
    RetrievalRow,
    RetrievalTable,
    Setup,
    classification_protocol,
    published,
    score_of,
)

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
    paper: float | None  # percent; None if no published row may be compared with ours
    others: tuple[float | None, ...] = ()  # as the table's `others`

    @property
    def difference(self) -> Measured | None:
        """Return ours - paper, with the interval of ours: the paper prints no intervals."""
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
    paper_model: str | None  # the row that ours is compared with
    lines: tuple[Line, ...]
    others: tuple[str, ...] = ()  # published rows that are shown without a difference
    notes: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        table = f"Table {self.number}, " if self.number is not None else ""
        peer = f" next to {self.paper_model}" if self.paper_model else ""
        return f"{table}{self.title}, {self.setup}: {self.model}{peer}"


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
    """Compare a retrieval set with its table.

    `protocol` is None if the set does not have its counts, or is one's own.

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
    by_elevater: Mapping[str, Measured] = MappingProxyType({}),
) -> list[Comparison]:
    """Compare measured sets of ICinW with Tables 12 and 5.

    The average is there if all sets of Table 12 were measured.

    `notes` are by set. `differing` sets are not those of the protocol: no published figure appears next to
    them. Table 5 has no row of one checkpoint, so it is shown without differences. `by_elevater` has mAP by
    ELEVATER's rule, which is compared; that of `scores`, by VOC's, stands below it.
    """
    found = []
    comparable = {**scores, **by_elevater}
    for table in sorted(published().classification, key=lambda item: -item.table):
        names = [name for name in table.datasets if name in scores]
        if not names:
            continue
        beside = next((row for row in table.rows if row.model == paper_model and not row.best_of_sizes), None)
        others = [row for row in table.rows if row is not beside]
        lines = []
        for name in names:
            by_rule = ", by ELEVATER's rule" if name in by_elevater else ""
            lines.append(
                Line(
                    _title(name) + by_rule,
                    comparable[name],
                    None if beside is None or name in differing else score_of(table, beside, name),
                    tuple(None if name in differing else score_of(table, row, name) for row in others),
                )
            )
            if name in by_elevater:
                lines.append(_by_voc(_title(name), scores[name]))
        complete = len(names) == len(table.datasets) and not set(names) & set(differing)
        if beside is not None and beside.average is not None and complete:
            lines.append(Line("Average", _mean([comparable[name] for name in names]), beside.average))
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
        lines = []
        for name, value in own.items():
            if name in by_elevater:
                lines.append(Line(f"{name}, by ELEVATER's rule", by_elevater[name], None))
            lines.append(_by_voc(name, value) if name in by_elevater else Line(name, value, None))
        remarks = [note for name in own for note in notes.get(name, ())]
        found.append(
            Comparison(
                None, "Classification, own sets", "zero-shot", model, None, tuple(lines), (), tuple(remarks)
            )
        )
    return found


def _by_voc(title: str, measured: Measured) -> Line:
    return Line(f"{title}, by VOC's own rule", measured, None)


def _figure(row: RetrievalRow, key: str) -> float | None:
    """Return a published figure; mean recall comes from the row's recalls if the table prints none."""
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
    """Return the mean of independent scores; its interval from theirs by adding squared half-widths."""
    count = len(scores)
    value = math.fsum(score.value for score in scores) / count
    below = math.sqrt(math.fsum((score.value - score.low) ** 2 for score in scores)) / count
    above = math.sqrt(math.fsum((score.high - score.value) ** 2 for score in scores)) / count
    return Measured(value, value - below, value + above)
