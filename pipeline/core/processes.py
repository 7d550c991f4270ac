"""Child processes: how they start and end, what asks them to stop, and that none outlives its parent."""

import contextlib
import ctypes
import functools
import gc
import os
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from pipeline.core.terminal import visible

_PR_SET_PDEATHSIG = 1
_IS_LINUX = sys.platform.startswith("linux")
# Opened before any fork: a child of a process with threads may find the loader's lock taken for ever.
_LIBC = ctypes.CDLL(None, use_errno=True) if _IS_LINUX else None
# In the environment of ranks that a launcher of ours starts: the process number of the run.
RUN_VARIABLE = "CNCLIP_RUN_PID"

POLARS_THREADS = "POLARS_MAX_THREADS"

# Ask a training run for a checkpoint and its end. SIGINT is Ctrl-C, which reaches all ranks of a terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def die_with_parent(parent: int | None = None, with_signal: int = signal.SIGKILL) -> None:
    """Ask the kernel to end this process when its parent ends, however it ends (Linux; elsewhere a no-op).

    Without it a killed run leaves workers behind that write into folders the next run already uses. The
    kernel stays silent about a parent that ended before it was asked. A process that knows who started it
    gives that process number as `parent`, and is killed at once if somebody else has adopted it since.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, with_signal)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def dies_with_us(with_signal: int = signal.SIGKILL) -> Callable[[], None]:
    """Return a `preexec_fn` for `subprocess`: the program ends when this process ends, from its start on."""
    return functools.partial(die_with_parent, os.getpid(), with_signal)


def import_environment() -> dict[str, str]:
    """Return what makes a child `python -m` import this project's packages, wherever it is started.

    Python puts the working directory first on its path: a folder `training/` or `eval/` there would hide
    ours. In a clone that is not installed, the working directory may be where ours are found at all.
    """
    root = str(Path(__file__).parents[2])
    settings = {"PYTHONSAFEPATH": "1"}
    if root not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        before = os.environ.get("PYTHONPATH")
        settings["PYTHONPATH"] = os.pathsep.join([root, before] if before else [root])
    return settings


@contextlib.contextmanager
def spawning() -> Iterator[None]:
    """Keep processes that are spawned in this block from importing the main program again.

    It is the user's when a run is started from Python. A script without `if __name__ == "__main__"` would run
    again in every worker, and one that is read from standard input cannot be imported at all.

    Our work is not in the main program.
    """
    main = sys.modules["__main__"]
    names: tuple[str, ...] = ("__file__", "__spec__")
    hidden = {name: vars(main).pop(name) for name in names if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        del main.__spec__
        vars(main).update(hidden)


@contextlib.contextmanager
def sharing_cores(processes: int) -> Iterator[None]:
    """Give each of the processes that are started in this block its share of the threads that polars takes.

    Polars reads the number when it is imported, and takes all cores otherwise.
    """
    if POLARS_THREADS in os.environ:
        yield
        return
    os.environ[POLARS_THREADS] = str(max(1, (os.cpu_count() or 1) // processes))
    try:
        yield
    finally:
        del os.environ[POLARS_THREADS]


def die_with_run() -> None:
    """Do what `die_with_parent` does, in a rank: its parent is a launcher of the run in RUN_VARIABLE.

    A rank that somebody else's launcher starts has no RUN_VARIABLE and compares nothing.
    """
    die_with_parent()
    run = os.environ.get(RUN_VARIABLE)
    # The launcher dies with the run: as long as it is the run's child, the promise above was made in time.
    if _IS_LINUX and run is not None and _parent_of(os.getppid()) != run:
        os.kill(os.getpid(), signal.SIGKILL)


def _parent_of(pid: int) -> str | None:
    try:
        # Its name, in brackets, may hold spaces and brackets; the state and the parent follow it.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1]
    except (OSError, IndexError):
        return None


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Let the garbage collector skip the objects of large imports, such as torch's.

    Looking through them again and again takes a sixth of a rank's start, and of every full collection later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line in one write, since ranks share a pipe and print at once."""
    stream = stream or sys.stdout
    stream.write(f"{visible(line)}\n")
    stream.flush()


def leave(status: int) -> NoReturn:
    """End at once: taking torch's modules apart takes a second, and a group of ranks may wait for a peer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
