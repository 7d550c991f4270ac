"""The report: what it says, that nothing in it runs or asks the network, and its numbers as JSON."""

import dataclasses
import http.server
import json
import re
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import evaluate
from eval.datasets.cnclip_tsv import read_evaluation
from eval.metrics.bootstrap import Measured
from eval.metrics.recall import RetrievalScores
from eval.paper.comparison import Comparison, Line
from eval.paper.published import RetrievalProtocol
from eval.report.charts import histogram_chart
from eval.report.data import (
    ExampleGallery,
    ExampleRow,
    FunnelStep,
    Histogram,
    PlantedClass,
    RecallPoint,
    ReportData,
    RowCounts,
    StageFacts,
    Thumbnail,
    TrainingPoint,
)
from eval.report.files import headline, report_json, write_report
from eval.report.page import render_html
from eval.report.sources import make_gallery, read_training_metrics
from eval.report.stage import ReportConfig, comparisons
from eval.stages import EvaluationConfig
from pipeline.core.records import InputError, Manifest, Shard
from pipeline.core.stage import Context
from tests.helpers.chromium import CHROMIUM, QUIET
from tests.helpers.evaluation_files import small_evaluation

HOSTILE = "<script>document.title='owned'</script><img src=http://evil.invalid/x.png onerror=alert(1)>"


def scores(r1: float) -> RetrievalScores:
    return {
        "t2i": {"r1": r1, "r5": r1 + 10, "r10": r1 + 20},
        "i2t": {"r1": r1 / 2, "r5": r1 / 2 + 10, "r10": r1 / 2 + 20},
        "mean_recall": 33.25,
    }


def make_data() -> ReportData:
    """A small run with every section, and hostile text wherever text comes from a corpus."""
    steps = [("english", 0), ("english", 500), ("stage1", 0), ("stage1", 400), ("stage2", 0), ("stage2", 300)]
    image = Thumbnail(7, True, "image/png", b"\x89PNG not really")
    dropped = {"language": 20, HOSTILE: 5}
    return ReportData(
        title=f"Demo {HOSTILE}",
        summary=f"A run. {HOSTILE}",
        facts={"Model": "tiny-rn", HOSTILE: HOSTILE},
        final_stage="stage2",
        evaluations={"表情": scores(24.0), "表情/stage1": scores(15.5), HOSTILE: scores(50.0)},
        baselines={"表情": {"chance": scores(0.08), "pixel": scores(9.9)}},
        stages=(StageFacts("filter_text", f"Rules {HOSTILE}", 100, 75, dropped),),
        funnel=(
            FunnelStep(
                "filter_text",
                f"Rules {HOSTILE}",
                RowCounts(100, 75, dropped),
                {
                    "a": RowCounts(60, 55, {"language": 5}),
                    HOSTILE: RowCounts(40, 20, {"language": 15, HOSTILE: 5}),
                },
            ),
        ),
        training=tuple(TrainingPoint(stage, seen, 5 - seen / 200, 14.3, 1e-3) for stage, seen in steps),
        recall=tuple(
            RecallPoint(stage, seen, name, scores(seen / 20))
            for name in ("表情", HOSTILE)
            for stage, seen in steps[2:]
        ),
        galleries=(
            ExampleGallery(
                HOSTILE,
                hits=(ExampleRow(HOSTILE, 1, (image,) * 5, None),),
                misses=(ExampleRow(f"图 {HOSTILE}", None, (image,) * 5, image),),
            ),
        ),
        planted=(
            PlantedClass("english", "filter_text", "language", 20, 20),
            PlantedClass(HOSTILE, "download", "http_404", 5, 4),
        ),
        comparisons=(
            Comparison(
                4,
                f"COCO-CN {HOSTILE}",
                "zero-shot",
                "RN50",
                "CN-CLIP RN50",
                (Line("text-to-image R@1", Measured(50.0, 48.25, 51.75), 48.1), Line(HOSTILE, None, None)),
                ("Wukong",),
                (HOSTILE,),
            ),
        ),
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_corpus_text_is_text_and_nothing_is_fetched() -> None:
    html = render_html(make_data())
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "form")]
    assert page.text.count(HOSTILE) > 10
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"url\((?!#)|@import", html)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy
    assert len(html.encode()) < 3_000_000


