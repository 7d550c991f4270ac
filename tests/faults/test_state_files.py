"""Damaged state files of a run: commands answer with lines, and `run --repair` brings back every byte."""

import atexit
import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import runner
from pipeline.cli.tables import plan_table, status_table
from pipeline.core import store
from pipeline.core.files import durability
from pipeline.core.files.sealed import unseal
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import Run, survey_what_is_there
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task
from tests.faults.fuzzing import COUNTS, Case, fuzz
from tests.helpers.small_run import SmallRun

NUM_TASKS = 3


def source_tasks(config: None, context: Context) -> list[Task]:
    return [Task(f"{number:05d}", {"number": str(number)}) for number in range(NUM_TASKS)]


def write_numbers(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    store.write_text(context.path("numbers", f"{task.name}.txt"), task.name * 3)
    store.write_text(context.path("site", f"{task.name}.txt"), task.name)
    output = {f"numbers/{task.name}.txt": 3}
    return Outcome(output, 4, 3, {"odd": 1}, {"first": task.name}, also=[f"site/{task.name}.txt"])


def double_tasks(config: None, context: Context) -> list[Task]:
    return [
        Task(Path(shard.path).stem, {"numbers": shard.digest}) for shard in context.parents["source"].shards
    ]


def double(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    text = store.read_text(context.path_in("source", "numbers", f"{task.name}.txt"))
    store.write_text(context.path(f"{task.name}.txt"), text * 2)
    return Outcome({f"{task.name}.txt": 6}, 3, 3, {}, {"nothing": float("nan")})


def numbers_run(folder: Path) -> Run:
    source = Stage("source", "", 1, None, (), source_tasks, write_numbers)
    doubled = Stage("double", "", 1, None, ("source",), double_tasks, double)
    return Run(str(folder), 0, "local", 1, (source, doubled))


@functools.cache
def _finished_numbers() -> Path:
    """A finished run to copy, made once in a process that judges."""
    folder = _own_folder()
    run = numbers_run(folder / "run")
    runner.execute(run, run.stages, redo=False)
    return folder / "run"


@functools.cache
def _finished_small() -> tuple[SmallRun, Path]:
    """A run whose folder is to be filled with a copy of what undisturbed runs leave."""
    folder = _own_folder()
    run = SmallRun(folder)
    assert run.command().status == 0
    shutil.copytree(run.folder, folder / "whole")
    return run, folder / "whole"


def _own_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="state-files-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _content(name: str, data: bytes) -> object:
    """A file's bytes; of a state file what it says: a further line end or a lost seal changes nothing."""
    if not name.endswith((".json", ".files")):
        return data
    fields = unseal(data)
    digests = {"config_digest", "inputs_digest"}
    return {key: fields[key] for key in digests} if name.endswith("started.json") else fields


def _files(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): _content(path.name, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != ".lock"
        and (path.parent.name, path.suffix) != ("receipts", ".json")
    }


def _state_files(folder: Path) -> list[Path]:
    """Receipts and their listings, started.json, manifest.json, the lock and the resolved settings."""
    names = ("started.json", "manifest.json", ".lock", "run.resolved.toml")
    return [
        path for path in sorted(folder.rglob("*")) if path.name in names or path.parent.name == "receipts"
    ]


def _another_value(fields: Any, rng: random.Random) -> Any:
    """Put something else in one place of a JSON value, however deep."""
    values: list[Any] = [
        None, True, -1, 0, 1.5, "", "x", "\0", "../../etc/passwd", [], {}, [[]], {"a": {}}, float("nan"),
        float("inf"), 10**400, "汉", "\ud800", [None], 2**63,
    ]  # fmt: skip
    if isinstance(fields, dict) and fields and rng.random() < 0.85:
        key = rng.choice(list(fields))
        if rng.random() < 0.15:
            value = fields.pop(key)
            return fields if rng.random() < 0.5 else {**fields, f"{key}x": value}
        return {**fields, key: _another_value(fields[key], rng)}
    if isinstance(fields, list) and fields and rng.random() < 0.85:
        place = rng.randrange(len(fields))
        return [*fields[:place], _another_value(fields[place], rng), *fields[place + 1 :]]
    return rng.choice(values)


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 1, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _edit(data: bytes, rng: random.Random) -> bytes:
    try:
        fields = json.loads(data)
    except ValueError:
        return data[::-1]
    return json.dumps(_another_value(fields, rng)).encode()


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, rng: b"",
    "cut": lambda data, rng: data[: rng.randrange(len(data) or 1)],
    "flipped": _flip,
    "edited": _edit,
    "deep": lambda data, rng: rng.choice((b"[", b'{"a":')) * rng.choice((1_000, 100_000)),
    "huge number": lambda data, rng: b'{"num_in": ' + b"9" * 5_000 + b"}",
    "other JSON": lambda data, rng: rng.choice((b"null", b"0", b'"x"', b"[]", b"{}", b'["another"]', b"NaN")),
    "not UTF-8": lambda data, rng: b"\xff\xfe" + data,
    "longer": lambda data, rng: data + rng.choice((b"\n", b"}", b"\0" * 100, data)),
    "zeros": lambda data, rng: bytes(len(data)),
}


def _damage_one(folder: Path, rng: random.Random) -> str:
    """Damage, remove or replace one state file; returns what was done."""
    path = rng.choice(_state_files(folder))
    how = rng.choice([*DAMAGE, "removed", "a folder", "another file's", "a link to nowhere"])
    if how in DAMAGE:
        path.write_bytes(DAMAGE[how](path.read_bytes(), rng))
    elif how == "another file's":
        shutil.copyfile(rng.choice(_state_files(folder)), folder / "copy")
        os.replace(folder / "copy", path)
    else:
        path.unlink()
        if how == "a folder":
            (path / "inside").mkdir(parents=True)
        elif how == "a link to nowhere":
            path.symlink_to(folder / "nowhere")
    return f"{path.name}: {how}"


def _error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (InputError, ConfigError, OSError) as error:  # a line each for who uses the command
        return str(error)
    return ""


def judge_a_state_file(case: Case) -> str:
    """One of three: all stages are done, one is half done, or an output is damaged as well."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    durability.forget_folders()
    run = numbers_run(case.folder / "run")
    folder = Path(run.folder)
    shutil.copytree(_finished_numbers(), folder)
    whole = _files(folder)
    half_done = case.rng.random() < 0.3
    if half_done:
        (folder / "double" / "manifest.json").unlink()
        (folder / "double" / "receipts" / "00001.json").unlink()
    if case.rng.random() < 0.3:
        (folder / case.rng.choice(["source/site/00002.txt", "double/00000.txt"])).write_text("x")
    done = _damage_one(folder, case.rng)
    statuses, _ = survey_what_is_there(run)
    assert plan_table(statuses)
    assert status_table(run, statuses)
    runner.verify(run, run.stages)
    for repair in (False, True):
        error = _error_of(lambda repair=repair: runner.execute(run, run.stages, redo=False, repair=repair))
        assert "\n" not in error, done
        if "remove it" in error and done.startswith(".lock"):
            return "refused"
        if "--redo" in error and done == "started.json: another file's":
            return "refused"  # what half-done work is made from is not to be told
        assert not repair or error == "", f"{done}: {error}"
    assert _files(folder) == whole, f"{done}: {_files(folder).keys() ^ whole.keys()}"
    assert runner.verify(run, run.stages) == [], done
    return "repaired"


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_state_file_is_repaired(count: int) -> None:
    assert fuzz(judge_a_state_file, count)["repaired"] > 0.9 * count


def judge_a_command(case: Case) -> str:
    """The commands of a real run; an exception that escapes them is what a user sees as a traceback."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    durability.forget_folders()
    run, start = _finished_small()
    run.clear()
    shutil.copytree(start, run.folder)
    whole = run.files()
    done = _damage_one(run.folder, case.rng)
    for name, *words in (["status"], ["plan"], ["why", "http://a.cn/one/1.jpg"], ["verify"], ["run"]):
        ended = run.command(name, *words)
        assert "Traceback" not in ended.error
        assert ended.status in (0, 1, 2), f"{done}: {name}: {ended.error}"
    ended = run.command("run", "--repair")
    if done.startswith(".lock") and ended.status:
        return "refused"
    assert ended.status == 0, f"{done}: {ended.error}"
    assert run.files().keys() == whole.keys(), done
    found = run.files()
    same = {name for name in found if _content(name, found[name]) == _content(name, whole[name])}
    assert same == whole.keys(), f"{done}: {whole.keys() - same}"
    return "repaired"


@pytest.mark.parametrize(
    "count", [pytest.param(10, id="some"), pytest.param(200, id="many", marks=pytest.mark.slow)]
)
def test_commands_survive_a_damaged_state_file(count: int) -> None:
    assert fuzz(judge_a_command, count)["repaired"] > 0.8 * count
