"""Tasks that fail: tried again, set aside, counted; the others are done all the same."""

import dataclasses
import errno
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.core import store
from pipeline.core.config import NOT_IN_DIGEST
from pipeline.core.failures import PARTITION_FAILED, failed_tasks, outage
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import Run, make_context, read_manifest, survey
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

NUM_TASKS = 40
ROWS = 3  # of each task


@dataclass(frozen=True, slots=True)
class Plan:
    """What each task does, by the number of its try."""

    journal: str = field(metadata=NOT_IN_DIGEST)  # a folder: one file a try
    fails: dict[str, tuple[str, ...]] = field(default_factory=dict, metadata=NOT_IN_DIGEST)


def tasks(config: Plan, context: Context) -> list[Task]:
    return [Task(f"{number:05d}", {"rows": str(number)}) for number in range(NUM_TASKS)]


def work(config: Plan, context: Context, task: Task, progress: Progress) -> Outcome:
    tries = len([name for name in os.listdir(config.journal) if name.startswith(task.name)])
    Path(config.journal, f"{task.name}.{tries}").touch()
    planned = config.fails.get(task.name, ())
    if tries < len(planned):
        fail(planned[tries], task)
    store.write_text(context.path(f"{task.name}.txt"), "done")
    return Outcome({f"{task.name}.txt": ROWS}, ROWS, ROWS)


def fail(how: str, task: Task) -> None:
    match how:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "input":
            raise InputError(f"part {task.name}: bad row")
        case "value":
            raise ValueError("odd")
        case "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data")
        case "settings":
            raise ConfigError("no such list")


def drop_all(config: Plan, context: Context, task: Task) -> Outcome:
    return Outcome({}, ROWS, 0, {str(PARTITION_FAILED): ROWS})


def stage_of(folder: Path, fails: dict[str, tuple[str, ...]]) -> Stage:
    (folder / "journal").mkdir(exist_ok=True, parents=True)
    return Stage("work", "", 1, Plan(str(folder / "journal"), fails), (), tasks, work, set_aside=drop_all)


def run_of(
    folder: Path, fails: dict[str, tuple[str, ...]], processes: int = 1, max_failed_tasks: int = 0
) -> Run:
    return Run(str(folder / "run"), 0, "local", processes, (stage_of(folder, fails),), max_failed_tasks)


def execute(run: Run) -> None:
    runner.execute(run, run.stages, redo=False)


def done(folder: Path) -> int:
    return len(list((folder / "run" / "work").glob("*.txt")))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_task_that_fails_twice_is_done_the_third_time(tmp_path: Path, processes: int) -> None:
    run = run_of(tmp_path, {"00001": ("input", "value"), "00039": ("input",)}, processes)
    execute(run)
    manifest = read_manifest(run, "work")
    assert manifest is not None
    assert (manifest.num_kept, manifest.dropped) == (ROWS * NUM_TASKS, {})
    assert len(os.listdir(tmp_path / "journal")) == NUM_TASKS + 3
    assert not (tmp_path / "run" / "work" / "failed").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_the_others_are_done_before_the_stage_ends_with_the_list(tmp_path: Path, processes: int) -> None:
    run = run_of(tmp_path, {"00003": ("input",) * 3, "00001": ("value",) * 3}, processes)
    with pytest.raises(InputError) as caught:
        execute(run)
    said = str(caught.value)
    assert said.startswith("ValueError: odd; task 00001 of work failed 3 times, last on ")
    assert "and so did 1 of the other 39 (00003); see " in said
    assert said.endswith(
        "repair it and rerun to try again, or continue without these rows with --without-failed"
    )
    assert done(tmp_path) == NUM_TASKS - 2
    context = make_context(run, run.stage("work"))
    assert context is not None
    assert failed_tasks(context) == ["00001", "00003"]
    [status] = survey(run)
    assert status.why == f"2 tasks failed when it was last run, see {context.path('failed')}"
    noted = json.loads((tmp_path / "run" / "work" / "failed" / "00001.json").read_text())
    assert (noted["error"], noted["tries"]) == ("ValueError: odd", 3)
    assert 'raise ValueError("odd")' in noted["trace"]
    execute(run)  # each has failed as often as it was to
    assert done(tmp_path) == NUM_TASKS
    assert failed_tasks(context) == []


