"""Hashes source files by the run's executor before a stage is planned, which then knows their digests."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core import store
from pipeline.core.files.known_digests import digests_of_files
from pipeline.core.run import Run
from pipeline.core.stage import Stage, Task
from pipeline.executors.anywhere import map_anywhere

_FEW_BYTES = 1 << 30  # are hashed here, in about a second


@dataclass(frozen=True, slots=True)
class _Hashed:
    """A file's sha256, hex."""

    task: str
    digest: str


def hash_sources(run: Run, stage: Stage) -> None:
    """Hash the files from outside the run that a stage is bound to, on all machines of a cluster.

    One machine reads no faster than its network: a terabyte in a quarter of an hour at 10 Gbit/s. Without a
    cluster `digests_of_files` uses all cores by itself.

    Raises:
        InputError: for a file that cannot be read.
    """
    if run.executor == "ray" and stage.sources is not None:
        digests_of_files(stage.sources(stage.config), hash_all=functools.partial(_hash_all, run))


def _hash_all(run: Run, paths: Sequence[str]) -> list[str]:
    if sum(map(store.num_bytes, paths)) <= _FEW_BYTES:
        return list(map(store.digest_file, paths))
    tasks = [Task(f"{number:05d}", {}, {"path": path}) for number, path in enumerate(paths)]
    found = {hashed.task: hashed.digest for hashed in map_anywhere(run, _hash, tasks)}
    return [found[task.name] for task in tasks]


def _hash(task: Task) -> _Hashed:
    return _Hashed(task.name, store.digest_file(task.arguments["path"]))
