"""A run of two small real stages: numbers in text files, and the even ones among them."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import runner
from pipeline.core import store
from pipeline.core.config import NOT_IN_DIGEST
from pipeline.core.records import Manifest
from pipeline.core.run import Run, State, manifest_path, read_manifest, survey
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


def number_run(numbers: Path, folder: Path, config: EvenConfig | None = None, processes: int = 1) -> Run:
    source = Stage("source", "", 1, SourceConfig(str(numbers)), (), source_tasks, copy_source)
    even = Stage("even", "", 1, config or EvenConfig(), ("source",), even_tasks, keep_even)
    return Run(str(folder), 0, "local", processes, (source, even))


def execute(run: Run, redo: bool = False) -> int:
    return runner.execute(run, run.stages, redo=redo)


def states(run: Run) -> list[State]:
    return [status.state for status in survey(run)]


def manifests(run: Run) -> list[str]:
    return [store.read_text(manifest_path(run, stage.name)) for stage in run.stages]


def manifest_of(run: Run, stage: str) -> Manifest:
    manifest = read_manifest(run, stage)
    assert manifest is not None
    return manifest
