"""The front under noise: an index listed twice has one star, and no lead within the noise has any."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from benchmarks.eval.clip_like import ClipLike, write
from eval.index.bench.front import as_fast, noise_of, pareto_front
from eval.index.bench.points import Point, best_point
from eval.index.bench.table import ceiling_lines, noise_lines
from eval.index.bench.timing import Round
from pipeline import cli as command_line

# Queries per second of 30 rounds, in turns, of two indices of one factory and a third one, on a machine of
# two cores with a load of 20.
NOISY: dict[str, list[float]] = json.loads(
    (Path(__file__).parent / "noisy_rounds.json").read_text(encoding="utf-8")
)


def point(
    recall: float,
    speeds: "list[float] | float",
    size: float = 100,
    queries: str = "text",
    factory: str = "X",
    error: float = 0.0,
    parameters: str = "",
    session: str = "a",
    copy: int = 0,
) -> Point:
    speeds = [speeds * noise for noise in (0.99, 1.0, 1.01, 1.0, 1.0)] if isinstance(speeds, int) else speeds
    assert isinstance(speeds, list)
    made = Point(
        factory=f"{factory}{recall}" if factory == "X" else factory,
        parameters=parameters,
        queries=queries,
        recall=recall,
        recall_error=error,
        queries_per_second=0,
        build_seconds=0,
        bytes_per_vector=size,
        resident_bytes=0,
        copy=copy,
    )
    for number, speed in enumerate(speeds):
        made = made.with_round(Round(session, number, speed, 1.0, [1000], 0.0))
    return made


def test_the_front_is_that_of_recall_and_speed() -> None:
    points = [
        point(1.0, 10),
        point(0.9, 100, factory="A"),
        point(0.9, 80, factory="B"),
        point(0.9, 50, 20, factory="C"),  # smaller, but slower
        point(0.5, 60, 20),
        point(0.4, 200),
    ]
    assert pareto_front(points) == [points[0], points[1], points[5]]
    assert pareto_front(points, most_bytes=50) == [points[3], points[4]]
    assert best_point(points, 0.9, 100) == points[1]
    assert best_point(points, 0.9, 50) == points[3]
    assert best_point(points, 0.99, 50) is None
    other = point(0.3, 5, 200, queries="held-out")  # worse than all, but of other queries
    assert other in pareto_front([*points, other])


def test_a_lead_within_the_noise_has_no_star() -> None:
    better, hardly_faster = point(0.95, 100), point(0.9, 104)
    assert pareto_front([better, hardly_faster]) == [better]
    assert as_fast(better, [better, hardly_faster]) == [hardly_faster]
    faster = point(0.9, 120)
    assert pareto_front([better, faster]) == [better, faster]
    noisy = point(0.9, [60.0, 200, 130, 90, 300])  # faster in the median and in the mean
    assert pareto_front([better, noisy]) == [better]
    steady = [point(0.9, [each * 1.2 for each in (60.0, 200, 130, 90, 300)]), noisy]
    assert pareto_front([*steady, point(0.95, [60.0, 200, 130, 90, 300])])[0].recall == 0.95
    # In every round the first is 1.2 times as fast, however the rounds differ.
    assert as_fast(steady[0], steady) == []
    # So few queries tell 0.95 and 0.96 not apart: only the faster one has a star.
    few = [point(0.96, 100, error=0.01), point(0.95, 120, error=0.01)]
    assert pareto_front(few) == [few[1]]
    assert noise_of(few).recall == pytest.approx(0.0277, abs=1e-4)
    (told,) = noise_lines(noise_of(few), few, 50)
    assert "from 0.028 on, since only 50 ask (more: --num-queries)" in told
    assert "one in speed from " in told
    two = [point(0.9, [100.0, 110]), point(0.8, [500.0, 500])]
    assert "none in speed in 2 rounds (more: --rounds)" in noise_lines(noise_of(two), two, 1000)[0]
    assert noise_lines(noise_of(two[:1]), two[:1], 1000) == []
    apart = [point(0.9, 100), point(0.8, 150, session="b")]  # measured at different times
    assert pareto_front(apart) == apart


def test_an_index_listed_twice_has_the_same_star_in_20_of_20_noisy_runs() -> None:
    recalls = {"nprobe=4": 0.8, "nprobe=16": 0.95, "efSearch=32": 0.9, "efSearch=128": 0.97}
    rng, fooled = np.random.default_rng(0), 0
    for _ in range(20):
        rounds = rng.choice(30, size=7, replace=False)
        for is_alias in (False, True):
            points = []
            for name, speeds in NOISY.items():
                factory, parameters = name.rsplit(" ", 1)
                # The twin as a copy, or as another factory string for the same index.
                twin = factory.endswith("#2")
                points.append(
                    point(
                        recalls[parameters],
                        [speeds[number] for number in rounds],
                        factory="alias" if twin and is_alias else factory.removesuffix(" #2"),
                        parameters=parameters,
                        copy=int(twin and not is_alias),
                    )
                )
            starred = {each.key for each in pareto_front(points)}
            for one, other in permutations(points[:4], 2):
                if one.recall == other.recall:
                    assert (one.key in starred) == (other.key in starred)
                    fooled += one.queries_per_second > 1.05 * other.queries_per_second
    assert fooled > 20  # medians alone would have starred one of the two


def test_what_no_setting_reaches_is_said() -> None:
    points = [
        point(0.3, 10, factory="RaBitQ", parameters="nprobe=1"),
        point(0.4, 5, factory="RaBitQ", parameters="nprobe=8"),
        point(0.995, 5, factory="Flat"),
    ]
    assert ceiling_lines(points) == ["RaBitQ reaches recall 0.4000 at most for text queries with nprobe=8"]


@pytest.mark.slow
def test_one_run_of_an_index_listed_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "features", ClipLike(dim=16, num_clusters=20), 1000, 50)
    words = ["bench-index", str(tmp_path / "features"), "--grid", "SQ8;SQ8", "--query-side", "text"]
    words += ["--rounds", "3", "--threads", "1", "--out", str(tmp_path / "out")]
    assert command_line.main(words) == 0
    told = capsys.readouterr()
    first, second = (line for line in told.out.splitlines() if line[1:].lstrip().startswith("SQ8"))
    assert second[1:].lstrip().startswith("SQ8 #2 ")
    assert first[0] == second[0] == "*"
    points = json.loads((tmp_path / "out" / "points.json").read_text(encoding="utf-8"))
    assert [(each["copy"], each["front"]) for each in points] == [(0, True), (1, True)]
    assert all(len(each["rounds"]) == 3 and each["spread"] is not None for each in points)
    # One more round is measured, and nothing else.
    words[words.index("3")] = "4"
    assert command_line.main(words) == 0
    assert "SQ8 #2: measured before" in capsys.readouterr().err
    points = json.loads((tmp_path / "out" / "points.json").read_text(encoding="utf-8"))
    assert [len(each["rounds"]) for each in points] == [4, 4]
