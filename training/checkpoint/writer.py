"""Writes checkpoints by a thread, from a copy in the host's memory, while training continues."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from training.checkpoint.host_memory import HostMemory


class CheckpointWriter(contextlib.AbstractContextManager["CheckpointWriter"]):
    """At most one checkpoint is being written at a time, from `memory`; leaving the context waits for it."""

    def __init__(self) -> None:
        self.memory = HostMemory()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Have a thread call `write`; `wait` comes before."""
        assert self._under_way is None
        self._under_way = self._threads.submit(write)

    def check(self) -> None:
        """Raise what the thread has failed with, if it has; do not wait for it."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was started is written; `memory` is free then.

        Raises:
            InputError: with what the checkpoint could not be written for.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()
        self.memory.close()
