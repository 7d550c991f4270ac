"""Draws line charts and histograms as SVG elements for the report.

The charts contain only numbers and ASCII labels: matplotlib's fonts lack Chinese and the page has two
languages, so the page itself names titles and axes. Colours and font are CSS variables of the page, so that
charts follow its light and dark modes.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Placeholder colours for matplotlib → variables of the style sheet.
_INK, _GRID, _SERIES = "#0a0b01", "#0a0b02", ("#0a0b03", "#0a0b04", "#0a0b05")
_KEPT, _DROPPED, _OTHER = "#0a0b06", "#0a0b07", "#0a0b08"
_VARIABLES = {
    _INK: "var(--muted)",
    _GRID: "var(--line)",
    _KEPT: "var(--kept)",
    _DROPPED: "var(--dropped)",
    _OTHER: "var(--other)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, start=1)},
}


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its name (written once, at the last line of that name), colour 0…2, (x, y) points."""

    label: str
    colour: int
    points: Sequence[tuple[float, float]]


def line_chart(
    name: str,
    series: Sequence[Series],
    boundaries: Sequence[tuple[str, int]],
    *,
    top: float | None = None,
    contrast: bool = False,
) -> str:
    """Return an SVG line chart over samples seen, as wide as its container.

    `name` makes its ids unique on the page, which gives its title the id `<name>-title`. `boundaries` are
    (stage, samples seen at its start), then ("", the end). The y axis runs from 0 to `top`; without `top` it
    fits the data. With `contrast` colour 2 has another hue than colour 1.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    colours = (*_SERIES[:2], _OTHER) if contrast else _SERIES
    with rc_context(_settings(name)):
        figure = Figure(figsize=(4.0, 2.5), layout="constrained")
        axes = figure.add_subplot()
        last_point: dict[str, tuple[float, float]] = {}
        for line in series:
            if not line.points:
                continue
            x, y = zip(*line.points, strict=True)
            marker = "o" if len(x) < 40 and line.label else None
            axes.plot(x, y, color=colours[line.colour], linewidth=1.6, marker=marker, markersize=2.6)
            if line.label:
                last_point[line.label] = (x[-1], y[-1])
        end = boundaries[-1][1] or 1
        axes.set_xlim(0, end * (1.16 if last_point else 1.0))
        if top is not None:
            axes.set_ylim(0, top)
        for (stage, start), (_, stop) in pairwise(boundaries):
            if start:
                axes.axvline(start, color=_INK, linewidth=0.8, linestyle=(0, (3, 3)))
            if stop - start > 0.08 * end:
                label = stage.encode("ascii", "replace").decode()
                middle = (start + stop) / 2
                axes.text(middle, 1.02, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        _label_lines(axes, last_point)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        svg = _svg(figure)
    return _inline_svg(svg, name)


def histogram_chart(name: str, edges: Sequence[float], kept: Sequence[int], dropped: Sequence[int]) -> str:
    """Return an SVG histogram that stacks dropped rows on kept rows, without empty bins at the ends.

    Bin 0 is below the first edge, bin i between the edges i - 1 and i, the last one above the last edge.
    `name` is as in `line_chart`.

    Raises:
        ValueError: if every bin is empty.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    filled = [number for number, pair in enumerate(zip(kept, dropped, strict=True)) if any(pair)]
    if not filled:
        raise ValueError(f"histogram {name}: every bin is empty")
    first, last = filled[0], filled[-1]
    bins = range(first, last + 1)
    with rc_context(_settings(name)):
        figure = Figure(figsize=(4.0, 2.5), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(bins, kept[first : last + 1], width=0.9, color=_KEPT)
        axes.bar(bins, dropped[first : last + 1], width=0.9, bottom=kept[first : last + 1], color=_DROPPED)
        # An edge is drawn between its two bins, and about eight edges get a label.
        inside = [number for number in range(first, last + 2) if 1 <= number <= len(edges)]
        written = inside[:: max(1, len(inside) // 7)]
        places, labels = (
            [number - 0.5 for number in written],
            [f"{edges[number - 1]:g}" for number in written],
        )
        axes.set_xticks(places, labels)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        svg = _svg(figure)
    return _inline_svg(svg, name)


def _settings(name: str) -> Any:
    return {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip


def _svg(figure: Any) -> str:
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return file.getvalue()


def _label_lines(axes: Any, last_point: Mapping[str, tuple[float, float]]) -> None:
    """Draw names at the ends of the lines, apart from each other and inside the chart."""
    low, high = axes.get_ylim()
    gap = 0.085 * (high - low)
    from_below = sorted(last_point.items(), key=lambda item: item[1][1])
    positions: list[float] = []
    for _, (_, y) in from_below:
        positions.append(max(y, positions[-1] + gap) if positions else y)
    ceiling = high - 0.3 * gap
    for i in reversed(range(len(positions))):
        positions[i] = min(positions[i], ceiling)
        ceiling = positions[i] - gap
    for (label, (x, _)), position in zip(from_below, positions, strict=True):
        axes.annotate(
            label,
            (x, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def _inline_svg(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-labelledby="{name}-title"', svg, count=1
    )
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)  # since several charts share a page
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 var(--font)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
