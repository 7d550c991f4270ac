"""Child processes: how they start and stop, and how none outlives its parent."""

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
# Loaded before any fork: in the child of a threaded process, the loader's lock may stay locked for ever.
_LIBC = ctypes.CDLL(None, use_errno=True) if _IS_LINUX else None
# In the environment of ranks that this project's launcher starts: the process id of the run.
RUN_VARIABLE = "CNCLIP_RUN_PID"

POLARS_THREADS = "POLARS_MAX_THREADS"

# timm and DeepSpeed import those that are installed, which takes a fifth of a rank's start, and wandb leaves
# folders behind in a process that is killed. Only `training.tracking` needs them.
TRACKERS = ("wandb", "mlflow", "comet_ml")

# Ask a training run for a checkpoint and its end. SIGINT is Ctrl-C, which reaches all ranks of a terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def die_with_parent(parent: int | None = None, with_signal: int = signal.SIGKILL) -> None:
    """Ask the kernel to kill this process when its parent ends in any way (Linux; elsewhere a no-op).

    Otherwise workers of a killed run would write into folders that the next run already uses. The kernel does
    not report a parent that has already ended, so a process that knows its parent's id passes it as `parent`
    and is killed at once if another process has adopted it.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, with_signal)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def begin_worker(parent: int) -> None:
    """Prepare a worker process: it ends with its parent, and imports no tracker."""
    die_with_parent(parent)
    hide(*TRACKERS)


def dies_with_us(with_signal: int = signal.SIGKILL) -> Callable[[], None]:
    """Return a `preexec_fn` for `subprocess` that makes the program end with this process."""
    return functools.partial(die_with_parent, os.getpid(), with_signal)


def import_environment() -> dict[str, str]:
    """Return the environment in which a child `python -m` imports this project's packages in any folder.

    Python puts the working directory first on its path, where a folder `training/` or `eval/` would hide the
    project's. In a clone that is not installed, only the working directory may lead to the packages.
    """
    root = str(Path(__file__).parents[2])
    settings = {"PYTHONSAFEPATH": "1"}
    if root not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        before = os.environ.get("PYTHONPATH")
        settings["PYTHONPATH"] = os.pathsep.join([root, before] if before else [root])
    return settings


@contextlib.contextmanager
def spawning() -> Iterator[None]:
    """Prevent processes spawned in this block from importing the main program again.

    If a run starts from Python, the main program is the user's. A script without
    `if __name__ == "__main__"` would run again in every worker, and one from standard input cannot be
    imported at all. This project's work is never in the main program.
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
    """Apply `die_with_parent` to a rank, whose parent is a launcher of the run in RUN_VARIABLE.

    A rank of another launcher has no RUN_VARIABLE and compares nothing.
    """
    die_with_parent()
    run = os.environ.get(RUN_VARIABLE)
    # The launcher dies with the run: while it is still the run's child, the request above was in time.
    if _IS_LINUX and run is not None and _parent_of(os.getppid()) != run:
        os.kill(os.getpid(), signal.SIGKILL)


def _parent_of(pid: int) -> str | None:
    try:
        # The name in brackets may contain spaces and brackets; state and parent follow it.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1]
    except (OSError, IndexError):
        return None


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Make large imports in this block cheaper: no trackers, and no garbage collection of their objects.

    Scanning these repeatedly takes a sixth of a rank's start and slows every later full collection.
    """
    gc.disable()
    try:
        with without(*TRACKERS):
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def without(*packages: str) -> Iterator[None]:
    """Make libraries that are imported in this block find no such packages.

    Not in a user's process: the libraries stay without these packages afterwards, and no other thread can
    import them meanwhile.
    """
    hidden = hide(*packages)
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:  # else somebody put one there
                sys.modules.pop(name, None)


def hide(*packages: str) -> list[str]:
    """Make `import` fail for packages from now on, except those imported before; return the failing ones."""
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    return hidden


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line in one write, because ranks share a pipe and print concurrently."""
    stream = stream or sys.stdout
    stream.write(f"{visible(line)}\n")
    stream.flush()


def leave(status: int) -> NoReturn:
    """Exit at once: tearing down torch takes a second, and a process group may wait for a peer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
