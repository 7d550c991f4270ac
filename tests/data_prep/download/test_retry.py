"""A second pass of the download: recovered images reach the shards as if they had never failed."""

import contextlib
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from data_prep.accounting.funnel import by_source
from data_prep.download import retry as data_retry
from data_prep.download import stage as download
from data_prep.filters import image as filter_image
from data_prep.filters import text as filter_text
from data_prep.filters.text import FilterTextConfig
from data_prep.sources.table import TableSource
from pipeline import catalog, runner
from pipeline.core import store
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import Run, State, read_manifest, select, survey
from pipeline.tools import retry
from pipeline.tools.why import follow
from tests.helpers.corpus_files import sidecars
from tests.helpers.fake_web import NUM_PICTURES, Web, fake_web, load, shard_bytes

# What the web says to each image at first: some of it passes, some of it stays.
ERRORS = ("timeout: 10 s", "http_error: 503", "http_error: 429", "dns: no", "tls: bad", "connection: reset")
LASTING = ("http_404: 404", "http_error: 403", "opted_out: X-Robots-Tag", "not_an_image: starts with b''")


def first_time(number: int) -> str | None:
    if number % 10 == 1:
        return ""
    if number % 4 == 0:
        return ERRORS[number // 4 % len(ERRORS)]
    if number % 10 == 7:
        return LASTING[number // 10 % len(LASTING)]
    return None


def still_gone(number: int) -> str | None:
    return first_time(number) if first_time(number) in LASTING else None


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A finished run on a bad day."""
    fake_web(monkeypatch, first_time)
    run = load(tmp_path / "failed")
    runner.execute(run, run.stages, redo=False)
    return run


def dropped(run: Run) -> dict[str, int]:
    manifest = read_manifest(run, "download")
    assert manifest is not None
    assert manifest.num_in == NUM_PICTURES == manifest.num_kept + sum(manifest.dropped.values())
    return dict(manifest.dropped)


def expected(web: Web) -> Counter[str]:
    answers = [web(number) for number in range(NUM_PICTURES)]
    return Counter(answer.split(":")[0] or "lost_by_downloader" for answer in answers if answer is not None)


def test_the_plan_names_the_classes_and_which_are_worth_it(failed: Run) -> None:
    worth = {item.name: item.num_rows for item in retry.plan(failed) if item.is_worth_it}
    assert worth == {
        "lost_by_downloader": 6, "timeout": 3, "http_error 503": 3, "http_error 429": 3, "dns": 2, "tls": 2,
        "connection": 2,
    }  # fmt: skip
    lasting = {item.name for item in retry.plan(failed) if not item.is_worth_it}
    assert lasting == {"http_404", "http_error 403", "opted_out", "not_an_image"}


def test_after_a_retry_the_shards_are_those_of_a_good_day(
    failed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dropped(failed) == expected(first_time)
    asked = fake_web(monkeypatch, still_gone)
    done = retry.do(failed)
    assert sorted(asked) == [n for n in range(NUM_PICTURES) if first_time(n) not in (None, *LASTING)]
    assert (done.number, done.asked, done.recovered) == (1, len(asked), len(asked))
    assert done.redone == ("filter_image", "shards")
    good = load(tmp_path / "good")
    runner.execute(good, good.stages, redo=False)
    assert shard_bytes(failed) == shard_bytes(good)
    assert dropped(failed) == dropped(good) == expected(still_gone)
    manifests = [read_manifest(run, "download") for run in (failed, good)]
    funnels = [by_source(manifest) for manifest in manifests if manifest is not None]
    assert funnels[0] == funnels[1]
    assert runner.verify(failed, failed.stages) == []
    assert all(status.state is State.DONE for status in survey(failed))
    # And nothing is left to ask for.
    assert retry.do(failed) == retry.Retried(0, 0, 0, ())


def test_passes_add_up(failed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails again stays for the next pass; what fails for good then has its last reason."""

    def second_time(number: int) -> str | None:
        if number % 8 == 0:
            return "timeout: 10 s" if number % 16 == 0 else "http_404: 404"
        return first_time(number) if first_time(number) in LASTING else None

    fake_web(monkeypatch, second_time)
    first = retry.do(failed)
    assert 0 < first.recovered < first.asked
    assert dropped(failed) == expected(second_time)
    asked = fake_web(monkeypatch, still_gone)
    second = retry.do(failed)
    assert (second.number, second.recovered) == (2, 4)
    assert sorted(asked) == [0, 16, 32, 48]
    assert dropped(failed)["http_404"] == expected(second_time)["http_404"]
    assert sidecars(failed).height == NUM_PICTURES - sum(dropped(failed).values())
    assert sidecars(failed)["key"].is_sorted()
    assert runner.verify(failed, failed.stages) == []


def test_nothing_comes_back(failed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = shard_bytes(failed)
    fake_web(monkeypatch, first_time)
    assert retry.do(failed).recovered == 0
    assert dropped(failed) == expected(first_time)
    assert shard_bytes(failed) == before


@pytest.mark.parametrize("fatal", ["write_table", "write_text"])
@pytest.mark.parametrize("after", range(0, 7, 2))
def test_killed_at_any_write_it_goes_on(
    failed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: str, after: int
) -> None:
    """Stopped at one of the writes, the run is whole as it was; the same call then ends as if not stopped."""
    copy = load(tmp_path / "copy")
    shutil.copytree(failed.folder, copy.folder, dirs_exist_ok=True)
    other = replace(failed, folder=copy.folder)
    fake_web(monkeypatch, still_gone)
    retry.do(failed)
    module, writes = (data_retry, [0]) if fatal == "write_table" else (store, [0])
    write = getattr(module, fatal)

    def failing(*arguments: Any) -> None:
        writes[0] += 1
        if writes[0] > after:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, fatal, failing)
        with contextlib.suppress(KeyboardInterrupt):
            retry.do(other)
    assert [line for line in runner.verify(other, other.stages) if "download" in line] == []
    retry.do(other)
    assert shard_bytes(other) == shard_bytes(failed)
    assert dropped(other) == dropped(failed)
    assert runner.verify(other, other.stages) == []
    names = [{p.name for p in Path(run.folder, "download").rglob("*.parquet")} for run in (other, failed)]
    assert names[0] == names[1]


def _cut(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2 + 77])


def _cut_at_a_member(tar: Path) -> None:
    """As after a full disk: zeros from a member on, which a reader takes for the end."""
    with tarfile.open(tar) as file:
        first_lost = file.getmembers()[5].offset
    tar.write_bytes(tar.read_bytes()[:first_lost] + bytes(10240))


def _cut_table(tar: Path) -> None:
    table = tar.with_suffix(".parquet")
    table.write_bytes(table.read_bytes()[:-40])


@pytest.mark.parametrize("damage", [_cut, _cut_at_a_member, _cut_table, Path.unlink])
@pytest.mark.parametrize("for_good", [False, True])
def test_what_img2dataset_leaves_damaged_is_asked_for_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], for_good: bool
) -> None:
    run = load(tmp_path)
    asked = fake_web(monkeypatch, still_gone)
    downloader, calls = download._downloader, []

    @contextlib.contextmanager
    def damaging(config: Any, raw: Path, *rest: Any) -> Iterator[Any]:
        with downloader(config, raw, *rest) as process:
            calls.append(len(list((raw / "shards").glob("*.tar"))))
            if len(calls) == 1 or for_good:
                damage(raw / "shards" / "00000.tar")
            yield process

    monkeypatch.setattr(download, "_downloader", damaging)
    stages = select(run, None, None, "download")
    if for_good:
        with pytest.raises(InputError, match="img2dataset left partition 00000 damaged, 2 times"):
            runner.execute(run, stages, redo=False)
        calls.clear()
        monkeypatch.setattr(download, "_downloader", downloader)
        runner.execute(run, stages, redo=False)
    else:
        runner.execute(run, stages, redo=False)
        assert calls == [3, 1]  # tars of each call
        assert NUM_PICTURES < len(asked) < 2 * NUM_PICTURES
    assert dropped(run) == expected(still_gone)
    assert runner.verify(run, stages) == []


