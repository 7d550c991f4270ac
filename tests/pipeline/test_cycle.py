"""Train, score, refilter, train: both recipes through the command, small."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from pipeline.core import store

TRAINING = {
    "vocabulary.size": 600,
    **{f"{stage}.epochs": 1 for stage in ("english", "stage1", "stage2")},
    **{f"{stage}.global_batch": 32 for stage in ("english", "stage1", "stage2")},
}
FIRST = {"corpus.num_clean": 200, "corpus.num_evaluation": 24, "corpus.dirt": 0.05, **TRAINING}


def cnclip(folder: Path, command: str, recipe: str, sets: dict[str, object], *words: str) -> str:
    line = [
        sys.executable,
        "-m",
        "pipeline",
        command,
        recipe,
        *(f"--set={k}={v}" for k, v in sets.items()),
        *words,
    ]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_papers_cycle_runs(tmp_path: Path) -> None:
    cnclip(tmp_path, "run", "demo", FIRST)
    cnclip(tmp_path, "run", "demo_refiltered", TRAINING, "--to", "filter_score")
    folder = tmp_path / "runs" / "demo_refiltered"
    scores = pl.concat([pl.read_parquet(path) for path in (folder / "score" / "scores").glob("*.parquet")])
    assert scores["pair_score"].null_count() == 0
    # Another share: the scores stay, and more of the corpus goes.
    stamp = store.digest_tree(str(folder / "score" / "receipts"))
    sets = {**TRAINING, "filter_score.drop_share": 0.3}
    out = cnclip(tmp_path, "run", "demo_refiltered", sets, "--redo")
    assert "report: runs/demo_refiltered/report/report.html" in out
    assert store.digest_tree(str(folder / "score" / "receipts")) == stamp
    kept = json.loads((folder / "filter_score" / "manifest.json").read_text())["num_kept"]
    assert 0.65 * scores.height < kept < 0.9 * scores.height
    sidecars = pl.concat([pl.read_parquet(path) for path in (folder / "shards").glob("*.parquet")])
    assert sidecars.height == kept
    assert sidecars["pair_text_encoder"].n_unique() == 1
    report = json.loads((folder / "report" / "report.json").read_text())
    assert {item["name"] for item in report["histograms"]} == {"characters", "short_side_px", "pair_score"}
    assert set(report["evaluations"]) == {"unseen", "unseen/stage1"}
    assert (folder / "stage2" / "model.safetensors").exists()
