"""The paper's tables and what each was measured on: `published.toml` and `protocols.toml` as records."""

import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal, TypeVar

from pipeline.core.config import build, read_toml
from pipeline.core.records import InputError

T = TypeVar("T")

Setup = Literal["zero-shot", "finetuned"]
Metric = Literal["accuracy", "mean-per-class", "roc-auc", "11-point-map"]
Recalls = tuple[float, float, float]  # R@1, R@5, R@10 in percent

# Our names of the model sizes → the paper's rows
PAPER_MODELS = {
    "RN50": "CN-CLIP RN50",
    "ViT-B-16": "CN-CLIP ViT-B/16",
    "ViT-L-14": "CN-CLIP ViT-L/14",
    "ViT-L-14-336": "CN-CLIP ViT-L/14@336px",
    "ViT-H-14": "CN-CLIP ViT-H/14",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalRow:
    """One model in one setup; figures are None if the paper prints dashes or no such column."""

    model: str
    setup: Setup
    t2i: Recalls | None = None  # text-to-image, percent
    i2t: Recalls | None = None  # image-to-text, percent
    mean_recall: float | None = None  # percent, if the table prints it


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalTable:
    """Table 2, 3, 4 or 10."""

    table: int
    title: str
    protocol: str  # id of a RetrievalProtocol
    rows: tuple[RetrievalRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationRow:
    """One model; scores in the order of the table's data sets, nan if the paper prints a dash."""

    model: str
    benchmark: Literal["original", "translated"]  # English labels and prompts, or Chinese ones
    scores: tuple[float, ...]  # percent, each in the data set's own metric
    best_of_sizes: bool = False  # each score from whichever size does best: no checkpoint is comparable
    average: float | None = None  # percent, if the table prints it


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationTable:
    """Table 5 or 12."""

    table: int
    title: str
    datasets: tuple[str, ...]  # ids of ClassificationProtocols
    rows: tuple[ClassificationRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Every row of Tables 2, 3, 4, 5, 10 and 12."""

    retrieval: tuple[RetrievalTable, ...]
    classification: tuple[ClassificationTable, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalProtocol:
    """What a retrieval score is measured on; counts are None if the paper prints none."""

    id: str
    title: str
    images: int | None = None
    texts: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationProtocol:
    """What a classification score is measured on (Table 11)."""

    id: str  # ELEVATER's
    title: str
    classes: int
    images: int  # test size
    metric: Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocols:
    """Four retrieval sets and the 20 of ICinW."""

    retrieval: tuple[RetrievalProtocol, ...]
    classification: tuple[ClassificationProtocol, ...]


@cache
def published() -> Published:
    return _read("published.toml", Published)


@cache
def protocols() -> Protocols:
    return _read("protocols.toml", Protocols)


def _read(name: str, cls: type[T]) -> T:
    path = str(resources.files("eval.paper") / name)
    return build(cls, read_toml(path), path, allow_nan=True)


def retrieval_protocol(name: str) -> RetrievalProtocol | None:
    """Return the pinned protocol of this id; None for a set of one's own."""
    return next((item for item in protocols().retrieval if item.id == name), None)


def classification_protocol(name: str) -> ClassificationProtocol | None:
    """Return the pinned protocol of this id; None for a set of one's own."""
    return next((item for item in protocols().classification if item.id == name), None)


def mismatch(name: str, what: str, expected: int | None, found: int) -> str | None:
    """Return one line if a pinned count is not met, else None."""
    if expected is None or expected == found:
        return None
    return f"{name}: {found} {what}, but the protocol has {expected}: not comparable with published figures"


def score_of(table: ClassificationTable, row: ClassificationRow, dataset: str) -> float | None:
    """Return a row's score on a data set; None if the table has no such column or prints a dash.

    Raises:
        InputError: if a row has not one score for each data set.
    """
    if len(row.scores) != len(table.datasets):
        raise InputError(
            f"Table {table.table}, {row.model}: {len(row.scores)} scores for {len(table.datasets)} sets"
        )
    if dataset not in table.datasets:
        return None
    score = row.scores[table.datasets.index(dataset)]
    return None if math.isnan(score) else score