def test_a_run_that_is_not_downloaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="download is to do"):
        retry.plan(load(tmp_path))


def test_drop_tables_of_before_statuses_were_kept(failed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drops = pl.LazyFrame({"key": ["a", "b"], "url_hash": ["", ""], "reason": ["http_error", "http_404"]})
    assert data_retry.worth_it(drops).collect()["key"].to_list() == ["a"]


@pytest.mark.slow
def test_a_site_that_heals_over_real_http(tmp_path: Path) -> None:
    """Real img2dataset, real HTTP: addresses that hung, broke off or answered 500 give images later."""
    settings = {
        "run.folder": tmp_path / "demo", "run.processes": 1, "corpus.num_clean": 40,
        "corpus.num_evaluation": 12, "corpus.dirt": 0.2, "dedup.partitions": 2,
        "download.timeout_seconds": 5.0, "download.retries": 0, "shards.samples_per_shard": 32,
    }  # fmt: skip
    run, _ = catalog.load("demo", [f"{key}={value}" for key, value in settings.items()])
    runner.execute(run, select(run, None, None, "shards"), redo=False)
    before = dropped_by(run)
    path = Path(run.folder, "corpus", "site.json")
    size = path.stat().st_size
    site = json.loads(path.read_text())
    picture = next(answer for answer in site.values() if answer.get("file", "").endswith(".jpg"))
    for answer in site.values():
        if answer.get("hang") or answer.get("status", 200) >= 500 or answer.get("sent_share", 1) < 1:
            answer.clear()
            answer.update(picture)
    path.write_text(json.dumps(site).ljust(size))  # the sizes of outputs are looked at
    done = retry.do(run)
    after = dropped_by(run)
    passing = ("timeout", "connection")
    gone = sum(before[reason] for reason in passing) + before["http_error"] - after["http_error"]
    assert after["timeout"] == after["connection"] == 0
    assert 0 < after["http_error"] < before["http_error"]  # 403 stays
    assert done.asked == done.recovered == gone
    assert runner.verify(run, [run.stage(name) for name in ("download", "filter_image", "shards")]) == []


def dropped_by(run: Run) -> Counter[str]:
    manifest = read_manifest(run, "download")
    assert manifest is not None
    return Counter(manifest.dropped)


def no_errors(number: int) -> str | None:
    return None


def cut_tar(monkeypatch: pytest.MonkeyPatch, partition: str) -> None:
    """Let one partition come back damaged at each call."""
    damage = download._damage

    def found(raw: Path, number: int) -> str | None:
        lists = sorted((raw / "lists").glob("*.parquet"))
        return "cut" if lists[number].stem == partition else damage(raw, number)

    monkeypatch.setattr(download, "_damage", found)


def fail_judging(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Let the judge of images stumble over one of them."""
    publish = filter_image.publish_judged

    def stumble(context: Any, task: Any, kept: pl.DataFrame, *rest: Any) -> Any:
        if key in kept["key"]:
            raise ValueError("a parser that never met such bytes")
        return publish(context, task, kept, *rest)

    monkeypatch.setattr(filter_image, "publish_judged", stumble)


@pytest.mark.parametrize("stage", ["download", "filter_image"])
def test_the_rows_of_a_task_that_failed_come_back_with_a_retry(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_web(monkeypatch, no_errors)
    good = load(tmp_path / "good")
    runner.execute(good, good.stages, redo=False)
    rows = pl.read_parquet(Path(good.folder, "dedup", "kept", "00001.parquet"))
    with monkeypatch.context() as bad_day:
        cut_tar(bad_day, "00001") if stage == "download" else fail_judging(bad_day, rows["key"][2])
        run = load(tmp_path / "bad")
        with pytest.raises(InputError, match=rf"task 00001 of {stage} failed .*--without-failed"):
            runner.execute(run, run.stages, redo=False)
        assert len(list(Path(run.folder, stage, "receipts").glob("*.json"))) == 2
        run = replace(run, max_failed_tasks=1)
        runner.execute(run, run.stages, redo=False)
    manifest = read_manifest(run, stage)
    assert manifest is not None
    assert manifest.dropped == {"partition_failed": rows.height}
    table = pl.read_parquet(Path(run.folder, stage, "dropped", "00001.parquet"))
    assert set(table["key"]) == set(rows["key"])
    assert by_source(manifest)["mine"]["kept"] == NUM_PICTURES - rows.height
    assert len(sidecars(run)) == NUM_PICTURES - rows.height
    done = retry.do(run)
    assert done.recovered == (rows.height if stage == "download" else 0)
    assert done.redone == ("filter_image", "shards")
    assert shard_bytes(run) == shard_bytes(good)


def test_a_table_that_cannot_be_read_is_counted_as_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_web(monkeypatch, no_errors)
    run = replace(load(tmp_path), max_failed_tasks=1)
    more = tmp_path / "inputs" / "more.csv"
    more.write_text("url,caption\nhttp://a.cn/1.jpg,海边的落日\nhttp://a.cn/2.jpg,城市的夜景\n")
    corpus = run.stages[0].config
    tables = (*corpus.corpus.tables, TableSource(path=str(more), name="more"))
    config = replace(corpus, corpus=replace(corpus.corpus, tables=tables))
    run = replace(run, stages=(replace(run.stages[0], config=config), *run.stages[1:]))
    runner.execute(run, run.stages[:1], redo=False)
    scan = filter_text.scan

    def refuse(path: str, source: TableSource, **options: Any) -> Any:
        if source.name == "more":
            raise OSError(5, "Input/output error", path)
        return scan(path, source, **options)

    monkeypatch.setattr(filter_text, "scan", refuse)
    runner.execute(run, run.stages, redo=False)
    manifest = read_manifest(run, "filter_text")
    assert manifest is not None
    assert (manifest.num_in, manifest.num_kept) == (NUM_PICTURES + 2, NUM_PICTURES)
    assert manifest.dropped == {"partition_failed": 2}
    assert by_source(manifest)["more"] == {"in": 2, "kept": 0, "dropped": {"partition_failed": 2}}
    monkeypatch.undo()
    fates = follow(run, FilterTextConfig(), "http://a.cn/1.jpg")
    assert sorted((fate.source, fate.reason, fate.detail) for fate in fates if fate.stage) == [
        ("more", "partition_failed", "the run continued without task 00001")
    ]
    assert len(fates) == 2
