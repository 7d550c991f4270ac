"""`cnclip report`: finished and unfinished runs, their samples and drops, and the comparison of two."""

import dataclasses
import json
import re
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from eval.report import dropped as dropped_module
from eval.report import lookup as lookup_module
from eval.report import samples as samples_module
from eval.report.compare import count_pairs, differing_settings, score_pairs
from eval.report.data import ReportData
from eval.report.page import render_html
from eval.report.run_page import read_run, write_run_page
from eval.report.samples import project
from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core.records import InputError
from pipeline.core.run import make_context, read_manifest
from pipeline.core.stage import Context
from tests.helpers.evaluation_files import small_evaluation
from tests.helpers.report_page import Page

ARCHIVE = Path(__file__).parents[2] / "pipeline" / "data" / "finished_run.tar.xz"
RECIPE = "old_run/run.toml"
TABLE = """url,caption
http://a.cn/1.jpg,一只黑色的猫
http://a.cn/1.jpg,一只黑色的猫
http://a.cn/2.jpg,猫
not an address,一只白色的狗
"""
RUN = """
[run]
folder = "{folder}/run"
processes = 1
[corpus]
kind = "tables"
tables = [{{ path = "{folder}/table.csv", name = "mine" }}]
[model]
name = "tiny-rn"
[[evaluation]]
name = "valid"
folder = "{folder}"
[stage1]
epochs = 1
global_batch = 4
lanes = 2
[dedup]
partitions = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over 122 rows with every stage, made by an earlier release."""
    folder = tmp_path_factory.mktemp("finished")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    found = folder / "old_run" / "run" / "find_copies" / "manifest.json"
    for stage in ("gather_hashes", "merge_copies"):  # which a later release put before and after it
        (folder / "old_run" / "run" / stage).mkdir()
        manifest = json.loads(found.read_text(encoding="utf-8")) | {"stage": stage}
        manifest["shards"] = [manifest["shards"][0] | {"path": "copies/00000.parquet"}]
        (folder / "old_run" / "run" / stage / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> ReportData:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(samples_module, "WALL", 10)
        patch.setattr(samples_module, "MAP", 12)
        return read_run(load(RECIPE)[0])


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The recipe of a run that is done up to `dedup`."""
    (tmp_path / "table.csv").write_text(TABLE)
    small_evaluation(tmp_path, "valid")
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path))
    assert main(["run", str(tmp_path / "run.toml"), "--to", "dedup"]) == 0
    return tmp_path / "run.toml"


def test_a_finished_run_has_name_date_samples_and_map(finished: ReportData) -> None:
    assert finished.live is not None
    assert finished.live.name == "run"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", finished.live.date)
    assert finished.facts["folder"] == "old_run/run"
    assert len(finished.samples) == 10
    assert all(sample.caption and sample.data and sample.data[8:12] == b"WEBP" for sample in finished.samples)
    galleries = [gallery for gallery in finished.galleries if gallery.image_hits or gallery.image_misses]
    assert galleries


def test_the_stage_writes_equal_bytes_wherever_the_run_lies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "MAP", 6)
    written = []
    for place in (folder, tmp_path / "elsewhere"):
        if not place.exists():
            shutil.copytree(folder, place)
        monkeypatch.chdir(place)
        run, _ = load(RECIPE)
        stage = run.stage("report")
        context = make_context(run, stage)
        assert context is not None
        assert stage.run is not None
        (task,) = stage.plan(stage.config, context)
        stage.run(stage.config, dataclasses.replace(context, stage="written"), task, lambda *_: None)
        files = sorted((place / "old_run" / "run" / "written").iterdir())
        assert [path.name for path in files] == ["headline.txt", "report.html", "report.json"]
        written.append([path.read_bytes() for path in files])
    assert written[0] == written[1]
    assert b"old_run" not in written[0][1]
    assert len(written[0][1]) < 3_000_000


def test_what_was_removed_is_left_out_and_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "gone")
    monkeypatch.chdir(tmp_path / "gone")
    for path in Path("old_run/run/shards").glob("*.tar"):
        path.unlink()
    shutil.rmtree("old_run/run/corpus/evaluation")
    data = read_run(load(RECIPE)[0])
    assert (data.samples, data.galleries, data.corpus_map) == ((), (), None)
    assert any("unseen_imgs.tsv: no such file" in reason for reason in data.missing)
    assert data.evaluations
    assert data.dropped
    assert "Something is left out: " in Page(render_html(data)).said


def test_the_map_is_bounded(finished: ReportData) -> None:
    found = finished.corpus_map
    assert found is not None
    assert len(found.points) == 12
    assert all(0 <= point.left <= 1 and 0 <= point.top <= 1 for point in found.points)
    assert all(point.example.data and len(point.example.data) < 4096 for point in found.points)
    assert 0 < found.variance_share <= 1


def test_every_reason_has_examples_with_what_was_dropped(finished: ReportData) -> None:
    by_reason = {(rule.stage, rule.reason): rule for rule in finished.dropped}
    steps = {(step.stage, reason) for step in finished.funnel for reason in step.total.dropped}
    assert {*by_reason} == steps
    assert all(rule.examples for rule in finished.dropped), [
        key for key, rule in by_reason.items() if not rule.examples
    ]
    assert all(len(rule.examples) <= min(rule.total, dropped_module.EXAMPLES) for rule in finished.dropped)
    short = by_reason["filter_text", "too_short"].examples
    assert all(len(example.caption) < 5 for example in short)
    words = [example.detail for example in by_reason["filter_text", "blacklist:advertising"].examples]
    assert all(words)
    judged = [rule for rule in finished.dropped if rule.stage in ("filter_image", "dedup_image")]
    assert judged
    assert all(example.data and example.url for rule in judged for example in rule.examples)
    assert by_reason["download", "http_404"].examples[0].detail == "HTTP 404"


def test_of_tables_only_those_of_the_keys_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run, _ = load(RECIPE)
    data = read_run(run, with_images=False)
    assert data.samples == data.dropped == data.copies == ()
    read = []
    scan = lookup_module.pl.scan_parquet
    monkeypatch.setattr(lookup_module.pl, "scan_parquet", lambda path: read.append(path) or scan(path))
    manifests = {stage.name: read_manifest(run, stage.name) for stage in run.stages}
    context = Context(run.folder, "report", 0, {name: item for name, item in manifests.items() if item})
    shard = context.shards_of("shards", ".parquet")[0]
    key = scan(shard.path).select("key").collect()["key"][0]
    with lookup_module.RowLookup(context) as lookup:
        row = lookup.find("filter_image", [key], ("caption",))[key]
        assert lookup.small(row)
    assert row["caption"]
    assert len(read) == 1
    assert len([one for one in manifests["filter_image"].shards if one.path.startswith("kept/")]) > 1  # type: ignore[union-attr]


def test_an_unfinished_run_shows_what_there_is(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(begun)]) == 0
    path = begun.parent / "run" / "report.html"
    assert f"report: {path}" in capsys.readouterr().out
    page = Page(path.read_text(encoding="utf-8"))
    said = " ".join(page.said.split())
    assert "Not all of this run is finished and up to date: 3 of" in said
    assert "too_short caption too short" in said
    assert "filter_text 4 2" in re.sub(r" captions and addresses are judged ✓ done", "", said)
    assert "duplicate same address and caption again dedup · 1 of 1 一只黑色的猫 http://a.cn/1.jpg" in said
    assert {a.get("id") for _, a in page.tags} & {"scores", "map", "samples", "training", "gallery"} == set()
    chinese = Page(path.read_text(encoding="utf-8"), "zh").said
    assert "待运行" in chinese
    report = begun.parent / "run" / "report"
    assert not report.exists()  # the stage's own files are only the stage's


def test_a_stage_that_is_half_done_counts_so_far(begun: Path) -> None:
    folder = begun.parent / "run" / "dedup"
    (folder / "manifest.json").unlink()
    next(iter(sorted((folder / "receipts").glob("*.json")))).unlink()
    data = read_run(load(str(begun))[0])
    assert data.live is not None
    state = data.live.states["dedup"]
    assert (state.state, state.tasks_done, state.num_tasks) == ("to do", 1, 2)
    assert [step.stage for step in data.funnel] == ["filter_text", "dedup"]
    assert data.funnel[1].total.num_in < 3


def test_a_training_that_runs_shows_its_curve(begun: Path) -> None:
    stage = begun.parent / "run" / "stage1"
    stage.mkdir()
    steps = [
        {"step": n, "samples_seen": 4 * n, "loss": 3 / n, "temperature": 14, "learning_rate": 1e-3}
        for n in (1, 2, 3)
    ]
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    (stage / "metrics.jsonl").write_text(lines + '{"step": 4, "sam')
    (stage / "log.jsonl").write_text(
        '{"time": 1767323045.5, "step": 1}\n{"time": 1767330000.0, "step": 3}\n{"ti'
    )
    data = read_run(load(str(begun))[0], refresh_seconds=5)
    assert [point.loss for point in data.training] == [3.0, 1.5, 1.0]
    assert data.live is not None
    assert (data.live.date, data.live.refresh_seconds) == ("2026-01-02", 5)
    assert data.facts["ended"] == "2026-01-02 05:00 UTC"


def test_a_watched_run_is_written_until_it_is_stopped(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    slept = []

    def sleep(seconds: float) -> None:
        assert f'<meta http-equiv="refresh" content="{seconds}">' in path.read_text(encoding="utf-8")
        path.unlink()
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["report", str(begun), "--output", str(path), "--watch", "--every", "7"]) == 130
    assert slept == [7, 7]
    assert "(Ctrl-C stops)" in capsys.readouterr().err
    assert main(["report", str(begun), "--watch", "--every", "0"]) == 2


def test_a_run_that_has_not_begun_is_named(
    tmp_path: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(begun), "--set", f'run.folder="{tmp_path}/none"']) == 1
    assert f"{tmp_path}/none: this run has not begun" in capsys.readouterr().err
    with pytest.raises(InputError, match="has not begun"):
        write_run_page(load(str(begun), [f'run.folder="{tmp_path}/none"'])[0], str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


def test_two_runs_are_compared(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = [f'run.folder="{tmp_path}/laxer"', "filter_text.min_characters=1"]
    sets = [word for one in other for word in ("--set", one)]
    assert main(["run", str(begun), "--to", "dedup", *sets]) == 0
    (run_a, _), (run_b, _) = load(str(begun)), load(str(begun), other)
    assert [(item.name, item.a, item.b) for item in differing_settings(run_a, run_b)] == [
        ("filter_text.min_characters", "5", "1")
    ]
    counts = {(item.stage, item.what): item for item in count_pairs(read_run(run_a), read_run(run_b))}
    assert counts["filter_text", "too_short"].difference == -1
    assert counts["filter_text", "kept"].difference == 1
    capsys.readouterr()
    # A folder that holds its settings is a run too; other folders are not.
    (tmp_path / "laxer" / "run.resolved.toml").write_text(
        RUN.format(folder=tmp_path) + "[filter_text]\nmin_characters = 1\n"
    )
    assert main(["report", str(begun), str(tmp_path / "laxer")]) == 0
    path = tmp_path / "laxer" / "compared_with_run.html"
    assert f"report: {path}" in capsys.readouterr().out
    page = Page(path.read_text(encoding="utf-8"))
    said = " ".join(page.said.split())
    assert "run and laxer" in said
    assert "filter_text.min_characters 5 1" in said
    assert "too_short caption too short 1 – -1" in said
    assert "No evaluation set was measured in both runs yet." in said
    assert main(["report", str(begun), str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no run.resolved.toml" in capsys.readouterr().err
    assert main(["report", str(begun), str(tmp_path / "laxer"), "--watch"]) == 2
    assert "--watch needs one run" in capsys.readouterr().err


def test_scores_of_two_runs_are_subtracted(finished: ReportData) -> None:
    pairs = score_pairs(finished, finished)
    assert [pair.evaluation for pair in pairs] == ["unseen"]
    assert pairs[0].differences == [0.0] * 7


def test_directions_of_the_map_do_not_depend_on_order_or_sign() -> None:
    rng = np.random.default_rng(0)
    feature_ND = (rng.normal(size=(50, 8)) * [5, 3, 1, 1, 1, 1, 1, 1]).astype(np.float32)
    place_N2, share = project(feature_ND)
    assert (place_N2.min(axis=0).tolist(), place_N2.max(axis=0).tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert 0.5 < share < 1
    backwards_N2, _ = project(feature_ND[::-1])
    assert np.abs(backwards_N2[::-1] - place_N2).max() <= 0.001
    assert abs(np.corrcoef(place_N2[:, 0], feature_ND[:, 0])[0, 1]) > 0.9
    equal_N2, share = project(np.ones((5, 8), np.float32))
    assert (equal_N2.tolist(), share) == ([[0.0, 0.0]] * 5, 0.0)
