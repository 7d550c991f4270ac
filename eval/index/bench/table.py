"""The table of `cnclip bench-index`, and what it says of the noise and of what indices do not reach."""

from collections.abc import Sequence

from eval.index.bench.front import Noise
from eval.index.bench.points import Point
from eval.index.bench.timing import PERCENTILES
from eval.metrics.bootstrap import Measured
from pipeline.core.text_table import align

_FEW = 0.01  # recalls that differ by less should be told apart


def points_table(
    points: Sequence[Point], front: Sequence[Point], k: int, exact: dict[str, dict[str, Measured]]
) -> str:
    """Return aligned text with a star at the points of the front.

    `exact` has the task's recall of exact search for each set of queries with labels; the loss against it
    follows each R@K.
    """
    num_sets, starred = len({point.queries for point in points}), {point.key for point in front}
    has_gap = any(point.gap is not None for point in points)
    head = ["", "factory", "setting", "queries", f"recall@{k}", "strict", "gap"]
    head += ["queries/s", "spread", *(f"p{percentile} ms" for percentile in PERCENTILES), "CPU ms"]
    head += ["distances", "build s", "bytes/vector", "MiB"]
    head += [f"{name.upper().replace('R', 'R@')} (loss)" for name in ("r1", "r5", "r10")]
    rows = [tuple(head)]
    for name, measured in exact.items():
        first = ["", "exact search", "", name, *[""] * 13]
        rows.append(
            (*first, *(f"{one.value:.1f} ±{(one.high - one.low) / 2:.1f}" for one in measured.values()))
        )
    for point in points:
        row = [
            "*" if point.key in starred else "",
            point.name,
            point.parameters,
            point.queries,
            f"{point.recall:.4f}",
            f"{point.strict_recall:.4f}",
            "" if point.gap is None else f"{point.gap:+.4f}",
            f"{point.queries_per_second:,.0f}",
            "" if point.spread is None else f"±{point.spread:.0%}",
            *(_milliseconds(point.latency_ms(percentile)) for percentile in PERCENTILES),
            _milliseconds(point.cpu_ms),
            "" if point.distances is None else f"{point.distances:,.0f}",
            f"{point.build_seconds:.2f}",
            f"{point.bytes_per_vector:.1f}",
            f"{point.resident_bytes / 2**20:.0f}",
        ]
        if point.task is None or point.queries not in exact:
            row += [""] * 3
        else:
            of_exact = exact[point.queries]
            row += [
                f"{one.value:.1f} ({round(one.value - of_exact[name].value, 1) or 0.0:+.1f})"
                for name, one in point.task.items()
            ]
        rows.append(tuple(row))
    shown = [True] * 3 + [num_sets > 1, True, True, has_gap] + [True] * 10 + [bool(exact)] * 3
    right = (False, False, False, False, *[True] * 16)
    kept = [column for column, is_shown in enumerate(shown) if is_shown]
    return align(
        [tuple(row[column] for column in kept) for row in rows], tuple(right[column] for column in kept)
    )


def noise_lines(noise: Noise, points: Sequence[Point], num_queries: int) -> list[str]:
    """Return what the noise hides among points of one set of queries, and what would lower it.

    Nothing for a single point.
    """
    if len(points) < 2:
        return []
    rounds = min(len(point.rounds) for point in points)
    told = f"{points[0].queries} queries: a lead in recall counts from {noise.recall:.3f} on"
    if noise.recall > _FEW:
        told += f", since only {num_queries:,} ask (more: --num-queries)"
    told += f"; one in speed from {noise.speed - 1:.0%} on" if noise.speed < 1000 else "; none in speed"
    return [f"{told} in {rounds} rounds" + (" (more: --rounds)" if noise.speed > 1.5 else "")]


def ceiling_lines(points: Sequence[Point], target: float = 0.99) -> list[str]:
    """Return a line for each index of one set of queries that no setting brings to the target."""
    lines = []
    for name in dict.fromkeys(point.name for point in points):
        best = max((point for point in points if point.name == name), key=lambda point: point.recall)
        if best.recall < target:
            setting = f" with {best.parameters}" if best.parameters else ""
            lines.append(
                f"{name} reaches recall {best.recall:.4f} at most for {best.queries} queries{setting}"
            )
    return lines


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"
