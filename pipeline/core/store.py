"""File access: every path is a local path or an fsspec URL, and files appear whole or not at all."""

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.core.files import durability
from pipeline.core.files.foreign import first_line
from pipeline.core.records import ConfigError

_DIGEST_CHUNK_BYTES = 1 << 20
_EDGE_BYTES = 1 << 20
_PRIVATE = 0o600
_UMASK = os.umask(0o077)  # it can only be read by setting it, which other threads would notice later
os.umask(_UMASK)
_PARTIAL = ".partial"  # suffix of a file that is still being written
# A file that `publish` has begun: its name has the writer's machine and process id
_WRITER = re.compile(r"\..*\.([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}\.partial")
_ABANDONED_SECONDS = 86_400.0  # a file that has not grown for a day has no writer
_REMOVING = ".removing"  # suffix or name of a folder that is being removed
_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # only writing raises these
SCRATCH = ".scratch"  # suffix of a folder that a task works in; `sweep` removes those of killed tasks


def is_local(path: str) -> bool:
    """Return whether this is a plain path, without `scheme://`."""
    return "://" not in str(path)


def join(folder: str, *parts: str) -> str:
    """Return `folder/part/part`, for paths and URLs alike."""
    return "/".join([str(folder).rstrip("/"), *parts])


def absolute(path: str) -> str:
    """Return a local path as an absolute path; a URL unchanged."""
    return os.path.abspath(path) if is_local(path) else path


def remote(url: str) -> tuple[Any, str]:
    """Return the file system and the name of a URL.

    Listings are not cached, because other processes also write there.

    Credentials and endpoints come from the file system's environment variables (for S3 AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL), which polars also reads.

    Raises:
        ConfigError: if the scheme is unknown or its package (s3fs, gcsfs) is not installed.
    """
    import fsspec  # here: it takes as long as the rest of a command that only shows help

    try:
        fs, name = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        scheme = url.partition("://")[0]
        remedy = 'pip install "cnclip-pretraining[s3]"' if scheme in ("s3", "s3a") else str(error)
        raise ConfigError(f"{url}: no file system for {scheme}://: {remedy}") from None
    return _Named(fs, url), str(name)


class _Named:
    """A file system whose errors name the URL instead of being those of the underlying package."""

    def __init__(self, fs: Any, url: str) -> None:
        self._fs, self._url = fs, url

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling ask for these before the store exists
            raise AttributeError(name)
        found = getattr(self._fs, name)
        return functools.partial(self._call, found) if callable(found) else found

    def _call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except OSError as error:
            if error.filename is None:
                error.filename = self._url
            raise
        except (ConfigError, ValueError, TypeError, NotImplementedError):
            raise
        except Exception as error:  # errors of botocore, aiohttp and others share no class
            raise ConfigError(
                f"{self._url}: its store cannot be used ({first_line(error)}): check its credentials and"
                " address (for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
            ) from None


def exists(path: str) -> bool:
    if is_local(path):
        return os.path.exists(path)
    fs, name = remote(path)
    return bool(fs.exists(name))


def num_bytes(path: str) -> int:
    """Return the size of a file in bytes.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if is_local(path):
        return os.path.getsize(path)
    fs, name = remote(path)
    return int(fs.size(name))


def read_bytes(path: str) -> bytes:
    """Return what a file holds; a remote one is asked for once.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if is_local(path):
        with open_read(path) as file:
            return bytes(file.read())
    fs, name = remote(path)
    # s3fs asks for the size first unless it is to use one connection.
    return bytes(fs.cat_file(name, **({"max_concurrency": 1} if "s3" in fs.protocol else {})))


def read_text(path: str) -> str:
    return read_bytes(path).decode("utf-8")


def what_else(mode: int) -> str | None:
    """Return what a local path of this mode (`os.stat`) is if it is not a regular file, such as `a FIFO`."""
    return next((name for test, name in _KINDS if test(mode)), None)


def refuse_special(path: str) -> None:
    """Refuse a FIFO, a device or a socket, because opening or reading one may block for ever.

    Call this, or `open_read`, which does so, before opening a foreign local file.

    Raises:
        OSError: for each of these.
    """
    if is_local(path) and os.path.exists(path):
        kind = what_else(os.stat(path).st_mode)
        if kind not in (None, "a folder"):  # opening a folder raises anyway
            raise OSError(errno.EINVAL, f"{kind}, not a regular file", path)


