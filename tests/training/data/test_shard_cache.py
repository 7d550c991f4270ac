import contextlib
import dataclasses
import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.records import ConfigError, InputError, Shard
from pipeline.core.shard_format import sidecar_of
from tests.helpers.batches import WholeBatches
from tests.helpers.faulty_disk import FaultyDisk
from tests.helpers.shard_files import VOCABULARY, write_shards
from training.config.train import AugmentConfig
from training.data import shard_cache
from training.data.loader import BatchReader, CaptionConfig
from training.data.sampler import SampleOrder
from training.data.shard_cache import ShardCache, cache_of_rank, ranks_here
from training.data.views import ViewConfig
from training.model.tokenizer import Tokenizer

SIZES = [12, 7, 9, 15, 11, 6]
LANES, BATCH = 2, 8
EPOCH_STEPS = -(-sum(SIZES) // BATCH)


class Store:
    """Shards at URLs, and the bytes that were read of their tars."""

    def __init__(self, shards: tuple[Shard, ...], patch: pytest.MonkeyPatch) -> None:
        self.num_bytes = 0
        self.memory = fsspec.filesystem("memory")
        for path in [path for shard in shards for path in (shard.path, sidecar_of(shard.path))]:
            self.memory.pipe(f"/cached/{Path(path).name}", Path(path).read_bytes())
        self.local = shards
        self.shards = [
            dataclasses.replace(shard, path=f"memory://cached/{Path(shard.path).name}") for shard in shards
        ]
        self.tar_bytes = sum(shard.num_bytes for shard in shards)
        read = MemoryFileSystem.cat_file

        def counted(fs: Any, path: str, **options: Any) -> bytes:
            data = bytes(read(fs, path, **options))
            self.num_bytes += len(data) if path.endswith(".tar") else 0
            return data

        patch.setattr(MemoryFileSystem, "cat_file", counted)


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(shard_cache, "_WAITS_SECONDS", ())
    yield Store(write_shards(tmp_path / "shards", SIZES), monkeypatch)
    fsspec.filesystem("memory").rm("/cached", recursive=True)


def make_order() -> SampleOrder:
    return SampleOrder(SIZES, seed=5, global_batch=BATCH, lanes=LANES, window_shards=1)


def make_batches(
    shards: Any, folder: Path, *, size_gb: float | None = None, steps: range = range(2 * EPOCH_STEPS)
) -> WholeBatches:
    order = make_order()
    captions = CaptionConfig(
        weights={"caption": 1.0}, context_length=16, token_folder=str(folder / "tokens"), seed=0
    )
    reader = BatchReader(shards, order, Tokenizer(VOCABULARY), captions, lanes=range(LANES))
    if size_gb is not None:
        reader.cache = ShardCache(
            shards,
            order,
            range(LANES),
            str(folder / "cache"),
            size_gb=size_gb,
            ranks_here=1,
            byte_range=reader.byte_range,
            steps=steps,
        )
    views = ViewConfig(
        paths=[shard.path for shard in shards],
        image_size_px=32,
        augment=AugmentConfig(),
        seed=0,
        open_shards=reader.open_shards,
        cache_folder="" if reader.cache is None else reader.cache.folder,
    )
    return WholeBatches(reader, views)


def bytes_in(folder: Path) -> int:
    num_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a piece appears under its name, or goes, meanwhile
            num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    lanes=st.integers(1, 4),
    per_lane=st.integers(1, 5),
    window=st.integers(1, 3),
    first=st.integers(0, 12),
)
def test_the_windows_of_a_step_hold_its_samples(
    sizes: list[int], lanes: int, per_lane: int, window: int, first: int
) -> None:
    if lanes * per_lane > sum(sizes):
        return
    order = SampleOrder(sizes, seed=1, global_batch=lanes * per_lane, lanes=lanes, window_shards=window)
    for lane in range(lanes):
        windows = list(order.windows(lane, first, first + 9))
        assert windows[0].first_step == first
        assert windows[-1].last_step == first + 8
        assert {piece for found in windows for piece in found.pieces} <= set(order.lane_pieces(lane))
        for step in range(first, first + 9):
            index, _ = order.batch(step, range(lane, lane + 1))
            needed = np.searchsorted(order.piece_starts, index, side="right") - 1
            open_now = [found for found in windows if found.first_step <= step <= found.last_step]
            assert set(needed.tolist()) <= {piece for found in open_now for piece in found.pieces}


def test_batches_are_those_of_the_disk_and_bytes_are_read_once_a_pass(away: Store, tmp_path: Path) -> None:
    here = make_batches(away.local, tmp_path)
    tight = make_batches(away.shards, tmp_path, size_gb=0.9 * away.tar_bytes / 1e9)
    cache = tight.reader.cache
    assert cache is not None
    with cache:
        for step in range(2 * EPOCH_STEPS):
            ours, theirs = tight.read(step), here.read(step)
            assert ours.image.equal(theirs.image), step
            assert ours.tokens_BL.equal(theirs.tokens_BL)
            assert bytes_in(tmp_path / "cache") <= 0.9 * away.tar_bytes
            if step == EPOCH_STEPS - 1:
                assert away.num_bytes <= 1.5 * away.tar_bytes  # the next windows are read already
        assert away.tar_bytes < away.num_bytes <= 2 * 1.1 * away.tar_bytes
    cache.remove()
    assert not bytes_in(tmp_path / "cache")


