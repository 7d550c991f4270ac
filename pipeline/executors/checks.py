"""Reads a stage's files again and compares them with what was recorded, wherever the run's tasks run."""

import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from pipeline.core import store
from pipeline.core.files.damage import ListedSizes
from pipeline.core.progress import make_progress
from pipeline.core.records import Shard
from pipeline.core.run import Run
from pipeline.core.stage import Task
from pipeline.executors.anywhere import map_anywhere

MISSING = "missing"
DIFFERENT = "bytes differ from what was written"
_FEW_BYTES = 1 << 30  # are hashed here, in about a second: as long as it takes to start another process
_TASK_BYTES = 2 << 30
_TASK_FILES = 1000


@dataclass(frozen=True, slots=True)
class Checked:
    """Files that a task has read: how many, and those that are altered or gone."""

    task: str
    num_files: int
    altered: dict[int, str]  # number of a file → what is wrong


def find_altered(
    run: Run, stage: str, files: Sequence[Shard], label: str = ""
) -> Generator[tuple[Shard, str], None, None]:
    """Yield the files of a stage's folder that are missing or altered, with what is wrong with them.

    Missing and truncated files are seen in a listing; the others are read, many by the run's executor. With a
    `label` progress is shown.

    Raises:
        InputError, OSError: for a file that cannot be read: whether it is whole is not known.
    """
    folder = store.join(run.folder, stage)
    sizes = ListedSizes(folder)
    to_read: list[Shard] = []
    for file in files:
        size = sizes.of(file.path)
        if size == file.num_bytes:
            to_read.append(file)
        else:
            yield file, MISSING if size is None else DIFFERENT
    progress = make_progress(label, "file") if label and to_read else None
    done = 0
    is_little = sum(file.num_bytes for file in to_read) <= _FEW_BYTES
    tasks = _tasks(to_read, 1 if is_little else _TASK_FILES)
    check = functools.partial(_check, folder)
    for checked in map(check, tasks) if is_little else map_anywhere(run, check, tasks):
        for number, what in checked.altered.items():
            yield to_read[number], what
        done += checked.num_files
        if progress is not None:
            progress(done, len(to_read))


def _tasks(files: Sequence[Shard], most_files: int) -> list[Task]:
    """Return the tasks that read some files: one file or many, so that none takes long or is too short."""
    groups: list[list[tuple[int, str, str]]] = []
    num_bytes = 0
    for number, file in enumerate(files):
        if not groups or num_bytes + file.num_bytes > _TASK_BYTES or len(groups[-1]) >= most_files:
            groups.append([])
            num_bytes = 0
        groups[-1].append((number, file.path, file.digest))
        num_bytes += file.num_bytes
    return [Task(f"{number:05d}", {}, {"files": group}) for number, group in enumerate(groups)]


def _check(folder: str, task: Task) -> Checked:
    altered = {}
    files: Sequence[tuple[int, str, str]] = task.arguments["files"]
    for number, name, digest in files:
        path = store.join(folder, name)
        try:
            if store.digest_file(path) != digest:
                altered[number] = DIFFERENT
        except FileNotFoundError:
            altered[number] = MISSING
        except OSError as error:
            error.filename = error.filename or path  # a disk that cannot read names no file
            raise
    return Checked(task.name, len(files), altered)