def open_read(path: str, *, ahead: bool = True) -> IO[Any]:
    """Open a file as a seekable binary handle; ranges of a remote file are fetched as they are read.

    With `ahead` more than was read is fetched, up to 50 MB, which suits who reads on from there.

    Raises:
        OSError: if it cannot be opened, or is not a regular file (`refuse_special`).
    """
    if is_local(path):
        refuse_special(path)
        return open(path, "rb")
    fs, name = remote(path)
    options = {} if ahead else {"cache_type": "none"}
    return io.BufferedReader(
        fs.open(name, "rb", **options)
    )  # with the methods of a local file, such as readline(size)


def list_files(folder: str) -> list[str]:
    """Return the sorted names of the files directly inside a folder; empty if the folder does not exist."""
    if is_local(folder):
        if not os.path.isdir(folder):
            return []
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    return sorted(sizes(folder))


def list_folders(folder: str) -> list[str]:
    """Return the sorted names of the folders directly inside a folder; empty if the folder does not exist."""
    if is_local(folder):
        if not os.path.isdir(folder):
            return []
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    fs, name = remote(folder)
    try:
        found = fs.ls(name, detail=True)
    except FileNotFoundError:
        return []
    names = [info["name"].rstrip("/") for info in found if info["type"] == "directory"]
    return sorted(name.rsplit("/", 1)[-1] for name in names)


def sizes(folder: str) -> dict[str, int]:
    """Return the sizes of the files directly inside a folder by name; empty if the folder does not exist."""
    if is_local(folder):
        if not os.path.isdir(folder):
            return {}
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    fs, name = remote(folder)
    try:
        found = fs.ls(name, detail=True)
    except FileNotFoundError:
        return {}
    files = [info for info in found if info["type"] == "file" and info["name"] != name]  # a file lists itself
    return {info["name"].rsplit("/", 1)[-1]: int(info["size"]) for info in files}


def link(path: str, target: str) -> None:
    """Give a file a second name in its store.

    On a disk both names are of one file, or of a copy if the file system has no such names. An object store
    makes a copy by itself; the bytes pass through this process only if it cannot.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not is_local(path):
        fs, name = remote(path)
        try:
            fs.cp_file(name, remote(target)[1])
        except NotImplementedError:
            with publish(target) as temporary:
                fs.get_file(name, temporary)
        return
    with publish(target) as temporary:
        try:
            os.link(path, temporary)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(path, temporary)


def move(path: str, target: str) -> None:
    """Move a file within a folder's store, in place of what is at `target`; in an object store it is copied.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if is_local(path):
        durability.make_folder(os.path.dirname(target))
        os.replace(path, target)
        durability.sync_folder(os.path.dirname(target))
        durability.sync_folder(os.path.dirname(path))
        return
    fs, name = remote(path)
    fs.mv(name, remote(target)[1])


def remove(path: str) -> None:
    """Remove a file, or a folder with its content, if it exists.

    A local folder is renamed first, so that a kill half-way leaves no folder that looks complete. A folder
    that is a link or a mount point is emptied but stays, because a user chose that place.
    """
    if is_local(path):
        if os.path.isdir(path):
            if os.path.islink(path) or os.path.ismount(path):
                _empty(path)
            else:
                doomed = f"{path.rstrip('/')}{_REMOVING}"
                shutil.rmtree(doomed, ignore_errors=True)
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            durability.forget_folders()
        elif os.path.lexists(path):
            os.remove(path)
            durability.sync_folder(os.path.dirname(path))
    elif exists(path):
        fs, name = remote(path)
        fs.rm(name, recursive=True)


def _empty(folder: str) -> None:
    """Move a folder's content aside and remove it, so that a kill leaves nothing that looks complete."""
    doomed = os.path.join(folder, _REMOVING)
    os.makedirs(doomed, exist_ok=True)
    for name in sorted(os.listdir(folder)):
        if name != _REMOVING:
            os.rename(os.path.join(folder, name), os.path.join(doomed, f"{secrets.token_hex(4)}.{name}"))
    shutil.rmtree(doomed)


def sweep(folder: str, *, deep: bool = True) -> None:
    """Remove leftovers of killed processes in a local folder: files and folders being written or removed.

    `deep` also looks for files of `publish` in the folders below.
    """
    if is_local(folder):
        for leftover in (*Path(folder).glob(f"*{SCRATCH}"), *Path(folder).glob(f"*{_REMOVING}")):
            shutil.rmtree(leftover, ignore_errors=True)
        find = Path(folder).rglob if deep else Path(folder).glob
        for leftover in find(f".*{_PARTIAL}"):
            if leftover.is_file():  # a half-written checkpoint is a folder, which training removes
                leftover.unlink()


