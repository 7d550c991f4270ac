"""Renders three HTML pages: the report, the comparison of two runs, and the tables of `cnclip eval`.

All are self-contained: inline SVG, small images as data URIs, and one script that switches the language. The
content security policy allows only that script, by its digest, and no requests. Jinja2 escapes captions and
names.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.metrics.recall import RecallAtK, RetrievalScores
from eval.paper.comparison import Comparison
from eval.paper.render import table_rows
from eval.report.charts import Series, histogram_chart, line_chart
from eval.report.data import (
    FunnelStep,
    ReportData,
    RowCounts,
    TrainingPoint,
    headline_rows,
    percent,
    recall_values,
)
from eval.report.words import LANGUAGES, both, gloss, plain, say, words

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

_FOLDER = Path(__file__).parent / "templates"
_SOURCES = 6  # the largest sources, which get a column in the funnel's table
_MODELS = {"chance": "scores.chance", "pixel neighbour": "scores.pixel"}
_TERMS = {"ours": "ours", "95% interval": "interval"}
_TERMS |= {"paper": "paper", "difference": "difference"}
_SETUPS = {"zero-shot": "zero_shot", "finetuned": "finetuned"}


def render_html(data: ReportData) -> str:
    """Return the report's page; Jinja2 escapes every value except the charts, which are made here."""
    live = data.live
    heading = f"{live.name} · {live.date}" if live and live.date else live.name if live else None
    titles = {one: heading or _untitled(data, one) for one in LANGUAGES}
    sources = _largest_sources(data)
    rows = {stage.name: stage for stage in data.stages}
    names = live.states if live else rows
    return render(
        "report.html",
        titles,
        data=data,
        live=live,
        cards=_cards(data),
        headline_rows=headline_rows(data),
        comparison_rows=[(table, table_rows(table)) for table in data.comparisons],
        values=recall_values,
        training_charts=training_charts({"": data}),
        recall_charts=_recall_charts(data),
        histogram_charts=_histogram_charts(data),
        funnel_start=max([step.total.num_in for step in data.funnel], default=1) or 1,
        first_rows=first_rows(data),
        pairs=rows.get("shards"),
        num_set_aside=rows["validation"].num_kept if "validation" in rows else 0,
        sources=sources if len(sources) > 1 else [],
        other_sources=max(0, len(_sources(data)) - _SOURCES),
        cells=lambda step, what: _cells(step, what, sources, len(_sources(data)) > _SOURCES),
        stage_rows=[(name, rows.get(name), live.states[name] if live else None) for name in names],
    )


def _untitled(data: ReportData, language: str) -> str:
    if data.model is None:
        return plain("page.untitled_corpus", language)
    return plain("page.untitled", language, model=data.model)


def render_tables(tables: Sequence[Comparison], facts: Mapping[str, str]) -> str:
    """Return `eval.html`, a page with only tables and the facts of the measurement."""
    titles = {one: plain("eval.title", one, model=facts["model"]) for one in LANGUAGES}
    rows = [(table, table_rows(table)) for table in tables]
    return render("eval.html", titles, comparison_rows=rows, facts=facts)


def render(name: str, titles: Mapping[str, str], **values: object) -> str:
    """Return a page from a template that extends `base.html`; `titles` are by language."""
    from markupsafe import Markup

    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return _template(name).render(
        title=titles, script=Markup(script), script_digest=f"sha256-{digest}", **values
    )


def first_rows(data: ReportData) -> int:
    """Return how many rows came into the run."""
    corpus = data.rows_of("corpus") or data.rows_of("filter_text")
    return corpus.num_in if corpus else 0


def model_name(label: str) -> "Markup | str":
    """Return a row's name in the table of scores: a description for a baseline, the name of a stage."""
    return say(_MODELS[label]) if label in _MODELS else label


def title_of(stage: str, title: str) -> "Markup | str":
    """Return what a stage does, in both languages if it is a known stage."""
    return gloss("steps", stage) or title


def figure(label: str) -> "Markup":
    """Return the name of a figure or table in both languages; names of data sets are the same in both."""
    return both({language: _figure(label, language) for language in LANGUAGES})


def _figure(label: str, language: str) -> str:
    english = words("en")["figures"]
    for by_rule in ("by_elevater", "by_voc"):
        if label.endswith(rule := english[by_rule].format(title="")):
            return plain(f"figures.{by_rule}", language, title=label.removesuffix(rule))
    keys = {text: key for key, text in english.items()}
    return plain(f"figures.{keys[label]}", language) if label in keys else label


def table_heading(table: Comparison) -> "Markup":
    """Return `Comparison.heading` in both languages."""
    name = "paper.own_heading" if table.number is None else "paper.heading"
    if table.paper_model is not None:
        name += "_compared"
    return both(
        {
            language: plain(
                name,
                language,
                number=table.number,
                title=_figure(table.title, language),
                setup=plain(f"terms.{_SETUPS[table.setup]}", language),
                model=table.model,
                paper_model=table.paper_model,
            )
            for language in LANGUAGES
        }
    )


def term(name: str) -> "Markup | str":
    """Return the head of a column of the paper's tables."""
    return say(f"terms.{_TERMS[name]}") if name in _TERMS else name


