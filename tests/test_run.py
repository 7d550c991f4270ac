"""The whole pipeline through its command: a small demo corpus, real downloads, real ranks, and kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tests.helpers.own_corpus import main_here

SMALL = {
    "corpus.num_clean": 200,
    "corpus.num_evaluation": 24,
    "corpus.dirt": 0.1,
    "dedup.partitions": 2,
    "download.timeout_seconds": 5.0,
    "download.retries": 0,
    "shards.samples_per_shard": 64,
    **{f"{stage}.epochs": 1 for stage in ("english", "stage1", "stage2")},
    **{f"{stage}.global_batch": 32 for stage in ("english", "stage1", "stage2")},
    **{f"{stage}.ranks": 1 for stage in ("english", "stage1")},  # a rank imports for seconds; stage2 has two
    **{f"{stage}.save_every_steps": 4 for stage in ("english", "stage1", "stage2")},
    **{f"{stage}.validate_every_steps": 6 for stage in ("stage1", "stage2")},
}
STAGES = [
    "corpus", "filter_text", "dedup", "download", "filter_image", "shards", "lock", "vocabulary", "english",
    "stage1", "stage2", "embed", "index", "retrieval", "baseline", "report",
]  # fmt: skip
LIMIT_SECONDS = 900  # far more than a run takes by itself; the machine may be busy


def command(folder: Path, *words: str) -> list[str]:
    sets = [f"--set=run.folder={folder}", *(f"--set={key}={value}" for key, value in SMALL.items())]
    return [sys.executable, "-m", "pipeline", words[0], "demo", *sets, *words[1:]]


def cnclip(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *words), capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )


def cnclip_here(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has imported everything already."""
    return main_here(*command(folder, *words)[3:])


def manifests(folder: Path) -> dict[str, str]:
    return {stage: (folder / stage / "manifest.json").read_text() for stage in STAGES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    done = cnclip(folder, "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"report: {folder}/report/report.html" in done.stdout
    assert "unseen" in done.stdout
    return folder


def test_report_numbers(finished: Path) -> None:
    report = json.loads((finished / "report" / "report.json").read_text())
    assert set(report["evaluations"]) == {"unseen", "unseen/stage1"}
    for scores in report["evaluations"].values():
        recalls = [scores[side][k] for side in ("t2i", "i2t") for k in ("r1", "r5", "r10")]
        assert all(0 <= value <= 100 for value in recalls)
        assert scores["mean_recall"] == pytest.approx(sum(recalls) / 6)
    assert set(report["baselines"]["unseen"]) == {"pixel", "chance"}
    for step in report["stages"]:
        assert step["in"] == step["kept"] + sum(step["dropped"].values())


def test_every_planted_row_is_counted(finished: Path) -> None:
    planted = json.loads((finished / "corpus" / "planted.json").read_text())
    report = json.loads((finished / "report" / "report.json").read_text())
    for step in report["funnel"]:
        expected: Counter[str] = Counter()
        for item in planted.values():
            if item["stage"] == step["stage"] and item["count"]:
                expected[item["fate"]] += item["count"]
        assert step["dropped"] == dict(expected), step["stage"]


def test_predictions_are_in_the_official_form(finished: Path) -> None:
    path = finished / "retrieval" / "unseen" / "stage2" / "unseen.predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == SMALL["corpus.num_evaluation"]
    assert all(len(set(row["image_ids"])) == 10 for row in rows)


def test_second_run_does_nothing(finished: Path) -> None:
    before = manifests(finished)
    started = time.monotonic()
    done = cnclip_here(finished, "run")
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert time.monotonic() - started < 30
    assert manifests(finished) == before


def test_changed_setting_is_stale_and_not_redone(finished: Path) -> None:
    before = manifests(finished)
    plan = cnclip_here(finished, "plan", "--set=filter_text.min_score=0.3")
    assert "stale (its configuration changed: min_score " in plan.stdout
    done = cnclip_here(finished, "run", "--set=filter_text.min_score=0.3")
    assert done.returncode == 2
    assert "filter_text is stale" in done.stderr
    assert "--redo" in done.stderr
    assert manifests(finished) == before


def test_why(finished: Path) -> None:
    dropped = pl.read_parquet(finished / "corpus" / "planted.parquet")
    tables = pl.concat([pl.read_parquet(path) for path in (finished / "corpus" / "tables").glob("*.parquet")])
    rows = tables.join(dropped, on="SAMPLE_ID")
    for fate, words in (
        ("http_404", "dropped by download: http_404"),
        ("too_long", "characters; 5 to 50 stay"),
        ("blacklist:advertising", "(the word "),
        ("evaluation_image", "dropped by filter_image: evaluation_image"),
        ("kept", "kept: "),
    ):
        url = rows.filter(pl.col("fate") == fate, pl.col("planted") != "duplicate")["URL"][0]
        assert words in cnclip_here(finished, "why", url).stdout
    unknown = cnclip_here(finished, "why", "http://nowhere.invalid/x.jpg")
    assert unknown.returncode == 1
    assert "not in any caption table" in unknown.stderr


def run_and_kill(folder: Path, moment: Callable[[], bool]) -> bool:
    """Start a run, SIGKILL its whole process group at `moment`; True where it had ended before."""
    with open(folder.parent / "killed.log", "ab") as log:
        process = subprocess.Popen(command(folder, "run"), stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and not moment():
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.02)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not ended or process.returncode == 0, (folder.parent / "killed.log").read_text()[-3000:]
    return ended


def finish_and_compare(folder: Path, finished: Path) -> None:
    done = cnclip(folder, "run")
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = manifests(folder), manifests(finished)
    for stage in STAGES:
        assert found[stage] == expected[stage], stage
    assert (folder / "stage2" / "model.safetensors").read_bytes() == (
        finished / "stage2" / "model.safetensors"
    ).read_bytes()
    assert cnclip(folder, "verify").returncode == 0


@pytest.mark.slow
def test_killed_while_training_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(finished, folder)
    for stage in STAGES[STAGES.index("stage1") :]:
        shutil.rmtree(folder / stage)
    run_and_kill(folder, lambda: any((folder / "stage1" / "checkpoints").glob("*/*")))
    assert not (folder / "stage1" / "manifest.json").exists()
    finish_and_compare(folder, finished)


@pytest.mark.slow
def test_killed_while_downloading_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    run_and_kill(folder, lambda: (folder / "download" / "img2dataset.log").exists())
    assert not (folder / "download" / "manifest.json").exists()
    finish_and_compare(folder, finished)


@pytest.mark.slow
def test_killed_at_every_stage_boundary_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    for stage in STAGES[:-1]:
        assert not run_and_kill(folder, (folder / stage / "manifest.json").exists), "it ended before the kill"
    finish_and_compare(folder, finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_gives_the_same_bytes(seed: int, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    draw = random.Random(seed)
    kills = 0
    while kills < 6:
        end = time.monotonic() + draw.uniform(0.5, 25.0)
        if run_and_kill(folder, lambda end=end: time.monotonic() > end):
            break
        kills += 1
    assert kills > 0
    finish_and_compare(folder, finished)


@pytest.mark.slow
def test_ray_gives_the_same_shards(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is in the extra `ray`")
    folder = tmp_path / "demo"
    done = cnclip(folder, "run", "--set=run.executor=ray", "--to", "shards")
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in STAGES[: STAGES.index("shards") + 1]:
        assert (folder / stage / "manifest.json").read_text() == manifests(finished)[stage]
