import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_processes import run_ranks
from train_jobs import CONFIG, make_job, train_rank

from pipeline.records import ConfigError
from training.config import TrainJob

LOCKED: dict[str, Any] = {"lock_image": True, "model": "small-rn"}


def train_without_dropout(job: TrainJob) -> None:
    train_rank(job, dropout=0.0)


def losses(job: TrainJob) -> list[float]:
    lines = (Path(job.folder) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def files_of(job: TrainJob) -> dict[str, bytes]:
    folder = Path(job.shards[0].path).parent / "features"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_as_many_views_as_epochs_train_as_live_does(tmp_path: Path) -> None:
    live = make_job(tmp_path, "live", **LOCKED)
    cached = make_job(tmp_path, "cached", cached_views=2, **LOCKED)
    run_ranks(train_without_dropout, 1, live)
    run_ranks(train_without_dropout, 1, cached)
    assert len(losses(live)) == 6
    np.testing.assert_allclose(losses(cached), losses(live), atol=2e-3)  # float16 features, scale of 14

    # Two ranks make the same files, and train the same from them, also in micro-batches.
    made = files_of(cached)
    assert len(made) == len(cached.shards)
    for name in made:
        (tmp_path / "shards" / "features" / name).unlink()
    again = make_job(tmp_path, "again", cached_views=2, ranks=2, micro_batch=3, **LOCKED)
    run_ranks(train_without_dropout, 2, again)
    for name, data in files_of(again).items():
        ours, theirs = (np.frombuffer(each[128:], np.float16) for each in (data, made[name]))
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    np.testing.assert_allclose(losses(again), losses(cached), atol=1e-3)


def test_files_that_are_there_are_used_and_others_stay_apart(tmp_path: Path) -> None:
    first = make_job(tmp_path, "first", cached_views=1, **LOCKED)
    run_ranks(train_without_dropout, 1, first)
    folder = tmp_path / "shards" / "features"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = make_job(tmp_path, "again", cached_views=1, weight_decay=0.5, **LOCKED)
    run_ranks(train_without_dropout, 1, again)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    other_transform = dataclasses.replace(first.config.augment, crop_area=(0.5, 1.0))
    for number, changes in enumerate(
        ({"augment": other_transform}, {"cached_views": 2}, {"seed": 8}), start=1
    ):
        seed = changes.pop("seed", first.seed)  # of new weights, and of the views
        job = make_job(tmp_path, f"other{number}", **{"cached_views": 1, **LOCKED, **changes})
        run_ranks(train_without_dropout, 1, dataclasses.replace(job, seed=seed))
        assert len(list(folder.iterdir())) == (number + 1) * len(before)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    job = make_job(tmp_path, "run", cached_views=1, epochs=1, **LOCKED)
    run_ranks(train_without_dropout, 1, job)
    path = min((tmp_path / "shards" / "features").iterdir())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        np.save(path, np.zeros((3, 1, 32), np.float16))
    again = make_job(tmp_path, "again", cached_views=1, epochs=3, **LOCKED)
    with pytest.raises(
        AssertionError, match=rf"InputError: .*{path.name}.*remove the file: it is made again"
    ):
        run_ranks(train_without_dropout, 1, again)
    path.unlink()
    run_ranks(train_without_dropout, 1, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cached_views": 1}, r"cached_views = 1: .* set lock_image = true or cached_views = 0"),
        ({"cached_views": -1, "lock_image": True}, "must not be negative"),
        ({"micro_batch": 0}, "micro_batch = 0: must be above 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **change).check("stage1")