def test_a_stage_that_needs_all_its_tasks_says_so(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"00003": ("input",) * 9}, 1)
    [stage] = run.stages
    for more, end in (
        ({}, "; repair it and rerun to try again"),
        (
            {"max_failed_tasks": 9},
            "; work cannot continue without a task, as --without-failed and max_failed_tasks ask",
        ),
        (
            {"stages": (dataclasses.replace(stage, set_aside=None, without_task="remove it"),)},
            "again; remove it",
        ),
    ):
        given = dataclasses.replace(run, **{"stages": (dataclasses.replace(stage, set_aside=None),), **more})
        with pytest.raises(InputError) as caught:
            execute(given)
        assert str(caught.value).endswith(end)


def test_a_task_that_kills_its_process_is_found_and_named(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"00005": ("kill",) * 9}, processes=2)
    with pytest.raises(
        InputError, match=r"a worker process was killed, .*; task 00005 of work failed 3 times"
    ):
        execute(run)
    assert done(tmp_path) == NUM_TASKS - 1


@pytest.mark.slow
def test_a_process_that_is_killed_once_costs_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"00005": ("kill",), "00006": ("kill",)}, processes=2)
    execute(run)
    assert done(tmp_path) == NUM_TASKS


def test_a_run_may_continue_without_some_tasks_and_counts_their_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = {"00003": ("input",) * 3, "00001": ("input",) * 3}
    with pytest.raises(InputError, match="failed 3 times"):
        execute(run_of(tmp_path, fails, max_failed_tasks=1))
    for path in (tmp_path / "journal").iterdir():
        path.unlink()
    run = run_of(tmp_path, fails, max_failed_tasks=2)
    execute(run)
    manifest = read_manifest(run, "work")
    assert manifest is not None
    assert (manifest.num_in, manifest.num_kept) == (ROWS * NUM_TASKS, ROWS * (NUM_TASKS - 2))
    assert manifest.dropped == {"partition_failed": 2 * ROWS}
    assert "work: continuing without the 3 rows of task 00001" in capsys.readouterr().err
    assert runner.execute(run, run.stages, redo=False) == 0


def test_a_stage_stops_early_where_most_tasks_fail(tmp_path: Path) -> None:
    fails = {f"{number:05d}": ("input",) * 3 for number in range(NUM_TASKS)}
    with pytest.raises(InputError, match=r"and so did 10 of the other 39 \(00001, .*00005 and 5 more\)"):
        execute(run_of(tmp_path, fails, max_failed_tasks=NUM_TASKS))
    assert len(os.listdir(tmp_path / "journal")) == 11 * 3


@pytest.mark.parametrize(("how", "error"), [("disk", OSError), ("settings", ConfigError)])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_concerns_all_tasks_ends_the_stage_at_once(
    tmp_path: Path, how: str, error: type[Exception], processes: int
) -> None:
    with pytest.raises(error):
        execute(run_of(tmp_path, {"00000": (how,)}, processes))
    assert done(tmp_path) < NUM_TASKS
    execute(run_of(tmp_path, {}, processes))
    assert done(tmp_path) == NUM_TASKS


def test_an_outage_is_the_machines() -> None:
    from pipeline.core.failures import is_of_machine

    assert is_of_machine(outage(InputError("no network")))
    assert not is_of_machine(InputError("bad row"))
    assert is_of_machine(OSError(errno.ENOSPC, "full"))
    assert not is_of_machine(OSError(errno.ENOENT, "gone"))
