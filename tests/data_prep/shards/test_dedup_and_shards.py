"""From filtered tables to shards, through the real stages; pictures come from a stand-in for the web."""

import hashlib
import io
import itertools
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
import webdataset  # type: ignore[import-untyped]
from PIL import Image

from data_prep import corpus
from data_prep.accounting.drop_table import drops_path, write_drops
from data_prep.corpus import CorpusStageConfig, TablesConfig
from data_prep.dedup import exact as dedup
from data_prep.dedup.exact import DedupConfig, partition_range
from data_prep.download.stage import plan as plan_download
from data_prep.filters import image as filter_image
from data_prep.filters import text as filter_text
from data_prep.filters.image import FilterImageConfig
from data_prep.filters.text import FilterTextConfig
from data_prep.formats.keys import with_key
from data_prep.formats.parquet import write_table
from data_prep.formats.tar import TarWriter
from data_prep.shards import stage as shards
from data_prep.shards.stage import ShardsConfig
from data_prep.sources.table import TableSource
from pipeline import runner
from pipeline.core import store
from pipeline.core.records import InputError, Manifest
from pipeline.core.run import Run, make_context, read_manifest
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

NUM_PAIRS = 45
NUM_COPIES = 12
SAMPLES_PER_SHARD = 8


def draw(url: str) -> bytes:
    """A picture that follows from its URL; every ninth is too small."""
    rng = random.Random(url)
    side = 8 if int(url.rsplit("/", 1)[1]) % 9 == 0 else 24
    image = Image.new("RGB", (side, side), (rng.randrange(256), rng.randrange(256), rng.randrange(256)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def fetch(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    """Stands in for the download: the same files as `data_prep.download.stage` publishes, no network."""
    rows = pl.read_parquet(context.path_in("dedup", task.arguments["path"]))
    tar_path, table_path = f"pictures/{task.name}.tar", f"pictures/{task.name}.parquet"
    with store.publish(context.path(tar_path)) as temporary, TarWriter(temporary) as tar:
        pictures = [draw(url) for url in rows["url"]]
        places = [tar.add(f"{key}.jpg", data) for key, data in zip(rows["key"], pictures, strict=True)]
    sizes = [Image.open(io.BytesIO(data)).size for data in pictures]
    table = rows.drop("width_px", "height_px").with_columns(
        pl.Series("width_px", [size[0] for size in sizes], dtype=pl.Int32),
        pl.Series("height_px", [size[1] for size in sizes], dtype=pl.Int32),
        pl.Series("offset_bytes", [place.offset_bytes for place in places], dtype=pl.Int64),
        pl.Series("size_bytes", [place.size_bytes for place in places], dtype=pl.Int64),
        pl.Series("image_sha256", [place.sha256 for place in places], dtype=pl.String),
    )
    write_table(table, context.path(table_path))
    write_drops(rows.head(0).with_columns(reason=pl.lit("")), context.path(drops_path(task.name)))
    outputs = {tar_path: rows.height, table_path: rows.height, drops_path(task.name): 0}
    return Outcome(outputs, rows.height, rows.height)


def _rows() -> list[tuple[str, str]]:
    rng = random.Random(0)
    pairs = [(f"http://a.cn/{number}", f"编号{number:03d}的图片") for number in range(NUM_PAIRS)]
    rows = pairs + rng.choices(pairs, k=NUM_COPIES)
    # Nearly the same is not the same: another caption for a picture, another picture for a caption.
    rows += [(pairs[1][0], "另一段说明文字"), ("http://a.cn/1001", pairs[1][1])]
    rng.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The rows in three tables."""
    folder, rows = tmp_path_factory.mktemp("tables"), _rows()
    paths = [folder / f"{number}.csv" for number in range(3)]
    for number, path in enumerate(paths):
        pl.DataFrame(rows[number::3], schema=["url", "caption"], orient="row").write_csv(path)
    return paths


def _run(folder: Path | str, tables: Sequence[Path | str], partitions: int = 3) -> Run:
    sources = tuple(TableSource(path=str(path), name=Path(path).stem) for path in tables)
    images = FilterImageConfig()
    stages = (
        Stage(
            "corpus", "", 1, CorpusStageConfig(corpus=TablesConfig(kind="tables", tables=sources)), (),
            corpus.plan, corpus.run,
        ),
        Stage("filter_text", "", 1, FilterTextConfig(), ("corpus",), filter_text.plan, filter_text.run),
        Stage("dedup", "", 1, DedupConfig(partitions=partitions), ("filter_text",), dedup.plan, dedup.run),
        Stage("download", "", 1, None, ("corpus", "dedup"), plan_download, fetch),
        Stage(
            "filter_image", "", 1, images, ("corpus", "download"), filter_image.plan, filter_image.run
        ),
        Stage(
            "shards", "", 1, ShardsConfig(samples_per_shard=SAMPLES_PER_SHARD), ("download", "filter_image"),
            shards.plan, shards.run,
        ),
    )  # fmt: skip
    return Run(str(folder), 0, "local", 1, stages)


def _finish(run: Run) -> Run:
    runner.execute(run, run.stages, redo=False)
    return run


@pytest.fixture(scope="module")
def finished(tables: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _finish(_run(tmp_path_factory.mktemp("finished"), tables))


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


def test_of_copies_the_lowest_table_and_row_stays(finished: Run) -> None:
    first: dict[tuple[str, str], tuple[int, int]] = {}
    for file in range(3):
        for row, pair in enumerate(_rows()[file::3]):
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


@pytest.mark.parametrize("partitions", [1, 7, 60])  # 60: more than rows, so some are empty
def test_shards_do_not_depend_on_the_number_of_partitions(
    finished: Run, tables: list[Path], tmp_path: Path, partitions: int
) -> None:
    other = _finish(_run(tmp_path, tables, partitions))
    assert any(
        shard.num_samples == 0 for shard in _manifest(other, "dedup").shards if "kept" in shard.path
    ) == (partitions == 60)
    assert _digests(other) == _digests(finished)


def test_the_same_rows_in_another_table_order_give_the_same_tars(
    finished: Run, tables: list[Path], tmp_path: Path
) -> None:
    other = _finish(_run(tmp_path, tables[::-1]))
    assert [path.read_bytes() for path in _tars(other)] == [path.read_bytes() for path in _tars(finished)]


def test_the_same_run_gives_the_same_bytes(finished: Run, tables: list[Path], tmp_path: Path) -> None:
    again = _finish(_run(tmp_path, tables))
    for stage in finished.stages:
        assert _manifest(again, stage.name) == _manifest(finished, stage.name)


def test_partitions_cut_the_whole_range() -> None:
    for partitions in (1, 3, 16, 1000):
        ranges = [partition_range(number, partitions) for number in range(partitions)]
        assert ranges[0][0] == "00000000"
        assert ranges[-1][1] is None
        assert all(first[1] == second[0] for first, second in itertools.pairwise(ranges))
        assert all(first < end for first, end in ranges if end is not None)


def test_all_shards_are_full_but_the_last(finished: Run) -> None:
    small = sum(int(url.rsplit("/", 1)[1]) % 9 == 0 for url, _ in set(_rows()))
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
    run = _run(tmp_path, tables)
    runner.execute(run, run.stages[:4], redo=False)
    path = tmp_path / "download" / "pictures" / "00001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(
        InputError, match=r"pictures/00001\.tar: ends inside [0-9a-f]{32}\.jpg: the file is cut short"
    ):
        _finish(run)


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
    alone = _run(tmp_path / "alone", tables, partitions=7)
    runner.execute(alone, alone.stages[:3], redo=False)
    monkeypatch.setattr(dedup, "_MIN_TASKS", 3)
    together = _run(tmp_path / "together", tables, partitions=7)
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
    assert _digests(_finish(together)) == _digests(finished)  # whose pictures lie in three partitions


def test_a_long_table_is_filtered_in_slices(
    finished: Run, tables: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices are judged apart; the rows keep their places, and the shards are the same."""
    monkeypatch.setattr(filter_text, "ROWS_PER_TASK", 5)
    sliced = _finish(_run(tmp_path, tables))
    lengths = [len(_rows()[number::3]) for number in range(3)]
    assert len(list(Path(sliced.folder, "filter_text", "kept").iterdir())) == sum(-(-n // 5) for n in lengths)
    assert _manifest(sliced, "filter_text").num_in == _manifest(finished, "filter_text").num_in
    assert _digests(sliced) == _digests(finished)
    columns = ("key", "file", "row")
    rows = [
        pl.read_parquet(Path(run.folder, "dedup", "kept", "*.parquet"), columns=list(columns)).sort(columns)
        for run in (sliced, finished)
    ]
    assert rows[0].equals(rows[1])
