"""Checks files of third-party writers, which may overlook a full disk, before they are published.

The checks run on the temporary file inside `store.publish`, so that a truncated file never gets its name:

    with store.publish(path) as temporary, naming(path):
        save_file(tensors, temporary)
        check_safetensors(temporary, path)
"""

import contextlib
import errno
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.core import store
from pipeline.core.files.foreign import first_line
from pipeline.core.records import ConfigError, InputError, Stopped

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_FULL_BYTES = 1 << 20  # a disk with less counts as full, since writers need blocks


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn an exception of a foreign writer inside the block into an OSError that names the file.

    Writers in Rust and C++ wrap the system's error, or only report that fewer bytes were written. Errors of
    this project pass unchanged.
    """
    try:
        yield
    except (InputError, ConfigError, Stopped, MemoryError):
        raise
    except Exception as error:
        raise _named(error, path) from None


def _named(error: Exception, path: str) -> OSError:
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, os.strerror(error.errno), error.filename or path)
    if found := re.search(r"os error (\d+)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])), path)
    folder = os.path.dirname(path) or "."
    if store.is_local(path) and os.path.isdir(folder) and shutil.disk_usage(folder).free < _FULL_BYTES:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    return OSError(errno.EIO, f"cannot be written ({first_line(error)})", path)


def write_npy(path: str, array: npt.NDArray[Any]) -> None:
    """Write an array as a `.npy` file, whole or not at all.

    Raises:
        OSError: if the disk is full or fails; it names the file.
    """
    with store.publish(path) as temporary, naming(path):
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
        check_npy(temporary, path)


class ParquetRows:
    """A Parquet file that is written table by table."""

    def __init__(self, path: str, writer: "pq.ParquetWriter") -> None:
        self.num_rows = 0
        self._path, self._writer = path, writer

    def write_table(self, table: "pa.Table") -> None:
        """Write the rows of a table of the file's schema.

        Raises:
            OSError: if writing fails; it names the file.
        """
        with naming(self._path):
            self._writer.write_table(table)
        self.num_rows += table.num_rows


@contextlib.contextmanager
def parquet_rows(path: str, schema: "pa.Schema") -> Iterator[ParquetRows]:
    """Publish a Parquet file (zstd) of the tables that the block writes.

    Raises:
        OSError: if the disk is full or fails; it names the file.
    """
    import pyarrow.parquet as pq

    with store.publish(path) as temporary:
        with naming(path):
            writer = pq.ParquetWriter(temporary, schema, compression="zstd")
        rows = ParquetRows(path, writer)
        try:
            yield rows
        except BaseException:
            with contextlib.suppress(Exception):  # the first error counts
                writer.close()
            raise
        with naming(path):
            writer.close()
        check_parquet(temporary, path, rows.num_rows)


def check_npy(temporary: str, path: str) -> None:
    """Check that a `.npy` file has all bytes that its header promises.

    Raises:
        OSError: if it does not.
    """
    with open(temporary, "rb") as file:
        try:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise _cut(path, f"it is cut ({error})") from None
        check_size(temporary, path, file.tell() + math.prod(shape) * dtype.itemsize)


def check_size(temporary: str, path: str, num_bytes: int) -> None:
    """Check that a file has this size.

    Raises:
        OSError: if it does not.
    """
    if (found := os.path.getsize(temporary)) != num_bytes:
        raise _cut(path, f"{found} of {num_bytes} bytes were written")


def check_parquet(temporary: str, path: str, num_rows: int) -> None:
    """Check that a Parquet file has its footer, which lists all its parts, and this number of rows.

    Raises:
        OSError: if it does not.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(temporary).num_rows
    except (pa.ArrowException, OSError) as error:
        raise _cut(path, f"it has no end ({error})") from None
    if found != num_rows:
        raise _cut(path, f"{found} of {num_rows} rows were written")


def check_safetensors(temporary: str, path: str) -> None:
    """Check that a safetensors file is as long as its header says.

    Raises:
        OSError: if it is not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(temporary, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise _cut(path, f"it is cut ({error})") from None


def check_zip(temporary: str, path: str) -> None:
    """Check that a zip archive, as `torch.save` writes it, has its list of members at the end.

    Raises:
        OSError: if it does not.
    """
    try:
        with zipfile.ZipFile(temporary) as archive:
            last = max(archive.infolist(), key=lambda member: member.header_offset)
            archive.open(last).close()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise _cut(path, f"it is cut ({error})") from None


def _cut(path: str, reason: str) -> OSError:
    return OSError(errno.ENOSPC, f"{reason}; the disk may be full", path)
