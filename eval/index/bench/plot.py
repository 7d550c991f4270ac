"""Draws the front in the plane where it is computed: queries per second over recall, size by colour.

The SVG's marks carry their figures as titles, which browsers show; the page shows all of them at the mouse
and dims the other indices on a click in the list.
"""

import html
import io
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from eval.index.bench.points import Point
from eval.index.bench.timing import PERCENTILES

_MARKS = "osD^vP*X<>ph"  # one for each index


def front_plot(points: Sequence[Point], front: Sequence[Point], k: int) -> str:
    """Return an SVG: a line for each index, its marks coloured by size, rings on the front.

    Bars span the middle half of the rounds. Points of one set of queries.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bench-index", "font.size": 9}):
        figure = Figure(figsize=(8.0, 4.6), layout="constrained")
        axes = figure.add_subplot()
        sizes = [point.bytes_per_vector for point in points]
        norm = LogNorm(min(sizes) / 1.01, max(sizes) * 1.01)
        colours: Any = ScalarMappable(norm, colormaps["viridis_r"])
        names = list(dict.fromkeys(point.name for point in points))
        for place, name in enumerate(names):
            mark = _MARKS[place % len(_MARKS)]
            line = [(number, point) for number, point in enumerate(points) if point.name == name]
            for curve, more in enumerate(dict.fromkeys(_but_effort(point) for _, point in line)):
                along = [point for _, point in line if _but_effort(point) == more]
                xs = [point.recall for point in along]
                ys = [point.queries_per_second for point in along]
                (drawn,) = axes.plot(xs, ys, color="#b0b0b0", linewidth=0.8, zorder=1)
                drawn.set_gid(f"line-{place}-{curve}")
            for number, point in line:
                half = (point.spread or 0.0) * point.queries_per_second
                colour = colours.to_rgba(point.bytes_per_vector)
                made = axes.errorbar(
                    point.recall,
                    point.queries_per_second,
                    yerr=half,
                    fmt="none",
                    ecolor=colour,
                    elinewidth=0.8,
                )
                made[2][0].set_gid(f"bar-{place}-{number}")
                dot = axes.scatter(
                    [point.recall], [point.queries_per_second], s=22, marker=mark, color=[colour], zorder=3
                )
                dot.set_gid(f"point-{place}-{number}")
            axes.scatter([], [], marker=mark, color="#606060", s=22, label=name)
        axes.scatter(
            [point.recall for point in front],
            [point.queries_per_second for point in front],
            s=70,
            facecolors="none",
            edgecolors="black",
            linewidths=0.9,
            zorder=4,
            label="front",
        ).set_gid("front")
        axes.set_yscale("log")
        axes.set_xlabel(f"recall@{k} of {points[0].queries} queries against exact search")
        axes.set_ylabel("queries per second")
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
        figure.colorbar(colours, ax=axes, label="bytes per vector", pad=0.01)
        axes.grid(linewidth=0.4)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _titled(file.getvalue(), [_told(point) for point in points])


def front_page(points: Sequence[Point], front: Sequence[Point], k: int, conditions: str) -> str:
    """Return a page with the drawing, figures at the mouse, and the indices to choose from."""
    svg = front_plot(points, front, k)
    names = list(dict.fromkeys(point.name for point in points))
    data = json.dumps({"names": names, "points": [_told(point) for point in points]}).replace("<", "\\u003c")
    template = resources.files("eval.index.bench").joinpath("front.html").read_text(encoding="utf-8")
    filled = {
        "title": html.escape(f"recall@{k} and speed"),
        "conditions": html.escape(conditions),
        "drawing": svg[svg.index("<svg") :],
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], template)


def _but_effort(point: Point) -> str:
    """Return the parameters of a curve, all but the last: nprobe, efSearch or search_L."""
    return point.parameters.rpartition(",")[0]


def _told(point: Point) -> list[str]:
    """Return a point's figures as lines."""
    spread = "" if point.spread is None else f" ±{point.spread:.0%}"
    lines = [
        f"{point.name} {point.parameters}".strip(),
        f"recall {point.recall:.4f} ±{1.96 * point.recall_error:.4f}",
        f"{point.queries_per_second:,.0f} queries/s{spread}",
        f"{point.bytes_per_vector:,.1f} bytes per vector",
    ]
    single = [
        f"p{percentile} {value:.3g}"
        for percentile in PERCENTILES
        if (value := point.latency_ms(percentile)) is not None
    ]
    if single:
        lines.append(f"{', '.join(single)} ms for one query")
    if point.cpu_ms is not None:
        lines.append(f"{point.cpu_ms:.3g} ms of CPU per query")
    if point.distances is not None:
        lines.append(f"{point.distances:,.0f} distances per query")
    return lines


def _titled(svg: str, told: Sequence[Sequence[str]]) -> str:
    """Put each point's figures into its mark, which browsers show at the mouse."""

    def add(found: "re.Match[str]") -> str:
        text = html.escape("\n".join(told[int(found["number"])]))
        return f"{found[0]}<title>{text}</title>"

    return re.sub(r'<g id="point-\d+-(?P<number>\d+)">', add, svg)
