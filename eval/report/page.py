"""The report as one HTML page, and `cnclip eval`'s tables as another.

Both are self-contained: inline SVG, thumbnails as data URIs, no script; their content security policy forbids
scripts and every request. Captions and names are escaped by Jinja2.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.metrics.recall import RecallAtK, RetrievalScores
from eval.paper.comparison import Comparison
from eval.paper.render import table_rows
from eval.report.charts import Series, histogram_chart, line_chart
from eval.report.data import (
    HISTOGRAM_TITLES,
    ReportData,
    TrainingPoint,
    headline_rows,
    percent,
    recall_values,
)

if TYPE_CHECKING:
    from jinja2 import Template


def render_html(data: ReportData) -> str:
    """The report's page; Jinja2 escapes every value but the charts, which are made here."""
    from markupsafe import Markup

    return _template("report.html").render(
        data=data,
        cards=_cards(data),
        headline_rows=headline_rows(data),
        comparison_rows=[(table, table_rows(table)) for table in data.comparisons],
        values=recall_values,
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


def render_tables(tables: Sequence[Comparison], facts: Mapping[str, str]) -> str:
    """A page of tables alone, with what was measured on what: `eval.html`."""
    rows = [(table, table_rows(table)) for table in tables]
    return _template("eval.html").render(comparison_rows=rows, facts=facts)


def _template(name: str) -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": "{:,}".format, "percent": percent}
    return environment.get_template(name)


def _cards(data: ReportData) -> list[dict[str, Any]]:
    """For each evaluation: text-to-image R@1 of every row, for the bars at the top of the page."""
    return [
        {"name": name, "final": rows[-1][1], "bars": [(label, scores["t2i"]["r1"]) for label, scores in rows]}
        for name, rows in headline_rows(data)
    ]


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
                            recall_values(_recall(point.scores, direction))[colour],
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
