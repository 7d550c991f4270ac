"""Processes that decode images into a ring of memory that they share with the process that wants them."""

import collections
import contextlib
import mmap
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any, Self

import numpy as np

from pipeline.core.processes import STOP_SIGNALS, import_environment
from pipeline.core.records import InputError
from training.data.auto_augment import Pixels
from training.data.image_parts import LeftOut, Part, ReaderConfig, Wanted
from training.model.transfer import pin, unpin

REQUESTS_AHEAD = 3  # that the ring holds: one that is taken out, and two that are filled
_IMAGES_OF_PART = 16  # some 20 ms of work
_PARTS_OF_WORKER = 2  # under way at once, so that none waits for its next


class Views:
    """The views of a request, being computed in a slot of the ring."""

    def __init__(self, slot: int, views_BHWC: Pixels, num_parts: int) -> None:
        self.slot, self._views_BHWC, self._missing = slot, views_BHWC, num_parts
        self._lock, self._done = threading.Lock(), threading.Event()
        self._errors: dict[int, Exception] = {}
        self.left_out: LeftOut = {}  # once they are there: rows without an image, with the reasons

    def wait(self) -> Pixels:
        """Return the views, uint8 RGB [B, H, W, 3]; they are the ring's memory until it is given back.

        Raises:
            InputError: if an image cannot be read, or a worker has died.
        """
        self._done.wait()
        if self._errors:
            raise self._errors[min(self._errors)]
        return self._views_BHWC

    def finish_part(self, first_row: int, answer: LeftOut | Exception | None) -> None:
        """Note that a part is there, and what it left out or raised."""
        with self._lock:
            self._missing -= 1
            if isinstance(answer, Exception):
                self._errors[first_row] = answer
            elif answer:
                self.left_out |= {first_row + row: reason for row, reason in answer.items()}
            if not self._missing:
                self._done.set()

    def fail(self, error: Exception) -> None:
        """Note that nothing more comes."""
        with self._lock:
            if not self._done.is_set():
                self._errors = {0: error}
                self._done.set()


@dataclass(slots=True)
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    connection: "Connection[Any, Any]"
    thread: threading.Thread | None = None
    under_way: collections.deque[tuple[Part, Views]] = field(default_factory=collections.deque)


class ImageWorkers(contextlib.AbstractContextManager["ImageWorkers"]):
    """`number` processes and their ring, whose slots hold `most_images` views each.

    The thread that makes it must outlive it: the kernel ends the workers with that thread.
    """

    def __init__(
        self,
        number: int,
        config: ReaderConfig,
        *,
        most_images: int,
        pinned: bool = False,
        remedy: str = "lower workers_per_rank",
    ) -> None:
        """Start the processes; `pinned` memory can be copied to a GPU behind the host's back.

        `remedy` is what the message of a worker's death says to do if there was no memory left.
        """
        self._config, self.most_images, self._remedy = config, most_images, remedy
        side = config.image_size_px
        # Without a name anywhere: it is gone with the last process that has it open, however that ended.
        with contextlib.closing(_Memory(REQUESTS_AHEAD * most_images * side * side * 3)) as memory:
            ring = mmap.mmap(memory.fd, memory.num_bytes)
            self._ring_RHWC = np.frombuffer(ring, dtype=np.uint8).reshape(-1, side, side, 3)
            self._is_pinned = pinned
            if pinned:
                pin(self._ring_RHWC)
            self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
            for slot in range(REQUESTS_AHEAD):
                self._free.put(slot)
            self._parts: queue.SimpleQueue[tuple[Part, Views] | None] = queue.SimpleQueue()
            self._lock = threading.Lock()
            self._requests: set[Views] = set()
            self._error: Exception | None = None  # why nothing is computed any more
            self._workers = [_start(one, memory.fd) for one in range(number)]
        for worker in self._workers:
            worker.thread = threading.Thread(
                target=self._serve, args=(worker,), name=f"image worker {worker.number}", daemon=True
            )
            worker.thread.start()

    @property
    def processes(self) -> list[int]:
        """Return the workers' process ids."""
        return [worker.process.pid for worker in self._workers]

    @property
    def are_running(self) -> bool:
        """Return whether they can take requests: they end with the thread that made them, at the latest."""
        return self._error is None and all(worker.process.poll() is None for worker in self._workers)

    def request(self, wanted: Wanted, num_views: int = 1) -> Views | None:
        """Have so many views of each image computed; wait for a free slot, and return None if closed.

        Raises:
            InputError: if a worker has died.
        """
        slot = self._free.get()
        if slot is None:
            return None
        first, num_images = slot * self.most_images, len(wanted) * num_views
        at_once = max(1, min(_IMAGES_OF_PART // num_views, -(-len(wanted) // len(self._workers))))
        starts = range(0, len(wanted), at_once)
        views = Views(slot, self._ring_RHWC[first : first + num_images], len(starts))
        with self._lock:
            if self._error is not None:
                raise self._error
            self._requests.add(views)
        for start in starts:
            some = wanted[start : start + at_once]
            self._parts.put((Part(some, first, start * num_views, len(some) * num_views), views))
        return views

    def give_back(self, views: Views) -> None:
        """Let the slot of a request be used again."""
        with self._lock:
            self._requests.discard(views)
        self._free.put(views.slot)

    def close(self) -> None:
        """End the processes; requests that are under way fail."""
        self._fail(InputError("the image workers are closed"))
        self._free.put(None)
        for worker in self._workers:
            self._parts.put(None)
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            if worker.thread is not None:
                worker.thread.join()
        if self._is_pinned:
            self._is_pinned = False
            unpin(self._ring_RHWC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _serve(self, worker: _Worker) -> None:
        """Give a worker its parts and take its answers; mostly this waits, without the interpreter's lock."""
        try:
            worker.connection.send(self._config)
            while True:
                while len(worker.under_way) < _PARTS_OF_WORKER:
                    try:
                        found = self._parts.get(block=not worker.under_way)
                    except queue.Empty:
                        break
                    if found is None:
                        return
                    worker.under_way.append(found)
                    worker.connection.send(found[0])
                answer = worker.connection.recv()
                part, views = worker.under_way.popleft()
                views.finish_part(part.first_row, answer)
        except (EOFError, OSError):
            self._fail(InputError(_describe(worker, worker.process.wait(), self._remedy)))
        finally:
            worker.connection.close()

    def _fail(self, error: Exception) -> None:
        """Let all requests fail, with the first error that there was."""
        with self._lock:
            self._error = self._error or error
            for views in self._requests:
                views.fail(self._error)


class _Memory:
    """Memory that processes share by a file descriptor and that has no name."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("cnclip images")
        else:  # not Linux
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        os.ftruncate(self.fd, num_bytes)

    def close(self) -> None:
        os.close(self.fd)


def _start(number: int, ring_fd: int) -> _Worker:
    """Start a worker, deaf to STOP_SIGNALS: they reach the whole group, and its rank decides when it ends."""
    ours, theirs = Pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "training.data.image_worker",
                *map(str, (os.getpid(), theirs.fileno(), ring_fd)),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), ring_fd),
            env={**os.environ, **import_environment()},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return _Worker(number, process, ours)


def _describe(worker: _Worker, status: int, remedy: str) -> str:
    rank = f" of rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    name = f"image worker {worker.number}{rank} (process {worker.process.pid})"
    if status >= 0:
        return (
            f"{name} ended with status {status}: what it said stands above; rerun the same command to resume"
        )
    return (
        f"{name} was killed by {signal.Signals(-status).name}: most often the machine had no memory left; if"
        f" so, {remedy}; rerun the same command to resume"
    )
