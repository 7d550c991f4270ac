"""What `cnclip status --watch` says of a run from the files of its folder."""

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.download.figures import CallFigures, FiguresFile, figures_of_call
from data_prep.download.tally import FETCHED, OTHER_HOSTS, Tally, read_tallies, with_most
from pipeline.cli import main
from pipeline.core import store
from pipeline.core.failures import Failure, write_failure
from pipeline.core.records import Manifest
from pipeline.core.run import Run, manifest_path
from pipeline.core.stage import FIGURES, Context, Outcome, Progress, Stage, Task, make_receipt
from pipeline.tools.watch import live
from pipeline.tools.watch.page import page_of
from pipeline.tools.watch.text import lines_of
from pipeline.tools.watch.watcher import Watcher
from tests.helpers.number_stages import execute, number_run

NOW = 1_800_000_000.0
ROWS = 1000  # of each of four partitions


def _no_tasks(config: None, context: Context) -> list[Task]:
    return []


def _never_planned(config: None, context: Context) -> list[Task]:
    raise AssertionError("planning reads the sources")


def _four(config: None, context: Context) -> list[Task]:
    return [Task(f"{number:05d}", {}) for number in range(4)]


def _run(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    return Outcome({}, ROWS, 600, {"http_404": 400})


@pytest.fixture
def downloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose download has one of four partitions, and two machines at work, one of them silent."""
    monkeypatch.setattr(time, "time", lambda: NOW)
    dedup = Stage("dedup", "", 1, None, (), _no_tasks, _run)
    download = Stage("download", "", 1, None, ("dedup",), _four, _run)
    run = Run(str(tmp_path), 0, "local", 1, (dedup, download))
    manifest = Manifest("dedup", 1, "", "", {}, (), 4 * ROWS, 4 * ROWS, {})
    store.write_text(manifest_path(run, "dedup"), manifest.to_file())
    context = Context(run.folder, "download", 0, {})
    make_receipt(download, context, Task("00000", {}), _run(None, context, Task("00000", {}), _silent), 1.0)
    write_failure(context, Failure("00003", "b", "img2dataset left partition 00003 damaged", tries=3))
    hosts = {"a.cn": {FETCHED: 900, "http_404": 300}, "b.cn": {"timeout": 100}}
    call = CallFigures(
        machine="alpha", now=NOW - 1, num_rows=2 * ROWS, num_packed=ROWS, is_over=False, hosts=hosts,
        curve=[(NOW - 601, 0, 0), (NOW - 301, 700, 500), (NOW - 1, 1300, 900)],
    )  # fmt: skip
    lost = dataclasses.replace(
        call, machine="beta", now=NOW - 400, num_packed=0, hosts={"a.cn": {FETCHED: 100}},
        curve=[(NOW - 800, 0, 0), (NOW - 400, 100, 100)],
    )  # fmt: skip
    for figures in (call, lost):
        text = json.dumps(figures.to_json())
        store.write_text(context.path(FIGURES, f"{figures.machine}.json"), text)
    return run


def _silent(done: int, total: int, text: str = "") -> None: ...


def test_rates_reasons_hosts_and_time_left(downloading: Run) -> None:
    view = Watcher(downloading).look()
    assert (view.stage, view.tasks_done, view.num_tasks) == ("download", 1, 4)
    assert view.rows_done == ROWS + 300  # packed, and fetched since
    assert view.num_rows == 4 * ROWS
    assert view.rows_per_second == pytest.approx(2.0, abs=0.02)
    assert view.seconds_left == pytest.approx(2700 / 2.0, rel=0.02)
    alpha, beta = view.machines
    assert (alpha.name, alpha.num_done, alpha.num_calls, alpha.is_silent) == ("alpha", 1300, 1, False)
    assert (beta.name, beta.rows_per_second, beta.num_calls, beta.is_silent) == ("beta", 0.0, 0, True)
    assert dict(view.reasons) == {FETCHED: 1000, "http_404": 300, "timeout": 100}
    assert [(host.name, host.num_done, host.failure) for host in view.hosts] == [
        ("a.cn", 1300, "http_404"),
        ("b.cn", 100, "timeout"),
    ]
    assert sum(bar.rows_per_second * bar.seconds for bar in view.curve) == pytest.approx(1400)
    assert view.curve[-1].share_fetched == pytest.approx(400 / 600)
    [(stage, count, [failure])] = view.failures
    assert (stage, count, failure.task) == ("download", 1, "00003")


def test_the_text_and_the_page_show_it(downloading: Run) -> None:
    view = Watcher(downloading).look()
    lines = lines_of(view)
    assert lines[1] == "1 of 4 tasks · 1,300 of 4,000 (32.5%) rows · 2.0 rows/s · 22:35 left"
    table = [line.split() for line in lines]
    assert ["beta", "0.0", "100", "100.0%", "no", "response"] in table
    assert ["http_404", "300", "21.4%"] in table
    assert ["b.cn", "100", "0.0%", "timeout"] in table
    assert "download: 1 task failed and set aside" in lines
    hostile = dataclasses.replace(view, folder="<script>")
    page = page_of(hostile, 5.0)
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert '<meta http-equiv="refresh" content="5">' in page
    for word in ("alpha", "no response", "http_404", "b.cn", "00003 on b", "22:35 left", "<polyline"):
        assert word in page


def test_files_that_have_not_changed_are_not_read_again(
    downloading: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher(downloading)
    first = watcher.look()
    read: list[str] = []
    real = store.read_bytes
    monkeypatch.setattr(store, "read_bytes", lambda path: read.append(Path(path).name) or real(path))
    assert watcher.look() == first
    assert read == ["00003.json"]  # of the failed task


def test_another_stage_has_its_tasks_and_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [NOW]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    corpus = Stage("corpus", "", 1, None, (), _never_planned, _run)
    stage = Stage("filter_text", "", 1, None, ("corpus",), _four, _run)
    run = Run(str(tmp_path), 0, "local", 1, (corpus, stage))
    watcher = Watcher(run)
    assert lines_of(watcher.look())[1] == "0 of ? tasks · 0 rows · 0.0 rows/s"
    store.write_text(manifest_path(run, "corpus"), Manifest("corpus", 1, "", "", {}, (), 0, 0, {}).to_file())
    assert lines_of(watcher.look())[1] == "0 of 4 tasks · 0 rows · 0.0 rows/s"
    context = Context(run.folder, "filter_text", 0, {})
    for name in ("00000", "00001"):
        make_receipt(stage, context, Task(name, {}), _run(None, context, Task(name, {}), _silent), 1.0)
    clock[0] += 10
    assert lines_of(watcher.look())[1] == "2 of 4 tasks · 2,000 rows · 200 rows/s · 0:10 left"


def test_a_run_that_is_done_ends_the_watch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "00000.txt").write_text("1 2 3")
    run = number_run(tmp_path / "numbers", tmp_path / "run")
    execute(run)
    capsys.readouterr()
    live.watch_run(run, str(tmp_path / "page.html"))
    assert "all 2 stages are done" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "all 2 stages are done" in page
    assert "refresh" not in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--watch", "--json"), "--watch: goes with --page only"),
        (("--page", "a.html"), "--page a.html: is written while a run is watched; give --watch too"),
    ],
)
def test_options_that_do_not_go_together(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "demo", *words]) == 2
    assert said in capsys.readouterr().err


def test_workers_count_by_host_and_reason(tmp_path: Path) -> None:
    tally = Tally(str(tmp_path))
    for address, error in (
        ("http://A.cn/1.jpg", None),
        ("https://a.cn:8443/2.jpg", "http_error: 503"),
        ("//[", "address_refused: no host"),
    ):
        tally.note(address, error)
    tally.write()
    assert read_tallies(tmp_path) == {
        "a.cn": Counter({FETCHED: 1, "http_error": 1}),
        "(no host)": Counter({"address_refused": 1}),
    }


def test_rare_hosts_are_counted_together() -> None:
    counts = {f"{number:03d}.cn": Counter({FETCHED: number + 1}) for number in range(10)}
    kept = with_most(counts, 2)
    assert kept == {
        "009.cn": Counter({FETCHED: 10}),
        "008.cn": Counter({FETCHED: 9}),
        OTHER_HOSTS: Counter({FETCHED: 36}),
    }
    again = with_most({**kept, "new.cn": Counter({"timeout": 50})}, 1)
    assert again == {"new.cn": Counter({"timeout": 50}), OTHER_HOSTS: Counter({FETCHED: 55})}


def test_a_call_leaves_its_last_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(str(tmp_path), "download", 0, {})
    tallies = tmp_path / "tallies"
    with figures_of_call(context, Task("00007", {}), 50, tallies) as figures:
        (tallies / "1.json").write_text(json.dumps({"a.cn": {FETCHED: 3, "dns": 2}}))
        monkeypatch.setattr(figures, "_seconds", -1.0)
        figures.look(2)
        [path] = (tmp_path / "download" / FIGURES).iterdir()
        assert path.name.startswith("00007.")
        found = CallFigures.from_json(json.loads(path.read_text()))
        assert (found.num_rows, found.num_packed, found.is_over, found.num_done) == (50, 2, False, 5)
        assert found.curve[-1][1:] == (5, 3)
    assert CallFigures.from_json(json.loads(path.read_text())).is_over


def test_a_long_curve_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [NOW]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(store, "write_text", lambda path, text: None)
    (tmp_path / "tallies").mkdir()
    context: Any = Context(str(tmp_path), "download", 0, {})
    file = FiguresFile(context, Task("00000", {}), 1, tmp_path / "tallies")
    for _ in range(3000):
        clock[0] += 31
        file.write()
    times = [when for when, _, _ in file._curve]
    assert times[0] == NOW
    assert times == sorted(times)
    assert 400 < len(times) <= 1001
