import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.core.records import ConfigError, InputError, Stopped
from tests.helpers.rank_processes import run_ranks
from tests.helpers.shard_files import write_shards
from tests.helpers.train_jobs import build_config, make_job, train_rank
from training.config.job import TrainJob
from training.data.feature_cache import FeatureCache

LOCKED: dict[str, Any] = {"lock_image": True, "model": "small-rn"}


def train_without_dropout(job: TrainJob) -> None:
    train_rank(job, dropout=0.0)


def losses(job: TrainJob) -> list[float]:
    lines = (Path(job.folder) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def features_of(job: TrainJob) -> dict[str, npt.NDArray[np.float16]]:
    folder = Path(job.shards[0].path).parent / "features"
    paths = sorted(folder.iterdir())
    return {path.name: np.load(path)["feature"] for path in paths}


def read_one(cache: FeatureCache, row: int, epoch: int) -> npt.NDArray[np.float16]:
    return cache.read(np.array([0]), np.array([row]), np.array([epoch]))[0]


def test_as_many_views_as_epochs_train_as_live_does(tmp_path: Path) -> None:
    live = make_job(tmp_path, "live", **LOCKED)
    cached = make_job(tmp_path, "cached", cached_views=2, **LOCKED)
    run_ranks(train_without_dropout, 1, live)
    run_ranks(train_without_dropout, 1, cached)
    assert len(losses(live)) == 6
    np.testing.assert_allclose(losses(cached), losses(live), atol=2e-3)  # float16 features, scale of 14

    # Two ranks make the same files, and train the same from them, also in micro-batches.
    made = features_of(cached)
    assert len(made) == len(cached.shards)
    for name in made:
        (tmp_path / "shards" / "features" / name).unlink()
    again = make_job(tmp_path, "again", cached_views=2, ranks=2, micro_batch=3, **LOCKED)
    run_ranks(train_without_dropout, 2, again)
    for name, feature_KCSD in features_of(again).items():
        np.testing.assert_allclose(feature_KCSD, made[name], atol=1e-3)
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


def train_and_stop_after_a_shard(job: TrainJob) -> None:
    """Rank 0 gets the signal to stop after writing its first shard's features."""
    write = FeatureCache.write

    def told(self: FeatureCache, shard: int, feature_KND: npt.NDArray[np.float16]) -> None:
        write(self, shard, feature_KND)
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureCache, "write", told)
        with pytest.raises(Stopped, match=r"by SIGTERM, 3 of 4 shards have features"):
            train_without_dropout(job)


def test_it_stops_between_shards_and_makes_the_others_later(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"sizes": (20, 20, 9, 5), "cached_views": 2, "ranks": 2, **LOCKED}
    job = make_job(tmp_path, "run", **changes)
    run_ranks(train_and_stop_after_a_shard, 2, job)  # of shards 0 and 2, and 1 and 3
    folder = tmp_path / "shards" / "features"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 3
    run_ranks(train_without_dropout, 2, job)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(after) == 4
    assert after.items() > before.items()


@pytest.mark.parametrize("damage", ["cut", pytest.param("other", marks=pytest.mark.slow)])
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
        AssertionError, match=rf"InputError: .*{path.name}.*remove the file: cnclip builds it again"
    ):
        run_ranks(train_without_dropout, 1, again)
    path.unlink()
    run_ranks(train_without_dropout, 1, again)