def test_page_is_accessible() -> None:
    page = Page(render_html(make_data()))
    assert page.tags[0] == ("html", {"lang": "en"})
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 3 + 2 * 2
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_sections_say_what_the_data_says() -> None:
    text = " ".join(Page(render_html(make_data())).text.split())
    assert "24.0 % text to image, R@1" in text
    assert "chance 0.08 10.1 20.1" in text
    assert "1 of 2 classes did not meet their written fate." in text
    assert "no right image among the first 10" in text
    assert "text-to-image R@1 50.0 48.2 … 51.8 48.1 +1.9" in text
    assert "Table 4, COCO-CN" in text


def test_same_data_same_bytes() -> None:
    assert render_html(make_data()) == render_html(make_data())


def test_a_run_without_planted_dirt_curves_or_images_has_no_such_sections() -> None:
    data = dataclasses.replace(
        make_data(), planted=(), training=(), recall=(), galleries=(), funnel=(), baselines={}, comparisons=()
    )
    ids = {attributes.get("id") for _, attributes in Page(render_html(data)).tags}
    assert ids & {"planted", "training", "gallery", "funnel", "paper"} == set()
    assert {"scores", "stages", "facts"} <= ids


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


def test_gallery_shows_hits_and_misses_with_their_answers(tmp_path: Path) -> None:
    evaluation = read_evaluation(small_evaluation(tmp_path, count=20), "small")
    ids = evaluation.image_ids.tolist()
    lines = []
    for row in range(20):
        others = [image_id for image_id in ids if image_id not in (100 + row, 119)]
        place = {0: 0, 1: 2, 2: 7}.get(row % 4)  # first; among the first five; later; else not at all
        found = others[:10] if place is None else [*others[:place], 100 + row, *others[place:9]]
        lines.append(json.dumps({"text_id": row, "image_ids": found}))
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    gallery = make_gallery(evaluation, str(tmp_path / "p.jsonl"), num_rows=3)
    assert [row.query for row in gallery.hits] == ["第零张图片", "第8张图片", "第16张图片"]
    assert all(row.results[0].is_right and row.answer is None for row in gallery.hits)
    assert len(gallery.misses) == 3
    assert {row.rank for row in gallery.misses} <= {8, None}
    assert all(row.answer and not any(p.is_right for p in row.results) for row in gallery.misses)
    assert all(image.data[8:12] == b"WEBP" for row in gallery.hits for image in row.results)


def test_training_metrics_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    step = {"step": 3, "samples_seen": 96, "loss": 2.5, "temperature": 14.0, "learning_rate": 0.001}
    validation = {"step": 3, "samples_seen": 96, "evaluation": "e", "recall": scores(5)}
    path = tmp_path / "metrics.jsonl"
    left_out = {"step": 4, "samples_seen": 128, "skipped": True}  # its loss was not finite
    path.write_text("".join(json.dumps(line) + "\n" for line in (step, validation, left_out)))
    training, recall = read_training_metrics(str(path), "stage1")
    assert training == [TrainingPoint("stage1", 96, 2.5, 14.0, 0.001)]
    assert recall == [RecallPoint("stage1", 96, "e", scores(5))]
    path.write_text(json.dumps(step) + "\n{}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: neither"):
        read_training_metrics(str(path), "stage1")


