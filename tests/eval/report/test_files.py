"""The report's numbers as JSON, and the headline table."""

import dataclasses
import json
from pathlib import Path

import pytest

from eval.metrics.recall import RetrievalScores
from eval.report.data import RecallPoint
from eval.report.files import headline, write_report
from eval.report.page import render_html
from tests.helpers.report_page import Page, make_data, scores


def test_a_direction_that_is_not_scored_shows_dashes() -> None:
    only: RetrievalScores = {"t2i": {"r1": 1.0, "r5": 2.0, "r10": 3.0}, "i2t": None, "mean_recall": 2.0}
    point = RecallPoint("stage1", 10, "muge", only)
    data = dataclasses.replace(make_data(), evaluations={"muge": only}, baselines={}, recall=(point,))
    page = Page(render_html(data))
    assert "1.0 2.0 3.0 – – – 2.0" in " ".join(headline(data).split())
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 1


def test_json_has_the_fixed_form(tmp_path: Path) -> None:
    data = make_data()
    write_report(data, str(tmp_path / "r/report.html"), str(tmp_path / "r/report.json"))
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert set(report) == {
        "evaluations",
        "baselines",
        "comparisons",
        "funnel",
        "histograms",
        "notes",
        "copies",
        "stages",
    }
    line = report["comparisons"][0]["lines"][0]
    assert (line["paper"], line["difference"]["value"]) == (48.1, pytest.approx(1.9))
    assert report["evaluations"]["表情"] == scores(24.0)
    assert report["evaluations"]["表情/stage1"]["t2i"] == {"r1": 15.5, "r5": 25.5, "r10": 35.5}
    assert set(report["baselines"]["表情"]) == {"chance", "pixel"}
    assert report["funnel"][0]["dropped"]["language"] == 20
    assert report["funnel"][0]["in"] == report["funnel"][0]["kept"] + sum(
        report["funnel"][0]["dropped"].values()
    )
    assert report["funnel"][0]["sources"]["a"] == {"in": 60, "kept": 55, "dropped": {"language": 5}}
    assert report["stages"][0]["kept"] == 75
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["report.html", "report.json"]


def test_headline_is_aligned_with_chinese_names() -> None:
    data = dataclasses.replace(
        make_data(), evaluations={"表情": scores(24.0), "表情/stage1": scores(15.5), "ab": scores(3)}
    )
    lines = headline(data).splitlines()
    assert lines[0].split() == ["evaluation", "model", *["t2i", "R@1", "t2i", "R@5", "t2i", "R@10"],
                                *["i2t", "R@1", "i2t", "R@5", "i2t", "R@10"], "mean"]  # fmt: skip
    assert [line.split()[-8] for line in lines[1:]] == ["chance", "neighbour", "stage1", "stage2", "stage2"]
    columns = [sum(2 if ord(c) > 0x2E80 else 1 for c in line) for line in lines]
    assert len(set(columns)) == 1
    assert lines[1].startswith("表情        chance")
