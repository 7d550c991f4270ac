"""Child processes: how they start and end, what asks them to stop, and that none outlives its parent."""

import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn, TextIO

from pipeline.core.terminal import visible

_PR_SET_PDEATHSIG = 1

# Ask a training run for a checkpoint and its end. SIGINT is Ctrl-C, which reaches all ranks of a terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however it ends (Linux; elsewhere a no-op).

    Without it a killed run leaves workers behind that write into folders the next run already uses.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around large imports, such as torch's: their objects stay, and the garbage collector skips them.

    Looking through them again and again takes a sixth of a rank's start, and of every full collection later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def say(line: str, stream: TextIO | None = None) -> None:
    """A line to standard output, or to another stream, in one write: ranks share a pipe and print at once."""
    stream = stream or sys.stdout
    stream.write(f"{visible(line)}\n")
    stream.flush()


def leave(status: int) -> NoReturn:
    """End at once: taking torch's modules apart takes a second, and a group of ranks may wait for a peer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
