"""A redo of the download asks the web only for what no earlier build knows, and gives the same bytes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from data_prep.download import stage as download
from data_prep.download.config import DownloadConfig
from data_prep.rules.copies import Marks
from pipeline import runner
from pipeline.core.records import ConfigError
from pipeline.core.run import Run, read_manifest
from pipeline.tools import retry
from tests.helpers.corpus_files import sidecars
from tests.helpers.fake_web import NUM_PICTURES, fake_web, load, shard_bytes

NEW = range(NUM_PICTURES - 5, NUM_PICTURES)


def give(number: int) -> str | None:
    return None


def some_fail(number: int) -> str | None:
    return {3: "http_404: 404", 7: "timeout: 10 s", 11: "", 15: "not_an_image: starts with b''"}.get(number)


def execute(run: Run) -> Run:
    runner.execute(run, run.stages, redo=True)
    return run


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A finished run over all but the last five images."""
    fake_web(monkeypatch, give)
    return execute(load(tmp_path / "a", range(NUM_PICTURES - 5)))


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    fake_web(monkeypatch, give)
    return execute(load(tmp_path / "whole"))


@pytest.mark.parametrize(
    "partitions", [3, 5, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 8))]
)
def test_new_rows_alone_are_asked_for(
    first: Run, whole: Run, partitions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_web(monkeypatch, give)
    again = execute(load(tmp_path / "a", partitions=partitions))
    assert sorted(asked) == list(NEW)
    assert shard_bytes(again) == shard_bytes(whole)
    if partitions == 3:
        for stage in whole.stages[1:]:
            assert read_manifest(again, stage.name).dropped == read_manifest(whole, stage.name).dropped  # type: ignore[union-attr]
    assert not Path(again.folder, "download", "earlier").exists()
    assert runner.execute(again, again.stages, redo=False) == 0
    assert runner.verify(again, again.stages) == []


def test_images_of_a_build_that_did_not_mark_them_are_marked_now(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in Path(whole.folder, "download", "pictures").glob("*.parquet"):
        pl.read_parquet(path).drop(*Marks._fields).write_parquet(path)
    asked = fake_web(monkeypatch, give)
    again = execute(load(tmp_path / "b", config=DownloadConfig(reuse=(whole.folder,))))
    assert asked == []
    assert shard_bytes(again) == shard_bytes(whole)


def test_fewer_rows_ask_for_nothing(first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_web(monkeypatch, give)
    fewer = execute(load(tmp_path / "a", range(10, NUM_PICTURES - 5)))
    assert asked == []
    assert len(sidecars(fewer)) == NUM_PICTURES - 15
    alone = execute(load(tmp_path / "b", range(10, NUM_PICTURES - 5)))
    assert shard_bytes(fewer) == shard_bytes(alone)


def test_lasting_failures_stay_and_passing_ones_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_web(monkeypatch, some_fail)
    execute(load(tmp_path / "a", range(NUM_PICTURES - 5)))
    asked = fake_web(monkeypatch, give)
    again = execute(load(tmp_path / "a"))
    assert sorted(asked) == [7, 11, *NEW]
    manifest = read_manifest(again, "download")
    assert manifest is not None
    assert manifest.dropped == {"http_404": 1, "not_an_image": 1}
    other = DownloadConfig(timeout_seconds=20.0)  # settings by which an answer may be another
    asked.clear()
    again = execute(load(tmp_path / "a", config=other))
    assert sorted(asked) == [3, 15]
    assert len(sidecars(again)) == NUM_PICTURES


def test_images_that_a_retry_brought_are_known(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_web(monkeypatch, some_fail)
    run = execute(load(tmp_path / "a", range(NUM_PICTURES - 5)))
    fake_web(monkeypatch, give)
    assert retry.do(run).recovered == 2
    asked = fake_web(monkeypatch, give)
    execute(load(tmp_path / "a"))
    assert sorted(asked) == list(NEW)


def test_other_settings_of_the_image_ask_for_all(
    first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_web(monkeypatch, give)
    execute(load(tmp_path / "a", range(NUM_PICTURES - 5), DownloadConfig(jpeg_quality=90)))
    assert sorted(asked) == list(range(NUM_PICTURES - 5))


def test_a_redo_of_the_stage_itself_asks_for_all(first: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_web(monkeypatch, give)
    runner.execute(first, [first.stage("download")], redo=True, force=True)
    assert sorted(asked) == list(range(NUM_PICTURES - 5))


@pytest.mark.parametrize("moment", [pytest.param("before", marks=pytest.mark.slow), "moving", "asking"])
def test_a_redo_that_is_killed_loses_no_image(
    first: Run, whole: Run, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        if moment == "asking":
            killed.setattr(download, "_downloader", stop)
        elif moment == "moving":
            killed.setattr(runner.store, "move", stop_after(runner.store.move, 3))
        else:
            killed.setattr(runner, "move_earlier", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(load(tmp_path / "a"))
    asked = fake_web(monkeypatch, give)
    again = execute(load(tmp_path / "a"))
    assert sorted(asked) == list(NEW)
    assert shard_bytes(again) == shard_bytes(whole)


def stop_after(work: Callable[..., Any], count: int) -> Callable[..., Any]:
    calls: list[None] = []

    def limited(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) > count:
            raise KeyboardInterrupt
        return work(*arguments)

    return limited


def test_an_unfinished_download_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(tmp_path / "a", range(NUM_PICTURES - 5))
    fake_web(monkeypatch, give)
    packed = download._packed

    def fail_last(context: Any, task: Any, *rest: Any) -> Any:
        if task.name == "00002":
            raise KeyboardInterrupt
        return packed(context, task, *rest)

    with monkeypatch.context() as killed:
        killed.setattr(download, "_packed", fail_last)
        with pytest.raises(KeyboardInterrupt):
            execute(run)
    missing = {
        int(url.rsplit("/", 1)[1][:-4])
        for url in pl.read_parquet(Path(run.folder, "dedup", "kept", "00002.parquet"))["url"]
    }
    asked = fake_web(monkeypatch, give)
    execute(load(tmp_path / "a"))
    assert set(asked) == missing | set(NEW)


def test_an_altered_image_is_no_image(first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pl.read_parquet(Path(first.folder, "download", "pictures", "00001.parquet"))
    with open(Path(first.folder, "download", "pictures", "00001.tar"), "r+b") as tar:
        tar.seek(table["offset_bytes"][4] + 100)
        tar.write(b"\xff\x00\xff")
    fake_web(monkeypatch, give)
    again = execute(load(tmp_path / "a"))
    manifest = read_manifest(again, "download")
    assert manifest is not None
    assert manifest.dropped == {"lost_by_downloader": 1}
    retry.do(again)
    assert len(sidecars(again)) == NUM_PICTURES


def test_another_run_is_taken_from(
    first: Run, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_web(monkeypatch, give)
    config = DownloadConfig(reuse=(first.folder,))
    run = execute(load(tmp_path / "b", config=config, partitions=4))
    assert sorted(asked) == list(NEW)
    assert shard_bytes(run) == shard_bytes(whole)
    with pytest.raises(ConfigError, match=r"reuse: .*/nowhere has no finished download"):
        execute(load(tmp_path / "c", config=DownloadConfig(reuse=(str(tmp_path / "nowhere"),))))
    with pytest.raises(ConfigError, match="stores its images otherwise: its short_side_px, jpeg_quality"):
        execute(load(tmp_path / "d", config=DownloadConfig(jpeg_quality=80, reuse=(first.folder,))))


def test_a_partition_that_fails_keeps_the_images_that_it_had(
    first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_web(monkeypatch, give)
    monkeypatch.setattr(download, "_damage", lambda raw, number: "cut")
    run = dataclasses.replace(load(tmp_path / "a"), max_failed_tasks=3)
    manifest = read_manifest(execute(run), "download")
    assert manifest is not None
    assert manifest.num_kept == NUM_PICTURES - len(NEW)
    assert manifest.dropped == {"partition_failed": len(NEW)}