def duration(seconds: float) -> str:
    """Return a readable duration: 4 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def signed(value: float) -> str:
    """Return a difference with its sign, or a dash if it is unknown."""
    if math.isnan(value):
        return "–"
    return f"{value:+.1f}" if round(value, 1) else "0.0"


def _template(name: str) -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": "{:,}".format,
        "percent": percent,
        "duration": duration,
        "signed": signed,
    }
    environment.globals |= {
        "say": say, "gloss": gloss, "term": term, "model_name": model_name, "title_of": title_of,
        "figure": figure, "table_heading": table_heading,
    }  # fmt: skip
    return environment.get_template(name)


def _cards(data: ReportData) -> list[dict[str, Any]]:
    """Return text-to-image R@1 of every row of each evaluation, for the bars at the top of the page."""
    return [
        {"name": name, "final": rows[-1][1], "bars": [(label, scores["t2i"]["r1"]) for label, scores in rows]}
        for name, rows in headline_rows(data)
    ]


def _sources(data: ReportData) -> list[str]:
    """Return the sources, largest first."""
    rows: dict[str, int] = {}
    for step in data.funnel:
        for source, counts in step.sources.items():
            rows[source] = max(rows.get(source, 0), counts.num_in)
    return sorted(rows, key=lambda source: (-rows[source], source))


def _largest_sources(data: ReportData) -> list[str]:
    return sorted(_sources(data)[:_SOURCES])


def _cells(step: FunnelStep, what: str, sources: Sequence[str], has_others: bool) -> "Markup":
    """Return the sources' cells of one row of the funnel's table: rows in, kept, or dropped for a reason."""
    from markupsafe import Markup

    if len(sources) < 2:
        return Markup("")
    counts = {source: _count(found, what) for source, found in step.sources.items()}
    shown = [f"{counts[source]:,}" if source in counts else "–" for source in sources]
    if has_others:
        shown.append(f"{sum(count for source, count in counts.items() if source not in sources):,}")
    return Markup("").join(Markup('<td class="number">{}</td>').format(value) for value in shown)


def _count(counts: RowCounts, what: str) -> int:
    if what == "num_in":
        return counts.num_in
    return counts.num_kept if what == "num_kept" else counts.dropped.get(what, 0)


def _chart(name: str, title: "Markup", svg: str) -> dict[str, object]:
    from markupsafe import Markup

    return {"id": name, "title": title, "svg": Markup(svg)}


def _histogram_charts(data: ReportData) -> list[dict[str, object]]:
    from markupsafe import Markup

    charts = []
    for number, item in enumerate(data.histograms):
        if any(item.kept) or any(item.dropped):
            name = f"histogram-{number}"
            svg = histogram_chart(name, item.edges, item.kept, item.dropped)
            title = say(f"funnel.{item.name}") + Markup(" · <code>{}</code>").format(item.stage)
            charts.append(_chart(name, title, svg))
    return charts


def training_charts(runs: Mapping[str, ReportData]) -> list[dict[str, object]]:
    """Return charts of loss, temperature and learning rate over samples seen.

    If there are several runs, by label, each has a colour, and the page adds a legend.
    """
    starts = {label: _stage_axis(data) for label, data in runs.items()}
    boundaries = max((axis[1] for axis in starts.values()), key=lambda one: one[-1][1])
    if len(runs) > 1:
        boundaries = [("", 0), boundaries[-1]]
    curves: tuple[tuple[str, Callable[[TrainingPoint], float]], ...] = (
        ("loss", lambda point: point.loss),
        ("temperature", lambda point: point.temperature),
        ("rate", lambda point: point.learning_rate),
    )
    charts = []
    for number, (title, value) in enumerate(curves if any(data.training for data in runs.values()) else ()):
        series = [
            Series(
                "",
                colour,
                [(start + p.samples_seen, value(p)) for p in data.training if p.stage == stage],
            )
            for colour, (label, data) in enumerate(runs.items(), start=1 if len(runs) > 1 else 0)
            for stage, start in starts[label][0].items()
        ]
        name = f"training-{number}"
        # Two runs need two hues; the position distinguishes the curves of one run.
        svg = line_chart(name, series, boundaries, contrast=len(runs) > 1)
        charts.append(_chart(name, say(f"training.{title}"), svg))
    return charts


def _recall_charts(data: ReportData) -> list[tuple[str, list[dict[str, object]]]]:
    """Return evaluation → charts of recall over samples seen, one for each scored direction."""
    starts, boundaries = _stage_axis(data)
    charts = []
    for number, evaluation in enumerate(dict.fromkeys(point.evaluation for point in data.recall)):
        points = [point for point in data.recall if point.evaluation == evaluation]
        drawn = []
        for direction in ("t2i", "i2t"):
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
                name = f"recall-{number}-{direction}"
                svg = line_chart(name, series, boundaries, top=100)
                drawn.append(_chart(name, say(f"training.recall_{direction}"), svg))
        charts.append((evaluation, drawn))
    return charts


def _recall(scores: RetrievalScores, direction: str) -> RecallAtK | None:
    return scores["t2i"] if direction == "t2i" else scores["i2t"]


def _stage_axis(data: ReportData) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """Return where training stages start on the samples axis, as a mapping and as a list with the end."""
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
