"""What the report shows, as plain values, and the figures that page and terminal share."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.accounting.funnel import NoOpThreshold
from eval.metrics.recall import RecallAtK, RetrievalScores
from eval.paper.comparison import Comparison


@dataclass(frozen=True, slots=True)
class StageFacts:
    """One stage of the run. It has no times, so that the same run gives the same report."""

    name: str
    title: str
    num_in: int
    num_kept: int
    dropped: Mapping[str, int]  # reason → rows


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows into a step, rows it kept, and rows it dropped by reason."""

    num_in: int
    num_kept: int
    dropped: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class FunnelStep:
    """One filtering step from caption table to shards; `sources` splits its counts by source, if known."""

    stage: str
    title: str
    total: RowCounts
    sources: Mapping[str, RowCounts]  # may be empty


@dataclass(frozen=True, slots=True)
class Histogram:
    """The distribution of a quantity over the rows that a stage kept and dropped.

    Bin 0 is below the first edge, bin i between the edges i - 1 and i, the last one above the last edge.
    """

    name: str  # one of data_prep.accounting.histograms.EDGES
    stage: str
    edges: Sequence[float]
    kept: Sequence[int]  # rows per bin
    dropped: Sequence[int]


@dataclass(frozen=True, slots=True)
class ConceptRow:
    """A concept, the rows that had it, and the kept ones."""

    entry: str
    rows: int
    kept: int | None  # None: the run does not balance


@dataclass(frozen=True, slots=True)
class Concepts:
    """The most frequent concepts of the corpus, how many entries occur, and how many captions have one."""

    entries: int
    found: int  # entries that some caption has
    captions: int
    matched: int  # captions that have an entry
    top: tuple[ConceptRow, ...]


@dataclass(frozen=True, slots=True)
class TrainingPoint:
    """One logged step. `samples_seen` counts from the start of its stage."""

    stage: str
    samples_seen: int
    loss: float
    temperature: float  # factor on cosine similarities, exp(logit_scale)
    learning_rate: float


@dataclass(frozen=True, slots=True)
class RecallPoint:
    """One validation. `samples_seen` counts from the start of its stage."""

    stage: str
    samples_seen: int
    evaluation: str
    scores: RetrievalScores


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small image of the gallery as encoded bytes."""

    image_id: int
    is_right: bool
    media_type: str  # such as image/webp
    data: bytes

    @property
    def data_uri(self) -> str:
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True, slots=True)
class ExampleRow:
    """A query text, the rank of its first correct image in the top 10, and its top five results."""

    query: str
    rank: int | None  # None: no correct image in the top ten
    results: tuple[Thumbnail, ...]  # best first
    answer: Thumbnail | None  # a correct image, set if the top five have none


@dataclass(frozen=True, slots=True)
class AnswerText:
    """A text that an image retrieved, or should have retrieved."""

    text: str
    is_right: bool


@dataclass(frozen=True, slots=True)
class ImageQuery:
    """A query image, the rank of its first correct text in the top 10, and its top five results."""

    image: Thumbnail
    rank: int | None  # None: no correct text in the top ten
    results: tuple[AnswerText, ...]  # best first
    answer: AnswerText | None  # a correct text, set if the top five have none


@dataclass(frozen=True, slots=True)
class ExampleGallery:
    """Examples of the final model's results on one evaluation set."""

    evaluation: str
    hits: tuple[ExampleRow, ...]  # a correct image comes first
    misses: tuple[ExampleRow, ...]  # no correct image in the top five
    image_hits: tuple[ImageQuery, ...] = ()  # the same for image-to-text, if it is scored
    image_misses: tuple[ImageQuery, ...] = ()


@dataclass(frozen=True, slots=True)
class CopyImage:
    """One image of a pair that a rule called copies: a key or an evaluation set's id, and a small WebP."""

    name: str
    data: bytes | None  # None: unavailable

    @property
    def data_uri(self) -> str:
        return f"data:image/webp;base64,{base64.b64encode(self.data or b'').decode('ascii')}"


@dataclass(frozen=True, slots=True)
class CopyPair:
    """The kept image or the one of an evaluation set, the dropped one, and the bits between their hashes."""

    kept: CopyImage
    dropped: CopyImage
    bits: int | None