def test_a_resumed_rank_takes_what_an_earlier_start_left(away: Store, tmp_path: Path) -> None:
    """With room for all, a second epoch asks for nothing; so does a later start."""
    whole = make_batches(away.shards, tmp_path, size_gb=1.0)
    expected = [whole.read(step) for step in range(2 * EPOCH_STEPS)]
    assert away.num_bytes <= away.tar_bytes
    assert whole.reader.cache is not None
    whole.reader.cache.close()
    pieces = sorted(Path(whole.reader.cache.folder).iterdir())
    pieces[0].write_bytes(b"short")
    (Path(whole.reader.cache.folder) / "00000001.partial").write_bytes(b"left by a kill")
    (tmp_path / "cache" / "of other shards").mkdir()
    away.num_bytes = 0
    resumed = make_batches(away.shards, tmp_path, size_gb=1.0, steps=range(3, 2 * EPOCH_STEPS))
    for step in range(3, 2 * EPOCH_STEPS):
        assert resumed.read(step).image.equal(expected[step].image)
    assert 0 < away.num_bytes < away.tar_bytes / 4
    assert resumed.reader.cache is not None
    resumed.reader.cache.close()
    assert len(os.listdir(tmp_path / "cache")) == 1
    assert sorted(Path(resumed.reader.cache.folder).iterdir()) == pieces


def cache_here(away: Store, folder: Path, machine: str, monkeypatch: pytest.MonkeyPatch) -> ShardCache:
    """Return the cache of the only rank of a machine in a folder, once all that the steps need is there."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(socket, "gethostname", lambda: machine)
    reader, lanes = make_batches(away.shards, folder / machine).reader, range(LANES)
    more: Any = {"size_gb": 1.0, "byte_range": reader.byte_range, "steps": range(EPOCH_STEPS)}
    cache = cache_of_rank(away.shards, make_order(), lanes, str(folder), **more)
    assert cache is not None
    with cache:
        for step in range(EPOCH_STEPS):
            cache.wait(step)
            cache.done(step)
    return cache


def test_machines_that_share_a_folder_keep_their_pieces_apart(
    away: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cache_here(away, tmp_path, "node1", monkeypatch)
    pieces = bytes_in(Path(one.folder))
    assert pieces
    monkeypatch.setattr(shard_cache, "_MARK_SECONDS", -1)
    other = cache_here(away, tmp_path, "node2", monkeypatch)
    assert Path(one.folder).parents[1:] != Path(other.folder).parents[1:]
    assert bytes_in(Path(one.folder)) == bytes_in(Path(other.folder)) == pieces
    # A machine that is gone for a day loses its pieces; one that works, however long, does not.
    folders = {name: tmp_path / "shard_cache" / name for name in ("node1", "node2", "node3")}
    long_ago = time.time() - 2 * shard_cache._ABANDONED_SECONDS
    os.utime(folders["node2"], (long_ago, long_ago))
    other.done(EPOCH_STEPS)
    os.utime(folders["node1"], (long_ago, long_ago))
    (folders["node2"] / "1").mkdir()  # of a second rank that an earlier start had
    cache_here(away, tmp_path, "node3", monkeypatch)
    assert [name for name, folder in folders.items() if folder.exists()] == ["node2", "node3"]
    away.num_bytes = 0
    cache_here(away, tmp_path, "node2", monkeypatch)
    assert os.listdir(folders["node2"]) == ["0"]
    assert not away.num_bytes


def test_ranks_that_are_not_counted_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks_here() == 1
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ConfigError, match=r"^no LOCAL_WORLD_SIZE in the environment of one of 16 ranks"):
        ranks_here()
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert ranks_here() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "eight")
    with pytest.raises(ConfigError, match=r"LOCAL_WORLD_SIZE = 'eight': set it to the number of ranks"):
        ranks_here()


def test_a_damaged_piece_is_read_from_the_store(
    away: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches, here = make_batches(away.shards, tmp_path, size_gb=1.0), make_batches(away.local, tmp_path)
    with batches.reader.cache or pytest.fail("no cache") as cache:
        cache.wait(0)
        for piece in Path(cache.folder).iterdir():
            if piece.suffix != ".partial":  # of a later step, which is still being fetched
                piece.write_bytes(bytes(piece.stat().st_size))
        assert batches.read(0).image.equal(here.read(0).image)
    assert "jpg is damaged: cnclip reads it from memory://cached/0000" in capsys.readouterr().out


def read_all(batches: WholeBatches) -> None:
    with batches.reader.cache or pytest.fail("no cache"):
        for step in range(EPOCH_STEPS):
            batches.read(step)


def test_what_cannot_be_had_is_named(away: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, whole = "/cached/00001.tar", Path(away.local[1].path).read_bytes()
    for changed, said in (
        (whole[:-1] + b"x", r"memory://cached/00001.tar: other bytes than the shards stage wrote"),
        (whole[:5000], r"memory://cached/00001.tar: cannot be read: bytes .*: the object was cut short"),
        (None, r"memory://cached/00001.tar: no such object: it was removed after training began"),
    ):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        away.memory.rm(name) if changed is None else away.memory.pipe(name, changed)
        with pytest.raises(InputError, match=said):
            read_all(make_batches(away.shards, tmp_path, size_gb=1.0))
    away.memory.pipe(name, whole)
    with pytest.raises(ConfigError, match=r"cache_gb = 1e-05: too small: .* raise cache_gb to that"):
        make_batches(away.shards, tmp_path, size_gb=1e-5)
    with FaultyDisk(tmp_path / "cache").failing("write", 3, OSError(errno.ENOSPC, "No space left on device")):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        with pytest.raises(
            InputError, match=r"cache/.*: cannot be written \(No space left on device\): make"
        ):
            read_all(make_batches(away.shards, tmp_path, size_gb=1.0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9000, 8000, 1000))  # type: ignore[attr-defined]
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    with pytest.raises(
        InputError, match=r"1e-06 GB free, but this rank's shards may take .* set cache_folder"
    ):
        make_batches(away.shards, tmp_path, size_gb=1.0)