@pytest.mark.parametrize("byte", ["feature", "padding", "crc32"])
def test_a_flipped_bit_is_noticed_when_its_block_is_read(tmp_path: Path, byte: str) -> None:
    shards = write_shards(tmp_path / "shards", [70, 3])
    cache = FeatureCache(shards, "0123", num_views=2, dim=4)
    feature_KND = np.random.default_rng(0).normal(size=(2, 70, 4)).astype(np.float16)
    cache.write(0, feature_KND)
    assert cache.missing() == [1]
    np.testing.assert_array_equal(read_one(cache, 67, 7), feature_KND[1, 67])
    block_bytes = 64 * 4 * 2 + 4  # two of them a view
    data = bytearray(Path(cache.path(0)).read_bytes())
    last = len(data) - block_bytes  # view 1, rows 64 to 69
    data[last + {"feature": 5, "padding": 10 * 8, "crc32": 64 * 8}[byte]] ^= 1
    Path(cache.path(0)).write_bytes(data)
    again = FeatureCache(shards, "0123", num_views=2, dim=4)
    np.testing.assert_array_equal(read_one(again, 67, 0), feature_KND[0, 67])
    np.testing.assert_array_equal(read_one(again, 63, 1), feature_KND[1, 63])
    message = r"0123-.*\.npy: view 1, rows 64 to 127: .*remove the file: cnclip builds it again"
    for epoch in (1, 3):
        with pytest.raises(InputError, match=message):
            read_one(again, 67, epoch)


def test_every_epoch_compares_the_blocks_again(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [5])
    cache = FeatureCache(shards, "0123", num_views=1, dim=4)
    cache.write(0, np.zeros((1, 5, 4), np.float16))
    read_one(cache, 2, 0)
    with open(cache.path(0), "r+b") as file:  # the file that is mapped
        file.seek(-5, os.SEEK_END)
        file.write(b"\1")
    read_one(cache, 3, 0)
    with pytest.raises(InputError, match="view 0, rows 0 to 63"):
        read_one(cache, 3, 1)


def test_samples_of_several_shards_and_epochs_are_read_at_once(tmp_path: Path) -> None:
    shards, random = write_shards(tmp_path / "shards", [130, 64, 5]), np.random.default_rng(0)
    cache = FeatureCache(shards, "0123", num_views=3, dim=4)
    features = [random.normal(size=(3, shard.num_samples, 4)).astype(np.float16) for shard in shards]
    for shard, feature_KND in enumerate(features):
        cache.write(shard, feature_KND)
    shard_B, epoch_B = random.integers(3, size=200), random.integers(10, size=200)
    row_B = random.integers([shards[shard].num_samples for shard in shard_B])
    expected = [features[s][e % 3, r] for s, r, e in zip(shard_B, row_B, epoch_B, strict=True)]
    np.testing.assert_array_equal(cache.read(shard_B, row_B, epoch_B), expected)


def test_whatever_the_header_has_become_the_file_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [5])
    made = FeatureCache(shards, "0123", num_views=1, dim=4)
    made.write(0, np.zeros((1, 5, 4), np.float16))
    path = Path(made.path(0))
    whole = path.read_bytes()
    for data in (b"", whole[:9], whole.replace(b"(1, 1)", b"((1, 1"), whole.replace(b"(1, 1)", b"'1, 1)")):
        path.write_bytes(data)
        cache = FeatureCache(shards, "0123", num_views=1, dim=4)
        with pytest.raises(
            InputError, match=rf"{path}: not a readable .npy file .*remove the file: cnclip builds it again"
        ):
            read_one(cache, 2, 0)


def test_blocks_in_each_others_place_are_noticed(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [150])
    cache = FeatureCache(shards, "0123", num_views=1, dim=4)
    cache.write(0, np.arange(600, dtype=np.float16).reshape(1, 150, 4))
    blocks = np.load(cache.path(0))
    np.save(cache.path(0), blocks[:, ::-1])
    read_one(cache, 64, 0)  # the middle stays where it was
    with pytest.raises(InputError, match="view 0, rows 0 to 63"):
        read_one(cache, 1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cached_views": 1}, r"cached_views = 1: .* set lock_image = true or cached_views = 0"),
        ({"cached_views": -1, "lock_image": True}, "cached_views: must be at least 0, found -1"),
        ({"micro_batch": 0}, "micro_batch: must be greater than 0, found 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(change)