def test_a_set_of_the_paper_stands_beside_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features under which each text finds its image, but for text 0, which has two."""
    shards = []
    for name in ("coco-cn-test", "mine"):
        small_evaluation(tmp_path / "corpus" / name, name, count=14)
        for side in ("img", "text"):
            folder = tmp_path / "embed" / name / "stage2" / f"{side}_emb"
            folder.mkdir(parents=True)
            np.save(folder / f"{side}_emb_0.npy", np.eye(14, 16, dtype=np.float32))
        shards += [Shard(f"{name}/{name}{end}", 14, 1, "") for end in ("_imgs.tsv", "_texts.jsonl")]
    extra = {"0": {"evaluations": {"coco-cn-test": "coco-cn-test", "mine": "mine"}}}
    corpus = Manifest("corpus", 1, "", "", {}, tuple(shards), 0, 0, {}, extra)
    context = Context(str(tmp_path), "report", 0, {"corpus": corpus})
    score = EvaluationConfig(stages=("stage1", "stage2"), vocabulary=None, context_length=52)
    config = ReportConfig(score=score, model="RN50", training_stages=(), titles={})

    (small,) = comparisons(config, context)
    assert (small.number, small.lines[0].paper) == (None, None)
    assert "coco-cn-test: 14 images, but the protocol has 1000: not comparable" in small.notes[0]

    pinned = RetrievalProtocol(id="coco-cn-test", title="x", images=14, texts=14)
    monkeypatch.setattr(evaluate, "retrieval_protocol", lambda name: pinned)
    (table,) = comparisons(config, context)
    assert (table.number, table.paper_model) == (4, "CN-CLIP RN50")
    assert table.lines[0].ours is not None
    assert table.lines[0].ours.value == pytest.approx(100.0)
    assert table.lines[0].paper == 48.1

    (tmp_path / "embed" / "coco-cn-test" / "finetune").symlink_to(
        tmp_path / "embed" / "coco-cn-test" / "stage2"
    )
    score = EvaluationConfig(stages=("stage2", "finetune"), vocabulary=None, context_length=52)
    (table, *_) = comparisons(dataclasses.replace(config, score=score), context)
    assert (table.setup, table.lines[0].paper) == ("finetuned", 66.8)


# What Chromium asks for itself, whatever it is told: updates, the time, accounts.
OF_THE_BROWSER = re.compile(r"(//| )[\w.-]*\.(google|googleapis|gstatic|gvt1)\.com[:/]")


def open_in_browser(folder: Path, html: str) -> tuple[list[str], list[str], str]:
    """Console lines, requests and the final DOM of a page opened in headless Chromium.

    The page comes from a loopback server that is also the browser's proxy, so every request is seen.
    """
    (folder / "page.html").write_text(html, encoding="utf-8")
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_request(self, code: object = "-", size: object = "-") -> None:
            requests.append(f"{self.command} {self.path}")

        def log_error(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *QUIET, "--disable-dev-shm-usage",
        f"--proxy-server={address}", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
        "--virtual-time-budget=2000", "--dump-dom", f"http://{address}/page.html",
    ]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
    of_the_page = [line for line in requests if not OF_THE_BROWSER.search(line)]
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return console, of_the_page, result.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_opens_in_a_browser_without_errors_or_requests(tmp_path: Path) -> None:
    console, requests, dom = open_in_browser(tmp_path, render_html(make_data()))
    assert console == []
    assert requests == ["GET /page.html"]
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    assert title[1].startswith("Demo &lt;script&gt;")
    page = Page(dom)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert page.text.count(HOSTILE) > 10


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_browser_check_notices_scripts_and_requests(tmp_path: Path) -> None:
    console, requests, dom = open_in_browser(
        tmp_path,
        "<script>document.title='owned';console.error('seen')</script><img src=http://evil.invalid/x.png>",
    )
    assert "GET http://evil.invalid/x.png" in requests
    assert "<title>owned</title>" in dom
    assert any("seen" in line for line in console)


def test_histograms_and_notes_are_shown() -> None:
    histograms = (
        Histogram("characters", "filter_text", range(1, 101), [0] * 5 + [40, 30, 5] + [0] * 93, [9] * 101),
        Histogram("score", "filter_text", [0.1, 0.2, 0.3], [0, 0, 50, 25], [3, 2, 0, 0]),
        Histogram("short_side_px", "filter_image", [16, 32], [0, 0, 0], [0, 0, 0]),  # nothing came in
    )
    data = dataclasses.replace(make_data(), histograms=histograms, notes=(f"a no-op for {HOSTILE}",))
    html = render_html(data)
    assert html.count("<figcaption>Characters of the captions, filter_text</figcaption>") == 1
    assert "Scores of the sources (cosine), filter_text" in html
    assert "Shorter side of the images" not in html  # of an empty histogram there is nothing to draw
    assert "Note: a no-op for &lt;script&gt;" in html
    report = report_json(data)
    assert report["histograms"][1]["kept"] == [0, 0, 50, 25]
    assert report["notes"] == [f"a no-op for {HOSTILE}"]
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))  # charts keep theirs apart


def test_a_histogram_draws_its_counts() -> None:
    svg = histogram_chart("h", "Scores", [0.1, 0.2, 0.3], [0, 10, 0, 0], [0, 5, 0, 20])
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
        histogram_chart("h", "Scores", [0.1], [0, 0], [0, 0])
