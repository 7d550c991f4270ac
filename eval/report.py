"""The report: one HTML page for people, `report.json` for programs, and the headline table for the terminal.

The page is self-contained: inline SVG, thumbnails as data URIs, no script; its content security policy
forbids scripts and every request. Captions and names are escaped by Jinja2.
"""

import base64
import io
import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from eval.charts import Series, histogram_chart, line_chart
from eval.comparison import Comparison, records, table_rows
from eval.datasets.cnclip_tsv import EvaluationSet
from eval.metrics import RecallAtK, RetrievalScores
from eval.retrieval import read_predictions
from pipeline import store
from pipeline.records import InputError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class StageFacts:
    """One stage of the run, in order. Without times: the same run gives the same report."""

    name: str
    title: str
    num_in: int
    num_kept: int
    dropped: Mapping[str, int]  # reason → rows


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows into a step, rows it kept, and rows it dropped by reason."""

    num_in: int
    num_kept: int
    dropped: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class FunnelStep:
    """One filtering step from caption table to shards; `sources` splits its counts by source, if known."""

    stage: str
    title: str
    total: Counts
    sources: Mapping[str, Counts]  # may be empty


@dataclass(frozen=True, slots=True)
class Histogram:
    """How a quantity is spread over the rows that a stage kept and dropped.

    Bin 0 is below the first edge, bin i between the edges i - 1 and i, the last from the last edge on.
    """

    name: str  # key of HISTOGRAM_TITLES
    stage: str
    edges: Sequence[float]
    kept: Sequence[int]  # rows a bin
    dropped: Sequence[int]


HISTOGRAM_TITLES = {
    "score": "Scores of the sources (cosine)",
    "pair_score": "Scores of this run's encoders (cosine)",
    "characters": "Characters of the captions",
    "short_side_px": "Shorter side of the pictures as they came, pixels",
}


@dataclass(frozen=True, slots=True)
class TrainingPoint:
    """One logged step. `samples_seen` counts from the start of its stage."""

    stage: str
    samples_seen: int
    loss: float
    temperature: float  # the factor on cosine similarities, exp(logit_scale)
    learning_rate: float


@dataclass(frozen=True, slots=True)
class RecallPoint:
    """One validation. `samples_seen` counts from the start of its stage."""

    stage: str
    samples_seen: int
    evaluation: str
    scores: RetrievalScores


@dataclass(frozen=True, slots=True)
class Picture:
    """A small picture of the gallery as encoded bytes."""

    image_id: int
    is_right: bool
    media_type: str  # such as image/webp
    data: bytes

    @property
    def data_uri(self) -> str:
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True, slots=True)
class GalleryRow:
    """A query text, the rank of its first right picture within the top 10, and its top five."""

    query: str
    rank: int | None  # None: no right picture among the first ten
    results: tuple[Picture, ...]  # best first
    answer: Picture | None  # a right picture, given where the top five hold none


@dataclass(frozen=True, slots=True)
class Gallery:
    """Examples of one evaluation's text-to-image answers by the final model."""

    evaluation: str
    hits: tuple[GalleryRow, ...]  # a right picture comes first
    misses: tuple[GalleryRow, ...]  # no right picture among the first five


@dataclass(frozen=True, slots=True)
class PlantedClass:
    """One class of dirt that the demo planted, and how many rows met the fate that was written for it."""

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
    """Everything the report shows; plain values only, so that the page is a function of this.

    `evaluations` has the plain name for the final model and `name/stage` for each earlier stage, in the order
    in which they are to be shown. `baselines` has the names without stage, each with "chance" and "pixel".
    """

    title: str
    summary: str  # one or two plain sentences under the title
    facts: Mapping[str, str]  # of the run, label → value: model, samples, seed, versions, machine …
    final_stage: str  # name of the stage that made the final model
    evaluations: Mapping[str, RetrievalScores]
    baselines: Mapping[str, Mapping[str, RetrievalScores]]
    stages: tuple[StageFacts, ...]
    funnel: tuple[FunnelStep, ...]
    training: tuple[TrainingPoint, ...]  # stages in the order they ran
    recall: tuple[RecallPoint, ...]
    galleries: tuple[Gallery, ...]
    planted: tuple[PlantedClass, ...]  # empty where nothing was planted
    comparisons: tuple[Comparison, ...] = ()  # sets of the paper, the final model beside its figures
    histograms: tuple[Histogram, ...] = ()
    notes: tuple[str, ...] = ()  # sentences about the funnel


def write_report(data: ReportData, html_path: str, json_path: str) -> None:
    """Render the page and write both files, each whole or not at all."""
    html = render_html(data)
    store.write_text(json_path, json.dumps(report_json(data), ensure_ascii=False, indent=1) + "\n")
    store.write_text(html_path, html)


