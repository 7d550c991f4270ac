"""From filtered tables to shards, through the real stages; images come from a stand-in for the web."""

import hashlib
import io
import itertools
import tarfile
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import webdataset  # type: ignore[import-untyped]
from PIL import Image

from data_prep.dedup import exact as dedup
from data_prep.dedup.exact import DedupConfig, partition_of_key, partition_range
from data_prep.filters import text as filter_text
from data_prep.formats.keys import with_key
from pipeline import runner
from pipeline.core.records import ConfigError, InputError, Manifest
from pipeline.core.run import Run, make_context, read_manifest
from tests.helpers.corpus_files import finish
from tests.helpers.numbered_run import (
    NUM_COPIES,
    NUM_PAIRS,
    SAMPLES_PER_SHARD,
    draw,
    numbered_rows,
    numbered_run,
)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The rows in three tables."""
    folder, rows = tmp_path_factory.mktemp("tables"), numbered_rows()
    paths = [folder / f"{number}.csv" for number in range(3)]
    for number, path in enumerate(paths):
        pl.DataFrame(rows[number::3], schema=["url", "caption"], orient="row").write_csv(path)
    return paths


@pytest.fixture(scope="module")
def finished(tables: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finish(numbered_run(tmp_path_factory.mktemp("finished"), tables))


def _manifest(run: Run, stage: str) -> Manifest:
    manifest = read_manifest(run, stage)
    assert manifest is not None
    return manifest


def _digests(run: Run) -> dict[str, str]:
    return {shard.path: shard.digest for shard in _manifest(run, "shards").shards}


def _tars(run: Run) -> list[Path]:
    return sorted(Path(run.folder, "shards").glob("*.tar"))


def test_copies_go_and_near_copies_stay(finished: Run) -> None:
    manifest = _manifest(finished, "dedup")
    assert manifest.num_in == NUM_PAIRS + NUM_COPIES + 2
    assert manifest.num_kept == NUM_PAIRS + 2
    assert manifest.dropped == {"duplicate": NUM_COPIES}


def test_partitions_that_do_not_fit_into_memory_are_refused(finished: Run) -> None:
    context = make_context(finished, finished.stage("dedup"))
    assert context is not None
    manifest = context.parents["filter_text"]
    many = tuple(replace(shard, num_samples=24_000_000) for shard in manifest.shards)
    large = replace(context, parents={"filter_text": replace(manifest, shards=many)})
    kept = len([shard for shard in many if shard.path.startswith("kept/")])
    needed = kept * 2400
    with pytest.raises(ConfigError, match=rf"partitions = 4: each would hold .* out, or set {needed}, which"):
        dedup.plan(DedupConfig(partitions=4), large)
    assert len(dedup.plan(DedupConfig(partitions=needed), large)) == 72


def test_partitions_follow_the_number_of_rows(finished: Run, tables: list[Path], tmp_path: Path) -> None:
    context = make_context(finished, finished.stage("dedup"))
    assert context is not None
    manifest = context.parents["filter_text"]
    for rows, partitions in ((100, 4), (60_001, 7)):
        shards = [replace(shard, num_samples=0) for shard in manifest.shards]
        shards[0] = replace(shards[0], path="kept/0.parquet", num_samples=rows)
        sized = replace(context, parents={"filter_text": replace(manifest, shards=tuple(shards))})
        tasks = dedup.plan(DedupConfig(), sized)
        assert [task.name for task in tasks] == [f"{number:05d}" for number in range(partitions)]
        assert {task.arguments["partitions"] for task in tasks} == {partitions}
    unset = numbered_run(tmp_path, tables, None)
    runner.execute(
        unset,
        [stage for stage in unset.stages if stage.name in ("corpus", "filter_text", "dedup")],
        redo=False,
    )
    kept = [sorted(Path(run.folder, "dedup", "kept").iterdir()) for run in (unset, finished)]
    assert [len(paths) for paths in kept] == [4, 3]
    assert pl.read_parquet(kept[0]).equals(pl.read_parquet(kept[1]))


def test_of_copies_the_lowest_table_and_row_stays(finished: Run) -> None:
    first: dict[tuple[str, str], tuple[int, int]] = {}
    for file in range(3):
        for row, pair in enumerate(numbered_rows()[file::3]):
            first.setdefault(pair, (file, row))
    kept = pl.concat(
        [pl.read_parquet(path) for path in sorted(Path(finished.folder, "dedup", "kept").glob("*.parquet"))]
    )
    assert kept.height == len(first)
    for url, caption, file, row in kept.select("url", "caption", "file", "row").iter_rows():
        assert first[url, caption] == (file, row)


def test_keys_are_the_digest_of_the_pair_and_give_the_order(finished: Run) -> None:
    sidecars = pl.concat([pl.read_parquet(path.with_suffix(".parquet")) for path in _tars(finished)])
    assert sidecars["key"].is_sorted()
    assert sidecars["key"].is_unique().all()
    for key, url, caption in sidecars.select("key", "url", "caption").iter_rows():
        assert key == hashlib.sha256(f"{url}\0{caption}".encode()).hexdigest()[:32]
    # Shuffled: not the order of the tables.
    numbers = [int(url.rsplit("/", 1)[1]) for url in sidecars["url"]]
    assert numbers != sorted(numbers)


# 60: more than rows, so some are empty
@pytest.mark.parametrize("partitions", [1, 7, pytest.param(60, marks=pytest.mark.slow)])
def test_shards_do_not_depend_on_the_number_of_partitions(
    finished: Run, tables: list[Path], tmp_path: Path, partitions: int
) -> None:
    other = finish(numbered_run(tmp_path, tables, partitions))
    assert any(
        shard.num_samples == 0 for shard in _manifest(other, "dedup").shards if "kept" in shard.path
    ) == (partitions == 60)
    assert _digests(other) == _digests(finished)


def test_the_same_rows_in_another_table_order_give_the_same_tars(
    finished: Run, tables: list[Path], tmp_path: Path
) -> None:
    other = finish(numbered_run(tmp_path, tables[::-1]))
    assert [path.read_bytes() for path in _tars(other)] == [path.read_bytes() for path in _tars(finished)]


def test_the_same_run_gives_the_same_bytes(finished: Run, tables: list[Path], tmp_path: Path) -> None:
    again = finish(numbered_run(tmp_path, tables))
    for stage in finished.stages:
        assert _manifest(again, stage.name) == _manifest(finished, stage.name)


def test_partitions_cut_the_whole_range() -> None:
    for partitions in (1, 3, 16, 1000):
        ranges = [partition_range(number, partitions) for number in range(partitions)]
        assert ranges[0][0] == "00000000"
        assert ranges[-1][1] is None
        assert all(first[1] == second[0] for first, second in itertools.pairwise(ranges))
        assert all(first < end for first, end in ranges if end is not None)
        for number, (first, end) in enumerate(ranges):
            last = "ffffffff" if end is None else f"{int(end, 16) - 1:08x}"
            assert partition_of_key(f"{first}{'0' * 24}", partitions) == number
            assert partition_of_key(f"{last}{'f' * 24}", partitions) == number


def test_all_shards_are_full_but_the_last(finished: Run) -> None:
    small = sum(int(url.rsplit("/", 1)[1]) % 9 == 0 for url, _ in set(numbered_rows()))
    total = NUM_PAIRS + 2 - small
    assert _manifest(finished, "filter_image").dropped == {"too_small": small}
    counts = [pl.read_parquet(path.with_suffix(".parquet")).height for path in _tars(finished)]
    assert counts[:-1] == [SAMPLES_PER_SHARD] * (len(counts) - 1)
    assert 1 <= counts[-1] <= SAMPLES_PER_SHARD
    assert sum(counts) == total == _manifest(finished, "shards").num_kept


def test_the_sidecar_gives_each_picture(finished: Run) -> None:
    for path in _tars(finished):
        rows = pl.read_parquet(path.with_suffix(".parquet"))
        with open(path, "rb") as tar, tarfile.open(path) as index:
            members = index.getmembers()
            names = [name for key in rows["key"] for name in (f"{key}.jpg", f"{key}.txt")]
            assert [member.name for member in members] == names
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
                (0, 0, 0, "", "", 0o644)
            }
            for url, offset, size, sha, width in rows.select(
                "url", "offset_bytes", "size_bytes", "image_sha256", "width_px"
            ).iter_rows():
                tar.seek(offset)
                data = tar.read(size)
                assert data == draw(url)
                assert hashlib.sha256(data).hexdigest() == sha
                assert Image.open(io.BytesIO(data)).width == width


def test_webdataset_reads_the_shards(finished: Run) -> None:
    paths = [str(path) for path in _tars(finished)]
    sidecars = pl.concat([pl.read_parquet(path.with_suffix(".parquet")) for path in _tars(finished)])
    samples = list(
        webdataset.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt")
    )
    assert [(key, text) for key, _, text in samples] == list(sidecars.select("key", "caption").iter_rows())
    assert all(image.size == (24, 24) for _, image, _ in samples)


def test_a_cut_off_picture_file_is_named(finished: Run, tables: list[Path], tmp_path: Path) -> None:
    run = numbered_run(tmp_path, tables)
    runner.execute(run, run.stages[:4], redo=False)
    path = tmp_path / "download" / "pictures" / "00001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"pictures/00001\.tar: 3,000 bytes, not .*; repair it: .*--repair"):
        finish(run)


def test_a_key_of_nulls_is_a_key() -> None:
    frame = pl.LazyFrame(
        {"url": [None, "a"], "caption": ["b", None]}, schema={"url": pl.String, "caption": pl.String}
    )
    keys = with_key(frame).collect()["key"].to_list()
    assert keys == [hashlib.sha256(pair).hexdigest()[:32] for pair in (b"\0b", b"a\0")]


def test_neighbouring_partitions_in_one_task_give_the_same_files(
    finished: Run, tables: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large corpus in many small partitions has fewer tasks than partitions."""
    alone = numbered_run(tmp_path / "alone", tables, partitions=7)
    runner.execute(alone, alone.stages[:3], redo=False)
    monkeypatch.setattr(dedup, "_MIN_TASKS", 3)
    together = numbered_run(tmp_path / "together", tables, partitions=7)
    runner.execute(together, together.stages[:3], redo=False)
    context = make_context(together, together.stage("dedup"))
    assert context is not None
    assert [task.name for task in dedup.plan(DedupConfig(partitions=7), context)] == [
        "00000",
        "00002",
        "00004",
    ]
    kept = [
        {
            shard.path: shard.digest
            for shard in _manifest(run, "dedup").shards
            if shard.path.startswith("kept/")
        }
        for run in (alone, together)
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 7
    assert (
        _manifest(alone, "dedup").dropped == _manifest(together, "dedup").dropped == {"duplicate": NUM_COPIES}
    )
    assert _digests(finish(together)) == _digests(finished)  # whose images lie in three partitions


def test_a_long_table_is_filtered_in_slices(
    finished: Run, tables: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices are judged apart; the rows keep their places, and the shards are the same."""
    monkeypatch.setattr(filter_text, "ROWS_PER_TASK", 5)
    sliced = finish(numbered_run(tmp_path, tables))
    lengths = [len(numbered_rows()[number::3]) for number in range(3)]
    assert len(list(Path(sliced.folder, "filter_text", "kept").iterdir())) == sum(-(-n // 5) for n in lengths)
    assert _manifest(sliced, "filter_text").num_in == _manifest(finished, "filter_text").num_in
    assert _digests(sliced) == _digests(finished)
    columns = ("key", "file", "row")
    rows = [
        pl.read_parquet(Path(run.folder, "dedup", "kept", "*.parquet"), columns=list(columns)).sort(columns)
        for run in (sliced, finished)
    ]
    assert rows[0].equals(rows[1])
