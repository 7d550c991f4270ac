"""Files: every path is an fsspec URL or a local path; files appear whole or not at all."""

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec

_DIGEST_CHUNK_BYTES = 1 << 20
_EDGE_BYTES = 1 << 20
_PARTIAL = ".partial"  # suffix of a file that is still being written


def is_local(path: str) -> bool:
    """True for a plain path: no `scheme://`."""
    return "://" not in str(path)


def join(folder: str, *parts: str) -> str:
    """`folder/part/part`, for paths and URLs alike."""
    return "/".join([str(folder).rstrip("/"), *parts])


def exists(path: str) -> bool:
    if is_local(path):
        return os.path.exists(path)
    fs, name = fsspec.core.url_to_fs(path)
    return bool(fs.exists(name))


def num_bytes(path: str) -> int:
    """Size of a file in bytes; FileNotFoundError where there is none."""
    if is_local(path):
        return os.path.getsize(path)
    fs, name = fsspec.core.url_to_fs(path)
    return int(fs.size(name))


def read_bytes(path: str) -> bytes:
    with open_read(path) as file:
        return bytes(file.read())


def read_text(path: str) -> str:
    return read_bytes(path).decode("utf-8")


def open_read(path: str) -> IO[Any]:
    """Binary file handle, seekable; ranges of a remote file are fetched as they are read."""
    if is_local(path):
        return open(path, "rb")
    fs, name = fsspec.core.url_to_fs(path)
    handle: IO[Any] = fs.open(name, "rb")
    return handle


def list_files(folder: str) -> list[str]:
    """Names of the files directly inside a folder, sorted; empty where the folder does not exist."""
    if is_local(folder):
        if not os.path.isdir(folder):
            return []
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    fs, name = fsspec.core.url_to_fs(folder)
    if not fs.exists(name):
        return []
    return sorted(
        info["name"].rsplit("/", 1)[-1] for info in fs.ls(name, detail=True) if info["type"] == "file"
    )


def remove(path: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens where there is none.

    A local folder is renamed first, so that a kill half-way leaves no folder that looks whole.
    """
    if not exists(path):
        return
    if is_local(path):
        import shutil

        if os.path.isdir(path):
            doomed = f"{path.rstrip('/')}.removing"
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        else:
            os.remove(path)
    else:
        fs, name = fsspec.core.url_to_fs(path)
        fs.rm(name, recursive=True)


def sweep(folder: str) -> None:
    """Remove the files that `publish` left behind under a local folder when its process was killed."""
    if is_local(folder):
        for leftover in Path(folder).rglob(f".*{_PARTIAL}"):
            if leftover.is_file():  # a half-written checkpoint is a folder, and training's own to remove
                leftover.unlink()


@contextlib.contextmanager
def publish(path: str) -> Iterator[str]:
    """Yield a temporary local path to write to; when the block ends well the file appears at `path`.

    Locally by fsync and rename in the same folder, on an object store by one upload. When the block
    fails nothing appears and the temporary file is gone.
    """
    if is_local(path):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = str(target.parent / f".{target.name}.{os.getpid()}{_PARTIAL}")
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
    else:
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, "file")
            yield temporary
            fs, name = fsspec.core.url_to_fs(path)
            fs.put_file(temporary, name)


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with publish(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_text(path: str, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def digest_bytes(data: bytes) -> str:
    """sha256, hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: str) -> str:
    """sha256 of a file's bytes, hex, read in chunks."""
    with open_read(path) as file:
        if isinstance(file, io.BufferedReader):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while chunk := file.read(_DIGEST_CHUNK_BYTES):
            digest.update(chunk)
        return digest.hexdigest()


def digest_edges(path: str) -> tuple[int, str]:
    """Size of a file, and sha256 of its first and last MiB: for terabytes that are not worth reading."""
    size = num_bytes(path)
    with open_read(path) as file:
        head = file.read(_EDGE_BYTES)
        file.seek(max(0, size - _EDGE_BYTES))
        tail = file.read(_EDGE_BYTES)
    return size, digest_bytes(head + tail)


def digest_tree(path: str) -> str:
    """sha256, hex, of a file's bytes, or of the names and digests of the files directly inside a folder."""
    if names := list_files(path):
        listing = "".join(f"{name}\0{digest_file(join(path, name))}\n" for name in names)
        return digest_bytes(listing.encode("utf-8"))
    return digest_file(path)
