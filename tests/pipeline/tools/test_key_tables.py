"""A key leads to one table of each stage, whatever their number."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from data_prep.accounting.judged import JudgedFacts, SourceCounts
from data_prep.dedup.exact import partition_of_key
from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core import store
from pipeline.core.failures import PARTITION_FAILED
from pipeline.core.records import InputError, Manifest, Shard
from pipeline.core.run import Run, manifest_path
from pipeline.tools import why
from pipeline.tools.key_tables import KeyTables
from pipeline.tools.why import Fate, follow
from tests.helpers.table_run import write_table_run

NUM_PARTITIONS = 16
GOOD = [(f"http://a.cn/{number}.jpg", f"第{number}只橘猫趴在窗台上", 0.4) for number in range(60)]
ROWS = [*GOOD, GOOD[7], ("http://a.cn/0.jpg", "猫", 0.4), (*GOOD[3][:2], 0.1), GOOD[7]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to dedup: sixty rows that stay, two copies, a short caption, and a low score of a kept key."""
    folder = tmp_path_factory.mktemp("keys")
    path = write_table_run(folder, ROWS)
    assert main(["run", str(path), "--to", "dedup", "--set", f"dedup.partitions={NUM_PARTITIONS}"]) == 0
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    paths: list[str] = []
    scan = pl.scan_parquet
    monkeypatch.setattr(
        pl, "scan_parquet", lambda path, **more: paths.append(str(path)) or scan(path, **more)
    )
    return paths


def _follow(folder: Path, asked: str) -> list[Fate]:
    run, config = load(str(folder / "run.toml"), [f"dedup.partitions={NUM_PARTITIONS}"])
    return follow(run, config.filter_text, asked)


def _keys(folder: Path) -> dict[str, str]:
    kept = pl.read_parquet(folder / "run" / "dedup" / "kept" / "*.parquet")
    return dict(kept.select("url", "key").iter_rows())


def test_a_kept_row_is_found_in_its_partition(folder: Path, opened: list[str]) -> None:
    keys = _keys(folder)
    assert len(keys) == len(GOOD)
    for url in (GOOD[0][0], GOOD[41][0], GOOD[59][0]):
        opened.clear()
        [fate] = _follow(folder, keys[url])
        assert (fate.url, fate.stage, fate.source) == (url, None, "mine")
        inside = {Path(path).relative_to(folder / "run").as_posix() for path in opened if "/run/" in path}
        number = partition_of_key(keys[url], NUM_PARTITIONS)
        tables = {name for name in inside if name.startswith(("dedup/", "filter_text/"))}
        assert tables == {f"dedup/kept/{number:05d}.parquet"} | {
            name for name in tables if name == f"dedup/dropped/{number:05d}.parquet"
        }


def test_copies_of_a_kept_row_are_found_too(folder: Path) -> None:
    fates = _follow(folder, _keys(folder)[GOOD[7][0]])
    assert [(fate.row, fate.stage, fate.reason) for fate in fates] == [
        (7, None, None),
        (60, "dedup", "duplicate"),
        (63, "dedup", "duplicate"),
    ]


def test_rows_of_one_address_have_each_their_fate(folder: Path) -> None:
    fates = _follow(folder, GOOD[3][0])
    assert [(fate.row, fate.reason, fate.detail) for fate in fates] == [
        (3, None, None),
        (62, "score_below_threshold", "0.1000 < 0.26"),
    ]


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_key_that_the_text_filter_dropped(
    folder: Path, everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = next(fate.key for fate in _follow(folder, ROWS[61][0]) if fate.caption == "猫")
    assert key is not None
    if everywhere:  # tables are read by the run's executor
        monkeypatch.setattr(why, "_FEW_ROWS", 0)
        monkeypatch.setattr(why, "_FEW_TABLES", 1)
    [fate] = _follow(folder, key)
    assert (fate.row, fate.caption, fate.stage, fate.reason) == (61, "猫", "filter_text", "too_short")


def test_a_key_may_be_of_a_task_that_the_run_continued_without(folder: Path) -> None:
    run, _ = load(str(folder / "run.toml"), [f"dedup.partitions={NUM_PARTITIONS}"])
    tables = KeyTables(run)
    judged = tables.manifest("filter_text")
    assert judged is not None
    dropped = {str(PARTITION_FAILED): 500_000}
    facts = JudgedFacts(sources={"mine": SourceCounts(num_in=500_000, dropped=dropped)})
    failed = replace(judged, dropped=dropped, extra={"00000": {}, "00001-00002": facts.to_json()})
    tables._manifests["filter_text"] = failed
    assert why._places_of_key(run, tables, "f" * 32) == [(1, 1_000_000, 500_000)]


def test_a_key_of_no_row(folder: Path) -> None:
    with pytest.raises(InputError, match=r"f{32}: not in any caption table of"):
        _follow(folder, "f" * 32)


@pytest.mark.parametrize("stage", ["shards", "validation"])
def test_a_sample_is_found_by_few_sidecars(stage: str, tmp_path: Path, opened: list[str]) -> None:
    keys = [f"{number:032x}" for number in range(0, 600, 2)]
    shards: list[Any] = []
    for number in range(100):
        path = tmp_path / stage / f"{number:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pl.DataFrame({"key": keys[3 * number : 3 * number + 3]}).write_parquet(path)
        shards += [Shard(f"{number:05d}{suffix}", 3, 1, "") for suffix in (".tar", ".parquet")]
    run = Run(str(tmp_path), 0, "local", 1, ())
    manifest = Manifest(stage, 1, "", "", {}, tuple(shards), 300, 300, {})
    store.write_text(manifest_path(run, stage), manifest.to_file())
    tables = KeyTables(run)
    for number in (0, 1, 2, 150, 298, 299):
        opened.clear()
        place = f"{tmp_path}/{stage}/{number // 3:05d}.tar, member {keys[number]}.jpg"
        assert tables.shard_of(keys[number]) == place
        assert len(opened) <= 9  # of 100: half of the rest goes with each
    assert tables.shard_of(f"{1:032x}") is None
    assert tables.shard_of("f" * 32) is None
