"""Which rank a signal ended: its launcher ends the others then, and says neither which was first nor why."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable

import psutil

# Of these a process dies that was not asked to end.
DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)

_PERIOD_MS = 500  # between looks for ranks that have started


class RankFailures:
    """Inside, `say` is called once with a line naming the first rank that dies of a signal, if one does.

    The ranks are the launcher's children, not this process's: the kernel reports when one ends, and shows its
    status until the launcher asks for it, which DeepSpeed's does once a second. Under `srun` no launcher runs
    here.
    """

    def __init__(self, launcher_pid: int, say: Callable[[str], object]) -> None:
        self._launcher_pid, self._say = launcher_pid, say
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank failures", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        ranks: dict[int, tuple[str, int]] = {}  # by descriptor: what it is called, its process
        known: set[int] = set()
        poll = select.poll()
        with contextlib.ExitStack() as opened:
            while not self._is_over.is_set():
                for child in _children(self._launcher_pid):
                    with contextlib.suppress(psutil.Error, ProcessLookupError, KeyError):
                        if child.pid in known:
                            continue
                        rank = child.environ()["RANK"]
                        descriptor = os.pidfd_open(child.pid)
                        opened.callback(os.close, descriptor)
                        poll.register(descriptor, select.POLLIN)
                        ranks[descriptor] = (rank, child.pid)
                        known.add(child.pid)
                for descriptor, _ in poll.poll(_PERIOD_MS):
                    poll.unregister(descriptor)
                    rank, process = ranks[descriptor]
                    if (number := _signal_of(process)) in DEADLY:
                        name = signal.Signals(number).name
                        self._say(f"rank {rank} (process {process}) was killed by {name}\n")
                        return


def _children(launcher_pid: int) -> list[psutil.Process]:
    try:
        children: list[psutil.Process] = psutil.Process(launcher_pid).children()
    except psutil.NoSuchProcess:
        return []
    return children


def _signal_of(pid: int) -> int:
    """Return the signal that ended a process which its parent has not reaped yet; 0: none, or reaped."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            status = int(file.read().split()[-1])  # proc(5): exit_code is the last field, as waitpid gives it
    except (OSError, ValueError):
        return 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