def sweep_shared(folder: str) -> None:
    """Remove leftovers of `publish` directly inside a local folder that other processes may be writing to.

    A file is removed if its writer ran on this machine and is gone, or if it has not changed for a day.
    """
    for entry in os.scandir(folder) if os.path.isdir(folder) else []:
        if not (entry.name.startswith(".") and entry.name.endswith(_PARTIAL)):
            continue
        writer = _WRITER.fullmatch(entry.name)
        with contextlib.suppress(FileNotFoundError):  # already published or removed
            is_old = time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS
            if is_old or (writer is not None and writer[1] == _place() and not _is_running(int(writer[2]))):
                os.remove(entry.path)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@functools.cache
def _place() -> str:
    """Return an id of the boot and container in which this process's id is unique.

    Containers on a host may share its name, and each numbers its processes from 1. The id is random if the
    kernel does not provide one.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return digest_bytes(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode())[:8]
    except OSError:
        return secrets.token_hex(4)


@contextlib.contextmanager
def publish(path: str) -> Iterator[str]:
    """Yield a temporary local path to write to; when the block ends well the file appears at `path`.

    Local files are renamed in the same folder, with file and folder synced (`durability.together` collects
    the folders of a task); object stores get one upload. If the block fails, nothing appears and the
    temporary file is removed.

    Raises:
        OSError: if the disk is full; it names the file even if the writer's error does not.
    """
    if is_local(path):
        target = str(Path(path))
        folder, name = os.path.split(target)
        durability.make_folder(folder)
        writer = f"{_place()}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary = os.path.join(folder, f".{name}.{writer}{_PARTIAL}")
        try:
            yield temporary
            _as_others_may_read(temporary)
            durability.sync_file(temporary)
            os.replace(temporary, target)
            durability.note_published(target)
        except OSError as error:
            if error.errno in _FULL and error.filename in (None, temporary):
                raise OSError(error.errno, error.strerror, path) from None
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
    else:
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, "file")
            yield temporary
            fs, name = remote(path)
            fs.put_file(temporary, name)


def _as_others_may_read(path: str) -> None:
    """Give a file that its writer made private, as safetensors does, the mode of any new file."""
    if stat.S_IMODE(os.stat(path).st_mode) == _PRIVATE:
        os.chmod(path, 0o666 & ~_UMASK)


@contextlib.contextmanager
def local_folder(folder: str) -> Iterator[str]:
    """Yield a folder as a local path: itself, or a temporary copy of a remote folder.

    This is for programs that only read local files; changes to the copy are not uploaded.
    """
    if is_local(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="cnclip-") as copy:
        fs, name = remote(folder)
        if fs.exists(name):
            fs.get(name.rstrip("/") + "/", copy + "/", recursive=True)
        yield copy


def put_folder(local: str, folder: str) -> None:
    """Copy all files below a local folder to a remote one."""
    fs, name = remote(folder)
    fs.put(local.rstrip("/") + "/", name.rstrip("/") + "/", recursive=True)


@contextlib.contextmanager
def scratch(folder: str, name: str) -> Iterator[str]:
    """Yield a local working folder under a local stage folder, otherwise a temporary one; then remove it.

    `sweep` removes leftovers of killed processes under a stage folder.
    """
    if is_local(folder):
        durability.make_folder(str(Path(folder)))
        prefix: dict[str, Any] = {"prefix": f"{name}.", "suffix": SCRATCH, "dir": folder}
    else:
        prefix = {"prefix": f"cnclip-{name}-"}
    with tempfile.TemporaryDirectory(**prefix, ignore_cleanup_errors=True) as place:
        yield place


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with publish(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_text(path: str, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def digest_bytes(data: bytes) -> str:
    """Return the sha256 of bytes, hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: str) -> str:
    """Return the sha256 of a file's bytes, hex, read in chunks."""
    with open_read(path) as file:
        if isinstance(file, io.BufferedReader):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while chunk := file.read(_DIGEST_CHUNK_BYTES):
            digest.update(chunk)
        return digest.hexdigest()


def digest_edges(path: str) -> tuple[int, str]:
    """Hash a file's size, first and last MiB, to avoid reading terabytes."""
    size = num_bytes(path)
    with open_read(path) as file:
        head = file.read(_EDGE_BYTES)
        file.seek(max(0, size - _EDGE_BYTES))
        tail = file.read(_EDGE_BYTES)
    return size, digest_bytes(head + tail)


def digest_tree(path: str) -> str:
    """Return the sha256, hex, of a file's bytes, or of names and digests of the files directly inside a
    folder.
    """
    if names := list_files(path):
        listing = "".join(f"{name}\0{digest_file(join(path, name))}\n" for name in names)
        return digest_bytes(listing.encode("utf-8"))
    return digest_file(path)
