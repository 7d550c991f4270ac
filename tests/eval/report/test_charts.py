"""Charts draw their counts, and the page shows them with the notes on the funnel."""

import dataclasses
import re

import pytest

from data_prep.accounting.funnel import NoOpThreshold
from eval.report.charts import histogram_chart
from eval.report.data import Histogram
from eval.report.files import report_json
from eval.report.page import render_html
from tests.helpers.report_page import HOSTILE, Page, make_data


def test_histograms_and_notes_are_shown() -> None:
    histograms = (
        Histogram("characters", "filter_text", range(1, 101), [0] * 5 + [40, 30, 5] + [0] * 93, [9] * 101),
        Histogram("score", "filter_text", [0.1, 0.2, 0.3], [0, 0, 50, 25], [3, 2, 0, 0]),
        Histogram("short_side_px", "filter_image", [16, 32], [0, 0, 0], [0, 0, 0]),  # nothing came in
    )
    note = NoOpThreshold("filter_text", HOSTILE, 0.26, 0.28)
    data = dataclasses.replace(make_data(), histograms=histograms, notes=(note,))
    html = render_html(data)
    said = " ".join(Page(html).said.split())
    assert said.count("Characters of the captions · filter_text") == 1
    assert "Scores of the sources (cosine) · filter_text" in said
    assert "Shorter side of the images" not in said  # of an empty histogram there is nothing to draw
    assert f"is a no-op for {HOSTILE}" in said
    report = report_json(data)
    assert report["histograms"][1]["kept"] == [0, 0, 50, 25]
    assert report["notes"] == [str(note)]
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))  # charts keep theirs apart


def test_a_histogram_draws_its_counts() -> None:
    svg = histogram_chart("h", [0.1, 0.2, 0.3], [0, 10, 0, 0], [0, 5, 0, 20])
    heights = {}
    for side in ("kept", "dropped"):
        paths = re.findall(rf'<path d="([^"]*)"[^>]*fill: var\(--{side}\)', svg)
        heights[side] = []
        for path in paths:
            ys = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)]
            heights[side].append(max(ys) - min(ys))
    # bins 1 to 3, the empty one at the end left out; empty bars have no height
    unit = heights["kept"][0] / 10
    assert [round(height / unit) for height in heights["kept"]] == [10, 0, 0]
    assert [round(height / unit) for height in heights["dropped"]] == [5, 0, 20]
    assert ">0.2<" in svg
    with pytest.raises(ValueError, match="every bin is empty"):
        histogram_chart("h", [0.1], [0, 0], [0, 0])