@dataclass(frozen=True, slots=True)
class CopiesOfRule:
    """Example pairs of the rows that a stage dropped for one reason."""

    stage: str
    reason: str
    total: int  # rows dropped
    pairs: tuple[CopyPair, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A row of the corpus with a small image, if one is available."""

    caption: str
    source: str
    url: str
    detail: str  # more about the drop, such as the word of a blacklist; may be empty
    data: bytes | None  # WebP

    @property
    def data_uri(self) -> str:
        return f"data:image/webp;base64,{base64.b64encode(self.data or b'').decode('ascii')}"


@dataclass(frozen=True, slots=True)
class DroppedByRule:
    """Examples of the rows that a stage dropped for one reason."""

    stage: str
    reason: str
    total: int  # rows dropped
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class MapPoint:
    """An image of the corpus at its place on the map."""

    left: float  # share of the map's width, 0 to 1
    top: float
    example: Example


@dataclass(frozen=True, slots=True)
class CorpusMap:
    """A bounded sample of the corpus on the first two principal components of its embeddings."""

    stage: str  # whose model embedded it
    variance_share: float  # of the two components, 0 to 1
    points: tuple[MapPoint, ...]


@dataclass(frozen=True, slots=True)
class StageState:
    """A stage's progress, for the page of a run in progress."""

    state: str  # of pipeline.core.run.State
    tasks_done: int
    num_tasks: int | None  # None while it waits for other stages
    seconds: float  # taken by its finished tasks


@dataclass(frozen=True, slots=True)
class Live:
    """What only `cnclip report` adds: the stage's own page must not depend on place and time."""

    name: str  # of the run
    date: str  # when it ran, such as 2026-11-27; empty if unknown
    written: str  # when the page was written, UTC
    states: Mapping[str, StageState]
    refresh_seconds: int | None  # the page reloads itself

    @property
    def num_done(self) -> int:
        return sum(state.state == "done" for state in self.states.values())


@dataclass(frozen=True, slots=True)
class PlantedClass:
    """One class of defects that the demo planted, and how many of its rows met their expected fate."""

    name: str
    stage: str
    fate: str  # "kept" or a drop reason
    planted: int
    counted: int

    @property
    def is_equal(self) -> bool:
        return self.planted == self.counted


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the report shows. It has only plain values, so that the page is a function of it.

    The keys of `evaluations` are `name` for the final model and `name/stage` for each earlier stage, in the
    order of the page. The keys of `baselines` are names without a stage, each with "chance" and "pixel".
    """

    model: str | None  # None: a run without a model
    training_stages: tuple[str, ...]  # in order
    facts: Mapping[str, str]  # of the run: key of the words `facts` → value
    final_stage: str  # name of the stage that made the final model; empty without one
    evaluations: Mapping[str, RetrievalScores]
    baselines: Mapping[str, Mapping[str, RetrievalScores]]
    stages: tuple[StageFacts, ...]
    funnel: tuple[FunnelStep, ...]
    training: tuple[TrainingPoint, ...]  # stages in the order they ran
    recall: tuple[RecallPoint, ...]
    galleries: tuple[ExampleGallery, ...]
    planted: tuple[PlantedClass, ...]  # empty if nothing was planted
    comparisons: tuple[Comparison, ...] = ()  # the final model next to the paper's figures
    histograms: tuple[Histogram, ...] = ()
    notes: tuple[NoOpThreshold, ...] = ()  # about the funnel
    concepts: Concepts | None = None
    copies: tuple[CopiesOfRule, ...] = ()
    samples: tuple[Example, ...] = ()
    dropped: tuple[DroppedByRule, ...] = ()
    corpus_map: CorpusMap | None = None
    missing: tuple[str, ...] = ()  # why parts of the page are missing: a file was moved or deleted
    live: Live | None = None

    def rows_of(self, stage: str) -> StageFacts | None:
        """Return the counts of a stage, if the run has it."""
        return next((item for item in self.stages if item.name == stage), None)


def headline_rows(data: ReportData) -> list[tuple[str, list[tuple[str, RetrievalScores]]]]:
    """Return evaluation → rows to compare: chance, pixel baseline, earlier stages, final model last."""
    names = [name for name in data.evaluations if not _is_earlier_stage(name, data)]
    table: list[tuple[str, list[tuple[str, RetrievalScores]]]] = []
    for name in names:
        baselines = data.baselines.get(name, {})
        rows = [
            (label, baselines[kind])
            for kind, label in (("chance", "chance"), ("pixel", "pixel neighbour"))
            if kind in baselines
        ]
        rows += [
            (key.removeprefix(f"{name}/"), scores)
            for key, scores in data.evaluations.items()
            if key.startswith(f"{name}/") and key != name
        ]
        rows.append((data.final_stage, data.evaluations[name]))
        table.append((name, rows))
    return table


def _is_earlier_stage(name: str, data: ReportData) -> bool:
    plain, slash, _ = name.rpartition("/")
    return bool(slash) and plain in data.evaluations


def recall_values(recall: RecallAtK | None) -> list[float]:
    """Return R@1, R@5, R@10; NaN if the direction is not scored."""
    return [math.nan] * 3 if recall is None else [recall["r1"], recall["r5"], recall["r10"]]


def percent(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.2f}" if 0 < value < 1 else f"{value:.1f}"
