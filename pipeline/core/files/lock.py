"""Locks a folder so that one command at a time works in it."""

import contextlib
import errno
import fcntl
import functools
import inspect
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from pipeline.core import store
from pipeline.core.files import durability
from pipeline.core.records import InputError

_MOST_BYTES = 200  # of a holder's description
P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def exclusive(folder: str) -> Iterator[None]:
    """Hold a folder's lock for the duration of a block, making the folder if necessary.

    It is a kernel lock on the file `.lock`, so it ends with the process that holds it. Object stores have no
    lock.

    Raises:
        InputError: if another command holds it; the line names the command and its process.
    """
    if not store.is_local(folder):
        yield
        return
    durability.make_folder(os.path.abspath(folder))
    path = os.path.join(folder, ".lock")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise InputError(
            f"{path}: a link or not a regular file, so not a lock; remove it and rerun"
        ) from None
    with open(handle, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(_MOST_BYTES).decode("utf-8", "replace").strip()
            who = holder if holder.isprintable() and holder else "its process is not known"
            raise InputError(
                f"{folder}: another command is at work here ({who}); wait for it or stop it"
            ) from None
        with contextlib.suppress(OSError):  # a full disk must not prevent a resume
            file.truncate()
            file.write(_own_name().encode("utf-8", "replace")[:_MOST_BYTES])
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def holder(folder: str) -> str:
    """Return the command that holds a folder's lock, empty if none does or nothing can tell."""
    if not store.is_local(folder):
        return ""
    path = os.path.join(folder, ".lock")
    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            named = (file.read(_MOST_BYTES) or b"").decode("utf-8", "replace").strip()
            if not named:
                return ""  # an idle folder's lock is never touched, so a command that starts now gets it
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return named if named.isprintable() else "its process is not known"
    except OSError:
        return ""
    return ""  # it was killed, and its name stayed


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def one_at_a_time(folder: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function hold the lock of the folder in one of its arguments, such as `out` or `job.out`."""
    name, *fields = folder.split(".")

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> T:
            found = signature.bind(*args, **kwargs).arguments[name]
            with exclusive(functools.reduce(getattr, fields, found)):
                return function(*args, **kwargs)

        return locked

    return decorate


def _own_name() -> str:
    """Return this process's description: `cnclip index, process 123 on host`."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    words = ["cnclip" if program in ("__main__.py", "") else program, *sys.argv[1:2]]
    return f"{' '.join(words)}, process {os.getpid()} on {socket.gethostname()}"
