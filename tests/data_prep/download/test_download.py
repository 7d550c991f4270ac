"""A small demo corpus through the real stages: real img2dataset, real HTTP on loopback, every row counted."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
from PIL import Image

from data_prep.download.figures import CallFigures, FiguresFile
from data_prep.download.tally import FETCHED, OWN_HOST
from data_prep.formats.keys import with_key
from pipeline import catalog, runner
from pipeline.catalog import RunConfig
from pipeline.core.records import InputError, Manifest
from pipeline.core.run import Run, read_manifest, select
from pipeline.tools.why import explain

SETTINGS = {
    "run.processes": 1,
    "corpus.num_clean": 40,
    "corpus.num_evaluation": 12,
    "corpus.dirt": 0.08,
    "dedup.partitions": 2,
    "download.timeout_seconds": 5.0,
    "download.retries": 0,
    "shards.samples_per_shard": 32,
}
STAGES = ("corpus", "filter_text", "dedup", "download", "filter_image", "shards")
DROPPING = ("filter_text", "dedup", "download", "filter_image")
LIMIT_SECONDS = 60


def _load(folder: Path) -> tuple[Run, RunConfig]:
    return catalog.load(
        "demo", [f"run.folder={folder}", *(f"{key}={value}" for key, value in SETTINGS.items())]
    )


def _execute(run: Run) -> None:
    runner.execute(run, select(run, None, None, STAGES[-1]), redo=False)


FIGURES: list[CallFigures] = []  # as the download wrote them


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run, _ = _load(tmp_path_factory.mktemp("run") / "demo")
    write = FiguresFile.write

    def noted(file: FiguresFile, **options: bool) -> None:
        write(file, **options)
        FIGURES.append(CallFigures.from_json(json.loads(Path(file._path).read_text())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FiguresFile, "write", noted)
        _execute(run)
    return run


@pytest.fixture(scope="module")
def rows(finished: Run) -> pl.DataFrame:
    """Every row of the caption tables with its key and what was planted."""
    corpus = Path(finished.folder, "corpus")
    tables = pl.concat([pl.read_parquet(path) for path in sorted((corpus / "tables").glob("*.parquet"))])
    plan = pl.read_parquet(corpus / "planted.parquet")
    return with_key(
        tables.join(plan, on="SAMPLE_ID").lazy().with_columns(url="URL", caption="TEXT")
    ).collect()


def _manifest(run: Run, stage: str) -> Manifest:
    manifest = read_manifest(run, stage)
    assert manifest is not None
    return manifest


def _manifests(run: Run) -> dict[str, str]:
    return {stage: _manifest(run, stage).to_json() for stage in STAGES}


@pytest.mark.parametrize("stage", DROPPING)
def test_every_planted_class_is_counted(finished: Run, stage: str) -> None:
    planted = json.loads(Path(finished.folder, "corpus", "planted.json").read_text())
    expected = Counter[str]()
    for plan in planted.values():
        if plan["stage"] == stage:
            expected[plan["fate"]] += plan["count"]
    assert expected
    assert _manifest(finished, stage).dropped == dict(expected)


def test_rows_flow_from_stage_to_stage_without_loss(finished: Run, rows: pl.DataFrame) -> None:
    manifests = [_manifest(finished, stage) for stage in STAGES]
    assert manifests[0].num_kept == rows.height
    for before, after in itertools.pairwise(manifests):
        assert after.num_in == before.num_kept
    assert manifests[-1].num_kept == rows.filter(fate="kept").height


@pytest.mark.parametrize("stage", DROPPING)
def test_each_dropped_row_is_the_planted_one(finished: Run, rows: pl.DataFrame, stage: str) -> None:
    tables = sorted(Path(finished.folder, stage, "dropped").glob("*.parquet"))
    found = Counter(pl.concat([pl.read_parquet(path) for path in tables]).select("key", "reason").iter_rows())
    assert found == Counter(rows.filter(stage=stage).select("key", "fate").iter_rows())


def test_the_shards_hold_the_kept_rows_with_their_columns(finished: Run, rows: pl.DataFrame) -> None:
    sidecars = sorted(Path(finished.folder, "shards").glob("*.parquet"))
    table = pl.concat([pl.read_parquet(path) for path in sidecars]).sort("key")
    kept = rows.filter(fate="kept").sort("key")
    for ours, theirs in (("key", "key"), ("url", "URL"), ("caption_en", "caption_en")):
        assert table[ours].to_list() == kept[theirs].to_list()
    assert table["caption"].to_list() == [caption.strip() for caption in kept["TEXT"]]
    assert table["score"].to_list() == pytest.approx(kept["similarity"].to_list())
    upright = set(kept.select("WIDTH", "HEIGHT").iter_rows())
    assert set(table.select("width_px", "height_px").iter_rows()) <= upright


def test_special_pictures_have_their_expected_pixels(finished: Run, rows: pl.DataFrame) -> None:
    """Turned as EXIF says, CMYK and palettes converted, transparency on white, 16 bits as what they show."""
    corpus = Path(finished.folder, "corpus")
    expected = json.loads((corpus / "expected.json").read_text())
    keys = dict(rows.select("URL", "key").iter_rows())
    pictures = {}
    for path in Path(finished.folder, "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    pictures[member.name.removesuffix(".jpg")] = file.read()
    differences = {}
    for url, reference in expected.items():
        stored = Image.open(io.BytesIO(pictures[keys[url]]))
        assert stored.mode == "RGB"
        wanted = Image.open(corpus / reference).convert("RGB")
        if wanted.size != stored.size:  # reduced to [download] short_side_px
            wanted = wanted.resize(stored.size, Image.Resampling.LANCZOS)
        pixels = [np.asarray(image, np.int16) for image in (stored, wanted)]
        differences[url] = float(np.abs(pixels[0] - pixels[1]).mean())
    assert len(differences) >= 16 + 9
    assert {url: difference for url, difference in differences.items() if difference > 6} == {}


def test_why_tells_the_fate_of_a_row_of_each_class(finished: Run, rows: pl.DataFrame) -> None:
    _, config = _load(Path(finished.folder))
    for planted in rows["planted"].unique():
        row = rows.filter(planted=planted).row(0, named=True)
        for asked in (row["key"], row["URL"]):
            if not asked:
                continue
            lines = explain(finished, config.filter_text, asked)
            wanted = "kept: " if row["fate"] == "kept" else f"dropped by {row['stage']}: {row['fate']}"
            assert any(wanted in line for line in lines), (planted, lines)
    with pytest.raises(InputError, match="not in any caption table"):
        explain(finished, config.filter_text, "http://corpus.invalid/none.jpg")


def test_every_address_was_in_the_figures(finished: Run) -> None:
    manifest, figures = _manifest(finished, "download"), FIGURES[-1]
    assert figures.is_over
    assert figures.num_rows == figures.num_packed == figures.num_done == manifest.num_in
    reasons = sum(map(Counter, figures.hosts.values()), Counter[str]())
    assert reasons.total() == manifest.num_in
    assert figures.hosts[OWN_HOST][FETCHED] == reasons.pop(FETCHED) >= manifest.num_kept  # some are no images
    assert reasons.items() <= manifest.dropped.items()
    assert "http_404" in reasons


def test_nothing_of_the_download_is_left_behind(finished: Run) -> None:
    assert not list(Path(finished.folder, "download").glob("raw*"))
    assert runner.verify(finished, [finished.stage(name) for name in STAGES]) == []


@pytest.mark.slow
def test_a_killed_download_leaves_no_receipt_and_the_next_run_completes(
    finished: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(finished.folder, folder)
    for stage in DROPPING[2:] + STAGES[-1:]:
        shutil.rmtree(folder / stage)
    sets = [f"--set=run.folder={folder}", *(f"--set={key}={value}" for key, value in SETTINGS.items())]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "demo", "--to", "download", *sets],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # The hanging addresses hold the first shard back for a time-out: workers are at it when the kill comes.
    deadline = time.monotonic() + LIMIT_SECONDS
    while not list(folder.glob("download/raw*/shards/_tmp/*")) and not list(
        folder.glob("download/raw*/shards/*.tar")
    ):
        assert process.poll() is None, "the download ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    os.kill(process.pid, signal.SIGKILL)  # it alone: its children have to notice by themselves
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    assert not list(folder.glob("download/receipts/*"))
    run, _ = _load(folder)
    assert read_manifest(run, "download") is None
    _execute(run)
    assert _manifests(run) == _manifests(finished)
    assert not list(folder.glob("download/raw*"))
