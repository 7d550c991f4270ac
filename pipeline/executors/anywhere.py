"""Independent pieces of work that publish nothing, such as hashing files, wherever the run's tasks run."""

import functools
from collections.abc import Callable, Iterator, Sequence

from pipeline.core.failures import Failure
from pipeline.core.records import InputError
from pipeline.core.run import Run
from pipeline.core.stage import Task
from pipeline.executors import local
from pipeline.executors.local import Found


def map_anywhere(run: Run, do: Callable[[Task], Found], tasks: Sequence[Task]) -> Iterator[Found]:
    """Yield what `do` returns of each task, in any order: from processes of this machine, or from a cluster.

    `do` and what it returns are sent to other processes: it is a function of a module, or a partial of one.

    Raises:
        InputError: for a task that fails as often as a stage's task may, and for a machine that can do none.
    """
    tried = functools.partial(_try, do)
    if run.executor == "ray":
        from pipeline.executors.ray import map_tasks

        found = map_tasks(functools.partial(local.do_group, tried), tasks, run.processes)
    else:
        found = local.each(tried, tasks, run.processes)
    for item in found:
        if isinstance(item, Failure):
            raise InputError(item.error)
        yield item


def _try(do: Callable[[Task], Found], task: Task) -> Found | Failure:
    try:
        return do(task)
    except BaseException as error:  # a panic of a parser in Rust is no Exception
        return Failure.of(task, error)
