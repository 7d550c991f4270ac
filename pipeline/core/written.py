"""Files that others' writers make, looked at before they appear: such a writer may overlook a full disk.

Each function is called on the temporary file inside `store.publish`, so that what is cut never gets its name.
"""

import errno
import math
import os
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core import store


def write_npy(path: str, array: npt.NDArray[Any]) -> None:
    """Write an array as a `.npy` file, whole or not at all.

    Raises:
        OSError: if the disk is full or fails; it names the file.
    """
    with store.publish(path) as temporary:
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
        check_npy(temporary, path)


def check_npy(temporary: str, path: str) -> None:
    """Raise OSError unless a `.npy` file has all bytes that its header announces."""
    with open(temporary, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        check_size(temporary, path, file.tell() + math.prod(shape) * dtype.itemsize)


def check_size(temporary: str, path: str, num_bytes: int) -> None:
    """Raise OSError unless a file has this size."""
    if (found := os.path.getsize(temporary)) != num_bytes:
        raise _cut(path, f"only {found} of {num_bytes} bytes were written")


def check_parquet(temporary: str, path: str, num_rows: int) -> None:
    """Raise OSError unless a Parquet file has its end, which names all its parts, and this many rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(temporary).num_rows
    except (pa.ArrowException, OSError) as error:
        raise _cut(path, f"it has no end ({error})") from None
    if found != num_rows:
        raise _cut(path, f"only {found} of {num_rows} rows were written")


def check_safetensors(temporary: str, path: str) -> None:
    """Raise OSError unless a safetensors file is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(temporary, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise _cut(path, f"it is cut ({error})") from None


def check_zip(temporary: str, path: str) -> None:
    """Raise OSError unless a zip archive, such as `torch.save` writes, has its list of members at its end."""
    try:
        with zipfile.ZipFile(temporary) as archive:
            last = max(archive.infolist(), key=lambda member: member.header_offset)
            archive.open(last).close()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise _cut(path, f"it is cut ({error})") from None


def _cut(path: str, reason: str) -> OSError:
    return OSError(errno.ENOSPC, f"{reason}; the disk may be full", path)
