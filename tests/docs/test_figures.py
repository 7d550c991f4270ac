"""Figures of README and guides are those that benchmarks/results holds, rounded."""

import json
import re
import statistics
from typing import Any

import pytest

from tests.helpers.pages import ROOT, read, tables

Row = list[str]


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def _ratios(name: str) -> dict[str, float]:
    return {result["name"]: result["ratio"] for result in _results(name)["results"]}


def _rows(page: str, *, having: str) -> list[Row]:
    """Return the rows of the page's only table that has a cell with these words."""
    found = [table for table in tables(read(page)) if any(having in cell for row in table for cell in row)]
    assert len(found) == 1, f"{page}: {len(found)} tables have {having!r}"
    return found[0][1:]


def _assert_shown(shown: str, value: float) -> None:
    decimals = len(shown.partition(".")[2])
    assert abs(float(shown) - value) <= 0.5 * 10**-decimals + 1e-9, (shown, value)


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_recall_on_emoji(page: str) -> None:
    found = _results("emoji_zh")
    expected = [
        found["baselines"]["fluent"]["chance"]["t2i"],
        found["baselines"]["fluent"]["pixel"]["t2i"],
        found["evaluations"]["fluent/stage1"]["t2i"],
        found["evaluations"]["fluent"]["t2i"],
    ]
    rows = _rows(page, having="pixel nearest neighbour")
    assert len(rows) == len(expected)
    for row, recall in zip(rows, expected, strict=True):
        for shown, key in zip(row[1:], ("r1", "r5", "r10"), strict=True):
            _assert_shown(shown, recall[key])


def _training_speed() -> dict[str, float]:
    return _ratios("training") | _ratios("image_path") | _ratios("retrieval")


@pytest.mark.parametrize(
    ("page", "names"),
    [
        (
            "README.md",
            (
                ("loss/time",), ("train_step/live", "train_step/cached", "train_step/stage2"),
                ("image_path",), ("retrieval",),
            ),
        ),
        (
            "docs/guides/train.md",
            (
                ("loss/time",), ("loss/time@stage1",), ("image_path",), ("train_step/live",),
                ("train_step/cached",), ("train_step/stage2",),
            ),
        ),
    ],
)  # fmt: skip
def test_speed_against_cn_clip(page: str, names: tuple[tuple[str, ...], ...]) -> None:
    ratios = _training_speed()
    rows = _rows(page, having="times as fast")
    assert len(rows) == len(names)
    for row, keys in zip(rows, names, strict=True):
        for shown, key in zip(re.findall(r"[\d.]+", row[-1]), keys, strict=True):
            _assert_shown(shown, ratios[key])


def test_recall_of_cached_views() -> None:
    found = {str(row["views"]): row["mean_recall"] for row in _results("cached_views")["rows"]}
    for what, shown in _rows("docs/guides/train.md", having="K = 8"):
        mean, spread = shown.split(" ± ")
        values = found[what.removeprefix("K = ")]
        _assert_shown(mean, statistics.fmean(values))
        _assert_shown(spread, statistics.stdev(values))


def test_recall_for_a_part_of_the_compute() -> None:
    of_arm: dict[str, list[Any]] = {}
    for run in _results("compute")["runs"]:
        of_arm.setdefault(run["arm"], []).append(run)
    paper = {run["seed"]: run for run in of_arm["paper"]}
    rows = _rows("docs/guides/train.md", having="new styles")
    assert [row[0] for row in rows] == list(of_arm)
    for name, style, concept, both, flops, seconds, seeds in rows:
        found = of_arm[name]
        assert int(seeds) == len(found)
        for shown, key in ((style, "style"), (concept, "concept"), (both, "both")):
            recalls = [run["recall"][key] for run in found]
            mean, _, spread = shown.partition(" ± ")
            _assert_shown(mean, statistics.fmean(recalls))
            if len(found) > 1:
                _assert_shown(spread, statistics.stdev(recalls))
        shares = [run["petaflops"] / paper[run["seed"]]["petaflops"] for run in found]
        _assert_shown(flops.removesuffix("%"), 100 * statistics.fmean(shares))
        peers = [(run, paper[run["seed"]]) for run in found]
        times = [
            run["cpu_seconds"] / peer["cpu_seconds"] for run, peer in peers if run["ranks"] == peer["ranks"]
        ]
        if times:
            _assert_shown(seconds.removesuffix("%"), 100 * statistics.fmean(times))
        else:
            assert seconds == "–"


@pytest.mark.parametrize(
    ("page", "columns"),
    [
        ("balancing", {"rare": "rare", "middle": "middle", "frequent": "frequent"}),
        ("bilingual", {"recall": "emoji-fluent-flat"}),
        ("caption-cut", {"recall": "unseen"}),
        ("locking", {"new emoji style": "emoji-fluent-flat", "new theme of icons": "icons-colour"}),
        ("filter-strength", {"recall of the model": "emoji-fluent-flat"}),
    ],
)
def test_findings(page: str, columns: dict[str, str]) -> None:
    """Columns of the page's table and the sets that they show: means and spreads over three seeds."""
    record = _results(page.replace("-", "_"))
    recalls: dict[str, list[Any]] = {}
    for run in record["runs"]:
        recalls.setdefault(run["arm"], []).append(run["recall"])
    (table,) = tables(read(f"docs/findings/{page}.md"))
    assert [row[0] for row in table[1:]] == list(recalls)
    for cells in table[1:]:
        row = dict(zip(table[0], cells, strict=True))
        found = recalls[cells[0]]
        assert len(found) == 3
        for title, key in columns.items():
            mean, spread = row[title].split(" ± ")
            _assert_shown(mean, statistics.fmean(recall[key] for recall in found))
            _assert_shown(spread, statistics.stdev(recall[key] for recall in found))
        if "pairs" in row:
            assert int(row["pairs"].replace(",", "")) == record["pairs"][cells[0]]


@pytest.mark.parametrize("page", ["docs/guides/train.md", "docs/zh/train.md"])
def test_recall_with_kept_moments(page: str) -> None:
    recalls: dict[str, list[float]] = {}
    for run in _results("phase_optimizer")["runs"]:
        recalls.setdefault(run["arm"], []).append(run["recall"]["emoji-fluent-flat"])
    paragraph = read(page).partition("phase_optimizer.py")[0][-250:]
    shown = re.findall(r"[\d.]+(?=%)", paragraph)
    for figure, arm in zip(shown, ("new, warm-up", "kept, warm-up", "new, no warm-up"), strict=True):
        _assert_shown(figure, statistics.fmean(recalls[arm]))


def test_what_filters_keep() -> None:
    found = _results("filter_strength")["filters"]
    rows = _rows("docs/findings/filter-strength.md", having="filter of 2 epochs")
    for name, _, good, recall, _ in (row for row in rows if row[0] in found):
        _assert_shown(good.removesuffix("%"), found[name]["good among kept"])
        _assert_shown(recall, found[name]["recall"])


def test_recall_with_negation_statements() -> None:
    rows = _results("negation")["rows"]
    keys = ("negated", "negated, new wording", "mean recall")
    for row, key in zip(_rows("docs/guides/train.md", having="negated questions"), keys, strict=True):
        for shown, arm in zip(row[1:], ("without", "with"), strict=True):
            _assert_shown(shown, statistics.fmean(rows[arm][key]))
