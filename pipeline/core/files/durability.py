"""What outlives a power cut: the bytes of files and the entries of folders, written to disk in this order.

A file system may lose, cut or reorder whatever nobody has synced. A file is safe once its bytes are synced
and its entry in each folder above it is; a record that vouches for files is written after that.
"""

import contextlib
import contextvars
import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_MANY_FILES = 32  # from here on the whole file system is synced by one call
# Not every file system can sync a folder; one that cannot has no other way to be asked.
_CANNOT_SYNC_A_FOLDER = (errno.EINVAL, errno.ENOTSUP)


@dataclass(slots=True)
class _Task:
    """What the task at work here has published."""

    files: set[str] = field(default_factory=set)  # whose bytes are synced
    folders: dict[str, None] = field(default_factory=dict)  # whose entries are not yet


_task: contextvars.ContextVar[_Task | None] = contextvars.ContextVar("task", default=None)
_synced_entries: set[str] = set()  # folders whose own entries are known to be on disk


def sync_file(path: str) -> None:
    """Write a file's bytes to disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(folder: str) -> None:
    """Write a folder's entries to disk; inside `together` not yet."""
    task = _task.get()
    if task is None:
        _sync_entries(folder)
    else:
        task.folders[folder] = None


def note_published(path: str) -> None:
    """Take a file's bytes for synced until the task ends, and sync its entry with those of the others."""
    task = _task.get()
    if task is not None:
        task.files.add(path)
    sync_folder(os.path.dirname(path))


def make_folder(folder: str) -> None:
    """Make a folder and those above it that are missing, and sync the entries of what is new."""
    new, above = [], folder
    while not os.path.isdir(above or "."):
        new.append(above)
        above = os.path.dirname(above)
    os.makedirs(folder or ".", exist_ok=True)
    for path in reversed(new):
        _synced_entries.discard(path)
        sync_folder(os.path.dirname(path))


def sync_outputs(paths: Iterable[str], root: str) -> None:
    """Write files below the folder `root` to disk, and the entries that lead to them from above it."""
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
    """Sync each folder that files are published to once: by `sync_outputs`, or at the end of the block.

    For a task, whose outputs count for nothing before its receipt is there.
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
    """Take no folder's entry for synced any more: some folders were removed."""
    _synced_entries.clear()


def _sync_entries(folder: str) -> None:
    try:
        _sync(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, PermissionError):
        pass  # removed since; or above the run, in a folder that is not ours to read
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
    """Write everything of the file system that holds a folder to disk: cheaper than many files one by one."""
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