def report_json(data: ReportData) -> dict[str, Any]:
    """The numbers, in percent; the form that other programs rely on."""
    return {
        "evaluations": {name: dict(scores) for name, scores in data.evaluations.items()},
        "baselines": {
            name: {kind: dict(scores) for kind, scores in baselines.items()}
            for name, baselines in data.baselines.items()
        },
        "comparisons": records(data.comparisons),
        "funnel": [
            {
                "stage": step.stage,
                "title": step.title,
                **_counts_json(step.total),
                "sources": {source: _counts_json(counts) for source, counts in step.sources.items()},
            }
            for step in data.funnel
        ],
        "histograms": [
            {
                "name": item.name,
                "stage": item.stage,
                "edges": list(item.edges),
                "kept": list(item.kept),
                "dropped": list(item.dropped),
            }
            for item in data.histograms
        ],
        "notes": list(data.notes),
        "stages": [
            {
                "name": stage.name,
                "title": stage.title,
                **_counts_json(Counts(stage.num_in, stage.num_kept, stage.dropped)),
            }
            for stage in data.stages
        ],
    }


def headline(data: ReportData) -> str:
    """The headline table as plain text with aligned columns; Chinese characters count as two columns."""
    header = [
        "evaluation",
        "model",
        *(f"t2i R@{k}" for k in (1, 5, 10)),
        *(f"i2t R@{k}" for k in (1, 5, 10)),
        "mean",
    ]
    rows = [header]
    for evaluation, scored in _headline_rows(data):
        for position, (label, scores) in enumerate(scored):
            values = [*_values(scores["t2i"]), *_values(scores["i2t"]), scores["mean_recall"]]
            rows.append([evaluation if position == 0 else "", label, *map(_percent, values)])
    widths = [max(_width(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            padding = " " * (width - _width(cell))
            cells.append(cell + padding if column < 2 else padding + cell)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def read_training_metrics(path: str, stage: str) -> tuple[list[TrainingPoint], list[RecallPoint]]:
    """The points of one stage's `metrics.jsonl`: logged steps and validations.

    Raises InputError naming file and line for a line that is neither.
    """
    training: list[TrainingPoint] = []
    recall: list[RecallPoint] = []
    for line_number, line in enumerate(store.read_text(path).splitlines(), start=1):
        try:
            record = json.loads(line)
            if "evaluation" in record:
                point = (stage, record["samples_seen"], record["evaluation"], record["recall"])
                recall.append(RecallPoint(*point))
            else:
                names = ("samples_seen", "loss", "temperature", "learning_rate")
                training.append(TrainingPoint(stage, *(record[name] for name in names)))
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}:{line_number}: neither a logged step nor a validation: {line[:80]}"
            ) from None
    return training, recall


def make_gallery(evaluation: EvaluationSet, predictions_path: str, *, num_rows: int = 6) -> Gallery:
    """At most `num_rows` hits and as many misses of a text-to-image prediction file, spread over the texts.

    A hit has a right picture in the first place, a miss none in the first five.
    """
    right = {
        int(text_id): [int(evaluation.image_ids[row]) for row in rows]
        for text_id, rows in zip(evaluation.text_ids, evaluation.images_of_text, strict=True)
    }
    text = {int(text_id): text for text_id, text in zip(evaluation.text_ids, evaluation.texts, strict=True)}
    hits: list[tuple[int, int | None, list[int]]] = []
    misses: list[tuple[int, int | None, list[int]]] = []
    for text_id, image_ids in read_predictions(predictions_path, ("text_id", "image_ids")):
        rank = next((place for place, i in enumerate(image_ids, start=1) if i in right[text_id]), None)
        if rank == 1:
            hits.append((text_id, rank, image_ids[:5]))
        elif rank is None or rank > 5:
            misses.append((text_id, rank, image_ids[:5]))
    row_of_image = {int(image_id): row for row, image_id in enumerate(evaluation.image_ids)}

    def picture(image_id: int, is_right: bool) -> Picture:
        data = next(evaluation.image_bytes([row_of_image[image_id]]))
        return Picture(image_id, is_right, "image/webp", _thumbnail(data))

    def rows(found: list[tuple[int, int | None, list[int]]]) -> tuple[GalleryRow, ...]:
        return tuple(
            GalleryRow(
                query=text[text_id],
                rank=rank,
                results=tuple(picture(image_id, image_id in right[text_id]) for image_id in image_ids),
                answer=None if rank is not None and rank <= 5 else picture(right[text_id][0], True),
            )
            for text_id, rank, image_ids in _spread(found, num_rows)
        )

    return Gallery(evaluation.name, rows(hits), rows(misses))


def render_html(data: ReportData) -> str:
    """The page; Jinja2 escapes every value but the charts, which are made here."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": "{:,}".format, "percent": _percent}
    template = environment.from_string(
        (Path(__file__).parent / "report.html").read_text(encoding="utf-8"),
    )
    return template.render(
        data=data,
        cards=_cards(data),
        headline_rows=_headline_rows(data),
        comparison_rows=[(table, table_rows(table)) for table in data.comparisons],
        values=_values,
        training_charts=[(title, Markup(svg)) for title, svg in _training_charts(data)],
        recall_charts=[
            (evaluation, [(title, Markup(svg)) for title, svg in drawn])
            for evaluation, drawn in _recall_charts(data)
        ],
        histogram_charts=[
            (f"{HISTOGRAM_TITLES[item.name]}, {item.stage}", Markup(svg))
            for number, item in enumerate(data.histograms)
            if any(item.kept) or any(item.dropped)
            for svg in [
                histogram_chart(
                    f"histogram-{number}", HISTOGRAM_TITLES[item.name], item.edges, item.kept, item.dropped
                )
            ]
        ],
        funnel_start=max([step.total.num_in for step in data.funnel], default=1) or 1,
        sources=sorted({source for step in data.funnel for source in step.sources}),
    )


def _counts_json(counts: Counts) -> dict[str, Any]:
    return {"in": counts.num_in, "kept": counts.num_kept, "dropped": dict(counts.dropped)}


def _headline_rows(data: ReportData) -> list[tuple[str, list[tuple[str, RetrievalScores]]]]:
    """Evaluation → rows to compare: chance, pixel baseline, earlier stages, final model last."""
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


def _cards(data: ReportData) -> list[dict[str, Any]]:
    """For each evaluation: text-to-image R@1 of every row, for the bars at the top of the page."""
    return [
        {"name": name, "final": rows[-1][1], "bars": [(label, scores["t2i"]["r1"]) for label, scores in rows]}
        for name, rows in _headline_rows(data)
    ]


def _values(recall: RecallAtK | None) -> list[float]:
    """R@1, R@5, R@10; NaN where the direction is not scored."""
    return [math.nan] * 3 if recall is None else [recall["r1"], recall["r5"], recall["r10"]]


def _percent(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.2f}" if 0 < value < 1 else f"{value:.1f}"


def _width(text: str) -> int:
    """Columns in a terminal: wide and full-width characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items at even distances, all of them where there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _thumbnail(data: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
    small.thumbnail((96, 96), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return file.getvalue()


def _training_charts(data: ReportData) -> list[tuple[str, str]]:
    """(title, SVG) of loss, temperature and learning rate over samples seen."""
    starts, boundaries = _stage_axis(data)
    curves: tuple[tuple[str, Callable[[TrainingPoint], float]], ...] = (
        ("Loss", lambda point: point.loss),
        ("Temperature (factor on cosine similarities)", lambda point: point.temperature),
        ("Learning rate", lambda point: point.learning_rate),
    )
    charts = []
    for number, (title, value) in enumerate(curves if data.training else ()):
        series = [
            Series("", 0, [(start + p.samples_seen, value(p)) for p in data.training if p.stage == stage])
            for stage, start in starts.items()
        ]
        charts.append((title, line_chart(f"training-{number}", title, series, boundaries)))
    return charts


def _recall_charts(data: ReportData) -> list[tuple[str, list[tuple[str, str]]]]:
    """Evaluation → (title, SVG) of recall over samples seen, a chart for each direction that is scored."""
    starts, boundaries = _stage_axis(data)
    charts = []
    for number, evaluation in enumerate(dict.fromkeys(point.evaluation for point in data.recall)):
        points = [point for point in data.recall if point.evaluation == evaluation]
        drawn = []
        for direction, title in (("t2i", "Text to image"), ("i2t", "Image to text")):
            series = [
                Series(
                    label,
                    colour,
                    [
                        (
                            starts[stage] + point.samples_seen,
                            _values(_recall(point.scores, direction))[colour],
                        )
                        for point in points
                        if point.stage == stage and _recall(point.scores, direction) is not None
                    ],
                )
                for colour, label in enumerate(("R@1", "R@5", "R@10"))
                for stage in starts
            ]
            if any(one.points for one in series):
                svg = line_chart(
                    f"recall-{number}-{direction}", f"{title}, percent", series, boundaries, top=100
                )
                drawn.append((f"{title}, recall in percent", svg))
        charts.append((evaluation, drawn))
    return charts


def _recall(scores: RetrievalScores, direction: str) -> RecallAtK | None:
    return scores["t2i"] if direction == "t2i" else scores["i2t"]


def _stage_axis(data: ReportData) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """Where each training stage starts on the common axis of samples seen; the same listed, with the end."""
    seen: dict[str, int] = {}
    for stage, samples_seen in [
        *((point.stage, point.samples_seen) for point in data.training),
        *((point.stage, point.samples_seen) for point in data.recall),
    ]:
        seen[stage] = max(seen.get(stage, 0), samples_seen)
    starts: dict[str, int] = {}
    position = 0
    for stage, length in seen.items():
        starts[stage] = position
        position += length
    return starts, [*starts.items(), ("", position)]
