"""The runner on small real stages: numbers in, text files out."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.cli.tables import closing_words
from pipeline.core import store
from pipeline.core.config import NOT_IN_DIGEST
from pipeline.core.records import ConfigError, InputError, Manifest, Receipt, too_few
from pipeline.core.run import Run, State, manifest_path, read_manifest, select, survey
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

NUM_FILES = 4


@dataclass(frozen=True, slots=True)
class SourceConfig:
    folder: str = field(metadata=NOT_IN_DIGEST)


@dataclass(frozen=True, slots=True)
class EvenConfig:
    below: int = 1000
    journal: str = field(default="", metadata=NOT_IN_DIGEST)  # one line a task that ran
    kill_in: str = field(default="", metadata=NOT_IN_DIGEST)  # task that kills its process half-way


def source_tasks(config: SourceConfig, context: Context) -> list[Task]:
    return [
        Task(path.stem, {"file": store.digest_file(str(path))}, {"path": str(path)})
        for path in sorted(Path(config.folder).glob("*.txt"))
    ]


def copy_source(config: SourceConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    text = store.read_text(task.arguments["path"])
    store.write_text(context.path("numbers", f"{task.name}.txt"), text)
    return Outcome({f"numbers/{task.name}.txt": len(text.split())}, len(text.split()), len(text.split()))


def even_tasks(config: EvenConfig, context: Context) -> list[Task]:
    return [
        Task(Path(shard.path).stem, {"numbers": shard.digest}, {"path": shard.path})
        for shard in context.parents["source"].shards
    ]


def keep_even(config: EvenConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    if config.journal:
        with open(config.journal, "a") as journal:
            journal.write(f"{task.name}\n")
    numbers = [
        int(word) for word in store.read_text(context.path_in("source", task.arguments["path"])).split()
    ]
    even = [number for number in numbers if number % 2 == 0]
    kept = [number for number in even if number < config.below]
    with store.publish(context.path(f"{task.name}.txt")) as temporary:
        Path(temporary).write_text(" ".join(map(str, kept)))
        if task.name == config.kill_in:
            os.kill(os.getpid(), signal.SIGKILL)
    dropped = {"odd": len(numbers) - len(even), "large": len(even) - len(kept)}
    return Outcome({f"{task.name}.txt": len(kept)}, len(numbers), len(kept), dropped)


def lose_rows(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    return Outcome({}, num_in=10, num_kept=7, dropped={"odd": 2})


def one_task(config: None, context: Context) -> list[Task]:
    return [Task("all", {})]


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    folder = tmp_path / "numbers"
    folder.mkdir()
    for number in range(NUM_FILES):
        (folder / f"{number:05d}.txt").write_text(" ".join(str(number * 10 + i) for i in range(10)))
    return folder


def _run(numbers: Path, folder: Path, config: EvenConfig | None = None, processes: int = 1) -> Run:
    source = Stage("source", "", 1, SourceConfig(str(numbers)), (), source_tasks, copy_source)
    even = Stage("even", "", 1, config or EvenConfig(), ("source",), even_tasks, keep_even)
    return Run(str(folder), 0, "local", processes, (source, even))


def _execute(run: Run, redo: bool = False) -> int:
    return runner.execute(run, run.stages, redo=redo)


def _states(run: Run) -> list[State]:
    return [status.state for status in survey(run)]


def _manifests(run: Run) -> list[str]:
    return [store.read_text(manifest_path(run, stage.name)) for stage in run.stages]


def _manifest(run: Run, stage: str) -> Manifest:
    manifest = read_manifest(run, stage)
    assert manifest is not None
    return manifest


def test_a_run_does_everything_once(numbers: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run = _run(numbers, tmp_path / "run", EvenConfig(below=30, journal=str(journal)))
    assert _states(run) == [State.TO_DO, State.TO_DO]
    assert survey(run)[1].why == "after source"
    assert _execute(run) == 2
    assert _states(run) == [State.DONE, State.DONE]
    even = _manifest(run, "even")
    assert (even.num_in, even.num_kept, even.dropped) == (40, 15, {"large": 5, "odd": 20})
    assert [shard.path for shard in even.shards] == [f"{number:05d}.txt" for number in range(NUM_FILES)]
    assert store.read_text(store.join(run.folder, "even", "00001.txt")) == "10 12 14 16 18"
    assert even.parents == {"source": store.digest_bytes(_manifest(run, "source").to_json().encode())}
    assert _execute(run) == 0
    assert journal.read_text().split() == [f"{number:05d}" for number in range(NUM_FILES)]


def test_several_processes_give_the_same_manifests(numbers: Path, tmp_path: Path) -> None:
    one, two = _run(numbers, tmp_path / "one"), _run(numbers, tmp_path / "two", processes=2)
    _execute(one)
    _execute(two)
    assert _manifests(one) == _manifests(two)
    assert runner.verify(two, two.stages) == []


def test_a_changed_setting_is_stale_and_never_silently_redone(numbers: Path, tmp_path: Path) -> None:
    _execute(_run(numbers, tmp_path / "run"))
    changed = _run(numbers, tmp_path / "run", EvenConfig(below=20))
    assert _states(changed) == [State.DONE, State.STALE]
    assert survey(changed)[1].why == "its configuration changed: below 1000 → 20"
    before = _manifests(changed)
    with pytest.raises(
        ConfigError, match=r"even is stale: its configuration changed: below 1000 → 20; run with --redo"
    ):
        _execute(changed)
    assert _manifests(changed) == before
    assert _states(_run(numbers, tmp_path / "run")) == [State.DONE, State.DONE]  # changed back: nothing lost
    assert _execute(changed, redo=True) == 1
    assert _manifest(changed, "even").num_kept == 10
    assert _states(changed) == [State.DONE, State.DONE]


def test_settings_that_change_no_bytes_are_not_stale(numbers: Path, tmp_path: Path) -> None:
    _execute(_run(numbers, tmp_path / "run"))
    run = _run(numbers, tmp_path / "run", EvenConfig(journal="elsewhere"), processes=2)
    assert _states(run) == [State.DONE, State.DONE]


def test_a_changed_input_redoes_its_own_tasks_alone(numbers: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run = _run(numbers, tmp_path / "run", EvenConfig(journal=str(journal)))
    _execute(run)
    (numbers / "00002.txt").write_text("2 4 6")
    assert _states(run) == [State.STALE, State.DONE]  # even still matches the source stage's old manifest
    with pytest.raises(ConfigError, match=r"source is stale: its inputs changed"):
        _execute(run)
    journal.unlink()
    assert _execute(run, redo=True) == 2
    assert journal.read_text().split() == ["00002"]
    assert store.read_text(store.join(run.folder, "even", "00002.txt")) == "2 4 6"
    fresh = _run(numbers, tmp_path / "fresh")
    _execute(fresh)
    # Apart from where the tables lie, a redone run is the run that never was another.
    assert _manifest(run, "even") == _manifest(fresh, "even")


def test_a_file_that_is_gone_leaves_the_manifest(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run")
    _execute(run)
    (numbers / "00003.txt").unlink()
    _execute(run, redo=True)
    assert [shard.path for shard in _manifest(run, "even").shards] == ["00000.txt", "00001.txt", "00002.txt"]
    assert store.list_files(store.join(run.folder, "even", "receipts")) == [
        "00000.json", "00001.json", "00002.json",
    ]  # fmt: skip


def test_a_task_whose_output_was_lost_is_done_again(numbers: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run = _run(numbers, tmp_path / "run", EvenConfig(journal=str(journal)))
    _execute(run)
    before = _manifests(run)
    os.remove(manifest_path(run, "even"))
    os.remove(tmp_path / "run" / "even" / "00001.txt")
    (tmp_path / "run" / "even" / "receipts" / "00003.json").write_text("{")  # damaged: counts for nothing
    journal.unlink()
    assert survey(run)[1].tasks_done == 2
    assert _execute(run) == 1
    assert sorted(journal.read_text().split()) == ["00001", "00003"]
    assert _manifests(run) == before


def test_redo_of_one_finished_stage(numbers: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run = _run(numbers, tmp_path / "run", EvenConfig(journal=str(journal)))
    _execute(run)
    before = _manifests(run)
    journal.unlink()
    assert runner.execute(run, [run.stage("even")], redo=True, force=True) == 1
    assert len(journal.read_text().split()) == NUM_FILES
    assert _manifests(run) == before


def test_verify_finds_a_flipped_byte_and_a_missing_file(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run")
    _execute(run)
    assert runner.verify(run, run.stages) == []
    flipped, gone = (tmp_path / "run" / "even" / f"0000{number}.txt" for number in (1, 2))
    data = bytearray(flipped.read_bytes())
    data[0] ^= 1
    flipped.write_bytes(data)
    gone.unlink()
    complaints = runner.verify(run, run.stages)
    assert len(complaints) == 2
    assert complaints[0].startswith(f"{flipped}: bytes differ")
    assert complaints[1].startswith(f"{gone}: missing")
    assert all("--stage even --repair" in line for line in complaints)
    assert runner.execute(run, [run.stage("even")], redo=False, repair=True) == 1  # the remedy heals
    assert runner.verify(run, run.stages) == []


def test_mend_redoes_damaged_tasks_alone(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run", EvenConfig(journal=str(tmp_path / "journal")))
    _execute(run)
    before = store.read_text(manifest_path(run, "even"))
    (tmp_path / "journal").write_text("")
    assert runner.execute(run, run.stages, redo=False, repair=True) == 0  # all is whole
    flipped, cut, gone = (tmp_path / "run" / "even" / f"0000{number}.txt" for number in range(3))
    flipped.write_bytes(bytes(reversed(flipped.read_bytes())))  # as long as before: only its bytes tell
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    (tmp_path / "run" / "even" / "receipts" / "00003.json").write_text("{")
    assert [status.state for status in survey(run)] == [State.DONE, State.DAMAGED]
    with pytest.raises(
        InputError,
        match=r"even/00001\.txt: \d+ bytes, not \d+ bytes, and 1 more; repair it: .* even --repair",
    ):
        runner.execute(run, run.stages, redo=False)
    assert runner.execute(run, run.stages, redo=False, repair=True) == 1  # what comes after is as it was
    assert (tmp_path / "journal").read_text().split() == ["00000", "00001", "00002", "00003"]
    (tmp_path / "journal").write_text("")
    cut.unlink()
    assert runner.execute(run, run.stages, redo=False, repair=True) == 1
    assert (tmp_path / "journal").read_text().split() == ["00001"]
    assert store.read_text(manifest_path(run, "even")) == before


@pytest.mark.parametrize("stage", ["source", "even"])
def test_repair_folds_a_damaged_manifest_anew(numbers: Path, tmp_path: Path, stage: str) -> None:
    run = _run(numbers, tmp_path / "run", EvenConfig(journal=str(tmp_path / "journal")))
    _execute(run)
    before = _manifests(run)
    (tmp_path / "journal").write_text("")
    path = Path(manifest_path(run, stage))
    for damage in (b"", b"[" * 100_000, path.read_bytes().replace(b"10", b"11"), b'{"stage": "even"}'):
        path.write_bytes(damage)
        (complaint,) = runner.verify(run, [run.stage(stage)])
        assert f"repair it: cnclip run RUN.toml --stage {stage} --repair" in complaint
        assert runner.execute(run, run.stages, redo=False, repair=True) == 1
        assert _manifests(run) == before
    assert (tmp_path / "journal").read_text() == ""  # no task was done again


def test_a_changed_fact_in_a_receipt_is_damage(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run", EvenConfig(journal=str(tmp_path / "journal")))
    _execute(run)
    before = _manifests(run)
    (tmp_path / "journal").write_text("")
    path = tmp_path / "run" / "even" / "receipts" / "00002.json"
    path.write_text(path.read_text().replace('"num_samples": 5', '"num_samples": 6'))
    assert runner.execute(run, run.stages, redo=False, repair=True) == 1
    assert (tmp_path / "journal").read_text().split() == ["00002"]
    assert _manifests(run) == before


def test_a_stage_whose_parent_lost_a_file_does_not_run(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run")
    runner.execute(run, run.stages[:1], redo=False)
    table = tmp_path / "run" / "source" / "numbers" / "00001.txt"
    table.write_text("1")
    with pytest.raises(
        InputError, match=r"00001\.txt: 1 bytes, not 29 bytes; even needs source; repair it: .* source"
    ):
        runner.execute(run, run.stages[1:], redo=False)
    assert runner.execute(run, run.stages, redo=False, repair=True) == 2


def test_bytes_that_no_reader_takes_are_blamed_on_the_file(
    numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(numbers, tmp_path / "run")
    runner.execute(run, run.stages[:1], redo=False)
    read, real = [], store.digest_file
    monkeypatch.setattr(store, "digest_file", lambda path: (read.append(path), real(path))[1])
    table = tmp_path / "run" / "source" / "numbers" / "00001.txt"
    table.write_text("x" * table.stat().st_size)  # of the same size: only its reader notices
    with pytest.raises(InputError, match=r"00001\.txt: not the bytes that were written; even needs source"):
        runner.execute(run, run.stages[1:], redo=False)
    assert "even: unexpected ValueError, so its inputs are being checked\n" in capsys.readouterr().err
    assert [Path(path).name for path in read if "/source/" in path] == [
        "00000.txt",
        "00001.txt",
    ]  # no further


@pytest.mark.parametrize("damage", ["nothing", "manifest", "folder"])
def test_an_unexpected_error_is_not_hidden_by_what_cannot_be_checked(
    numbers: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(numbers, tmp_path / "run")
    runner.execute(run, run.stages[:1], redo=False)

    def fail(*_: object) -> None:
        if damage == "manifest":
            Path(manifest_path(run, "source")).write_text("{")
        elif damage == "folder":
            Path(manifest_path(run, "source")).unlink()
            Path(manifest_path(run, "source")).mkdir()
        raise ZeroDivisionError("the real one")

    monkeypatch.setattr(runner, "_run_stage", lambda *_, **__: fail())
    with pytest.raises(ZeroDivisionError, match="the real one"):
        runner.execute(run, run.stages[1:], redo=False)


def test_damaged_outputs_of_a_stage_without_a_file_have_a_remedy_of_their_own(
    numbers: Path, tmp_path: Path
) -> None:
    run = _run(numbers, tmp_path / "run")
    stages = tuple(dataclasses.replace(stage, repair="make it again") for stage in run.stages)
    run = dataclasses.replace(run, stages=stages)
    _execute(run)
    (tmp_path / "run" / "even" / "00001.txt").write_text("")
    with pytest.raises(InputError, match=r"00001\.txt: 0 bytes, not \d+ bytes; make it again$"):
        runner.execute(run, run.stages, redo=False)
    Path(manifest_path(run, "even")).write_text("{")
    with pytest.raises(InputError, match=r"damaged manifest, which receipts can replace; make it again$"):
        survey(run)


def test_a_stage_behind_a_link_is_redone_there(numbers: Path, tmp_path: Path) -> None:
    run, other = _run(numbers, tmp_path / "run"), tmp_path / "other_disk"
    _execute(run)
    (tmp_path / "run" / "even").rename(other)
    (tmp_path / "run" / "even").symlink_to(other)
    for below in (20, 30):
        assert _execute(_run(numbers, tmp_path / "run", EvenConfig(below=below)), redo=True) == 1
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "even", "source"]
        assert (tmp_path / "run" / "even").is_symlink()
        assert (other / "manifest.json").exists()
    before = {path.name for path in other.iterdir()}
    other.rename(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match=r"a broken link to .*other_disk; mount or make"):
        _execute(_run(numbers, tmp_path / "run", EvenConfig(below=40)), redo=True)
    assert {path.name for path in (tmp_path / "unmounted").iterdir()} == before


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder"])
def test_the_lock_is_a_plain_file(numbers: Path, tmp_path: Path, kind: str) -> None:
    run, elsewhere = _run(numbers, tmp_path / "run"), tmp_path / "elsewhere"
    lock = Path(run.folder, ".lock")
    lock.parent.mkdir()
    if kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.write_text("precious")
    with pytest.raises(InputError, match=r"\.lock: a link or no plain file, .*; remove it"):
        _execute(run)
    assert elsewhere.exists() == (kind == "link")
    assert kind != "link" or elsewhere.read_text() == "precious"


def test_receipts_account_for_every_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"even/00000: 10 rows in, but 7 kept \+ 2 dropped"):
        Receipt("even", "00000", "", "", (), 10, 7, {"odd": 2}, 0.0)
    run = Run(str(tmp_path / "run"), 0, "local", 1, (Stage("lossy", "", 1, None, (), one_task, lose_rows),))
    with pytest.raises(ValueError, match=r"lossy/all: 10 rows in"):
        _execute(run)
    assert not store.exists(store.join(run.folder, "lossy", "receipts", "all.json"))
    assert _states(run) == [State.TO_DO]


def ask_for_many(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    left = context.parents["even"].num_kept
    raise too_few(ConfigError(f"[batch] size = 100, but there are {left} numbers"), left)


def test_an_error_of_too_few_rows_names_the_funnel(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run", EvenConfig(below=20))
    batch = Stage("batch", "", 1, None, ("even",), one_task, ask_for_many)
    with pytest.raises(ConfigError) as caught:
        _execute(dataclasses.replace(run, stages=(*run.stages, batch)))
    assert str(caught.value) == (
        "[batch] size = 100, but there are 10 numbers; 10 samples are left of 40: even dropped 30"
        " (odd 20, large 10)"
    )


def test_no_rows_left_names_the_rules(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run", EvenConfig(below=0))
    with pytest.raises(InputError) as caught:
        _execute(run)
    message = str(caught.value)
    assert "no rows left of 40 after even" in message
    assert "odd removed 20" in message
    assert "large removed 20" in message
    assert read_manifest(run, "even") is None


def test_one_run_at_a_time(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run")
    os.makedirs(run.folder)
    with open(os.path.join(run.folder, ".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another command is at work here"):
            _execute(run)
    assert _states(run) == [State.TO_DO, State.TO_DO]
    assert _execute(run) == 2


@pytest.mark.parametrize("task", ["00000", "00002"])
def test_a_killed_run_goes_on_to_the_same_manifests(numbers: Path, tmp_path: Path, task: str) -> None:
    whole = _run(numbers, tmp_path / "whole")
    _execute(whole)
    killed = _run(numbers, tmp_path / "killed", EvenConfig(kill_in=task))
    process = multiprocessing.get_context("fork").Process(target=_execute, args=(killed,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert read_manifest(killed, "even") is None
    assert not store.exists(store.join(killed.folder, "even", f"{task}.txt"))
    journal = tmp_path / "journal"
    again = _run(numbers, tmp_path / "killed", EvenConfig(journal=str(journal)))
    assert survey(again)[1].tasks_done == int(task)
    assert _execute(again) == 1
    assert len(journal.read_text().split()) == NUM_FILES - int(task)
    assert _manifests(again) == _manifests(whole)


def test_a_killed_worker_process_is_said_in_one_line(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run", EvenConfig(kill_in="00001"), processes=2)
    with pytest.raises(InputError, match="a worker process was killed") as caught:
        _execute(run)
    assert "\n" not in str(caught.value)
    whole = _run(numbers, tmp_path / "whole")
    _execute(whole)
    again = _run(numbers, tmp_path / "run", processes=2)
    _execute(again)
    assert _manifests(again) == _manifests(whole)


def test_half_done_work_of_another_setting_is_stale(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run")
    _execute(run)
    os.remove(manifest_path(run, "even"))
    changed = _run(numbers, tmp_path / "run", EvenConfig(below=20))
    assert _states(changed) == [State.DONE, State.STALE]
    with pytest.raises(ConfigError, match="even is stale"):
        _execute(changed)


def test_a_damaged_manifest_is_named(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run")
    _execute(run)
    Path(manifest_path(run, "source")).write_text('{"stage": "source"}')
    with pytest.raises(InputError, match=r"source/manifest\.json: damaged manifest"):
        survey(run)


def test_manifests_and_receipts_hold_no_times(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run")
    _execute(run)
    assert "seconds" not in json.loads(_manifests(run)[1])
    receipt = Receipt.from_json(store.read_text(store.join(run.folder, "even", "receipts", "00000.json")))
    assert receipt.seconds >= 0
    assert Receipt.from_json(receipt.to_json()) == receipt


def test_selecting_stages(numbers: Path, tmp_path: Path) -> None:
    run = _run(numbers, tmp_path / "run")
    assert [stage.name for stage in select(run, None, None, "source")] == ["source"]
    assert [stage.name for stage in select(run, None, "even", None)] == ["even"]
    assert [stage.name for stage in select(run, "even", None, None)] == ["even"]
    with pytest.raises(ConfigError, match="evn: no such stage in this run; it has source, even"):
        select(run, "evn", None, None)
    with pytest.raises(ConfigError, match="comes after"):
        select(run, None, "even", "source")
    with pytest.raises(ConfigError, match="even comes after source, which is not done"):
        runner.execute(run, [run.stage("even")], redo=False)


def test_a_run_in_an_object_store(numbers: Path, tmp_path: Path) -> None:
    whole = _run(numbers, tmp_path / "run")
    _execute(whole)
    remote = Run(f"memory://{tmp_path.name}-runner", 0, "local", 1, whole.stages)
    assert _execute(remote) == 2
    assert _execute(remote) == 0
    assert _manifests(remote) == _manifests(whole)
    assert runner.verify(remote, remote.stages) == []


def test_a_run_ends_with_its_report_only_while_that_is_of_its_state(numbers: Path, tmp_path: Path) -> None:
    def named_report(below: int) -> Run:
        run = _run(numbers, tmp_path / "run", EvenConfig(below=below))
        return dataclasses.replace(
            run, stages=(run.stages[0], dataclasses.replace(run.stages[1], name="report"))
        )

    run = named_report(1000)
    runner.execute(run, run.stages[:1], redo=False)
    assert closing_words(run, 1, 1) == "stages done: 1; `cnclip plan` shows what the run still has to do"
    runner.execute(run, run.stages, redo=False)
    store.write_text(str(tmp_path / "run" / "report" / "headline.txt"), "R@1 82.5")
    assert closing_words(run, 1, 2).startswith("R@1 82.5\n\nreport: ")
    assert closing_words(run, 0, 2).startswith("nothing to do: all 2 stages are done\n\nR@1 82.5")
    assert "82.5" not in closing_words(named_report(10), 1, 2)  # its report is of other settings
