"""Makes files survive a power cut: syncs the bytes of files and then the entries of folders.

A file system may lose, truncate or reorder anything that is not synced. A file is safe when its bytes and its
entry in each folder above it are synced; records that vouch for files are written after that.
"""

import contextlib
import contextvars
import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_MANY_FILES = 32  # from this number on, one call syncs the whole file system
# Errors of file systems that cannot sync a folder; they have no alternative.
_CANNOT_SYNC_A_FOLDER = (errno.EINVAL, errno.ENOTSUP)


@dataclass(slots=True)
class _Task:
    """What the current task has published."""

    files: set[str] = field(default_factory=set)  # with synced bytes
    folders: dict[str, None] = field(default_factory=dict)  # with entries not yet synced


_task: contextvars.ContextVar[_Task | None] = contextvars.ContextVar("task", default=None)
_synced_entries: set[str] = set()  # folders whose own entries are on disk


def sync_file(path: str) -> None:
    """Sync a file's bytes to disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(folder: str) -> None:
    """Sync a folder's entries to disk, or inside `together` defer that."""
    task = _task.get()
    if task is None:
        _sync_entries(folder)
    else:
        task.folders[folder] = None


def note_published(path: str) -> None:
    """Treat a file's bytes as synced until the task ends, and sync its entry with those of other files."""
    task = _task.get()
    if task is not None:
        task.files.add(path)
    sync_folder(os.path.dirname(path))


def make_folder(folder: str) -> None:
    """Make a folder and missing parents, and sync the entries of the new ones."""
    new, above = [], folder
    while not os.path.isdir(above or "."):
        new.append(above)
        above = os.path.dirname(above)
    os.makedirs(folder or ".", exist_ok=True)
    for path in reversed(new):
        _synced_entries.discard(path)
        sync_folder(os.path.dirname(path))


def sync_outputs(paths: Iterable[str], root: str) -> None:
    """Sync files below the folder `root` to disk, and the entries that lead to them."""
    task = _task.get() or _Task()
    left = [path for path in paths if path not in task.files]
    if len(left) >= _MANY_FILES:
        # A stage's folder may be a link to another file system.
        folders = {
            root,
            *map(os.path.dirname, left),
            *(folder for folder in task.folders if os.path.isdir(folder)),
        }
        for folder in {os.stat(folder).st_dev: folder for folder in folders}.values():
            _sync_file_system(folder)
        task.folders.clear()
        return
    for path in left:
        sync_file(path)
    changed = task.folders | dict.fromkeys(os.path.dirname(path) for path in left)
    task.folders.clear()
    for folder in changed:
        _sync_entries(folder)
        while folder.startswith(root) and folder not in _synced_entries:
            _sync_entries(os.path.dirname(folder))
            _synced_entries.add(folder)
            folder = os.path.dirname(folder)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Sync each folder with published files once, in `sync_outputs` or at the end of the block.

    This is for tasks, whose outputs do not count before their receipt exists.
    """
    task = _Task()
    token = _task.set(task)
    try:
        yield
    finally:
        _task.reset(token)
    for folder in task.folders:
        _sync_entries(folder)


def forget_folders() -> None:
    """Forget which folders' entries are synced, because some folders were removed."""
    _synced_entries.clear()


def _sync_entries(folder: str) -> None:
    try:
        _sync(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, PermissionError):
        pass  # already removed, or a folder above the run that may not be read
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_A_FOLDER:
            raise


def _sync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


def _sync_file_system(folder: str) -> None:
    """Sync the whole file system of a folder, which is cheaper than many files one by one."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
        if syncfs is None:
            os.sync()
        elif syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), folder)
    finally:
        os.close(descriptor)
