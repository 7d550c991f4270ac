"""Writes FAISS files whole or not at all, and reads them without trusting their headers.

FAISS's writer notices a full disk only when it closes the file, and cannot report it then. Its reader
allocates as much memory as a header asks for. Its memory-mapped reader crashes the process if the file is
shorter than its header says, so another process first tests files that are large enough to map.
"""

import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from eval.index.metric import Metric
from eval.index.structure import check_structure, limit_search, why_other_metric
from pipeline.core import store
from pipeline.core.processes import import_environment
from pipeline.core.records import InputError

MAP_BYTES = 64 << 20  # smaller files are read whole, which takes milliseconds
_WRITE_BYTES = 1 << 20
_SPARE_BYTES = 4096  # FAISS overestimates some vectors
# A list has 4 bytes a dimension in the file, and in the table 16 × 4 a code, which has a dimension or more.
_TABLE_FACTOR, _MOST_TABLE_BYTES = 16, 2 << 30
_SLOWEST_BYTES_PER_SECOND = 10 << 20  # of a disk from which an index is tested

_limits = threading.Lock()  # FAISS's limits apply to the process
# Files by their metadata in the file system: unchanged ones, and sound ones.
_written: dict[str, tuple[int, ...]] = {}
_sound: dict[str, tuple[int, ...]] = {}


def write_index(index: Any, path: str) -> tuple[int, str]:
    """Write an index; return the file's size in bytes and its sha256, hex.

    Raises:
        OSError: if the disk is full or fails; nothing appears at `path`.
        InputError: for a kind of index that FAISS cannot write.
    """
    import faiss

    digest, failed = hashlib.sha256(), list[OSError]()
    with store.publish(path) as temporary, open(temporary, "wb") as file:

        def write(data: bytes) -> None:
            try:
                file.write(data)
            except OSError as error:
                failed.append(error)
                raise
            digest.update(data)

        try:
            writer: Any = faiss.PyCallbackIOWriter(write, _WRITE_BYTES)  # type: ignore[attr-defined]
            faiss.write_index(index, writer)
        except Exception as error:  # FAISS's own error, or its translation of ours
            if not failed:
                raise InputError(f"{path}: FAISS cannot write it ({faiss_reason(error)})") from None
        if failed:
            raise OSError(failed[0].errno, failed[0].strerror, path)
        num_bytes = file.tell()
    vouch(path)
    return num_bytes, digest.hexdigest()


def load_index(path: str, *, mapped: bool = True, metric: Metric = "cosine") -> Any:
    """Return the index of a file, memory-mapped if it is large and of a kind that allows it.

    Raises:
        InputError: if the file is missing or damaged, asks for more memory than it has bytes, has
            inconsistent parts, or ranks by another metric. It names the file.
    """
    if not store.is_local(path):
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, "index")
            try:
                Path(copy).write_bytes(store.read_bytes(path))
            except FileNotFoundError:
                raise _missing(path) from None
            return _load(copy, path, mapped=False, metric=metric)
    return _load(path, path, mapped=mapped, metric=metric)


def vouch(path: str) -> None:
    """Record that a file is unchanged: this process wrote it, or its digest is correct."""
    if store.is_local(path):
        _written[os.path.abspath(path)] = _identity(os.stat(path))


def faiss_reason(error: BaseException) -> str:
    """Return the text of a FAISS error without its C++ function and source file."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    last = re.sub(r"^Error in .*\.\w+:\d+:\s*", "", lines[-1].rsplit("Error: ", 1)[-1])
    if "bad_alloc" in last or "deserialization" in last:
        return "it asks for more memory than it has bytes"
    return "it ends too early" if "read error" in last else last


def read_limited(path: str, num_bytes: int, *, mapped: bool) -> Any:
    """Read an index with FAISS; no vector or count may be larger than the file.

    FAISS also holds the table that it might compute for the fast scan of lists against this limit, though it
    computes none for inner products. So such a file may have a table of a few times its own size.

    Raises:
        RuntimeError: and any other error of FAISS.
    """
    try:
        return _read_limited(path, num_bytes + _SPARE_BYTES, mapped=mapped)
    except RuntimeError as error:
        with_table = min(_TABLE_FACTOR * num_bytes, max(num_bytes, _MOST_TABLE_BYTES))
        if "precomputed_table" not in str(error) or with_table <= num_bytes:
            raise
        return _read_limited(path, with_table + _SPARE_BYTES, mapped=mapped)


def _read_limited(path: str, most_bytes: int, *, mapped: bool) -> Any:
    import faiss

    # skip tables for L2 and symmetric searches, which may be a hundred times as large as the file
    flags = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE | faiss.IO_FLAG_PQ_SKIP_SDC_TABLE
    if mapped:
        flags |= faiss.IO_FLAG_MMAP_IFC
    with _limits:
        before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(most_bytes)
        faiss.set_deserialization_loop_limit(most_bytes)
        try:
            return faiss.read_index(path, flags)
        finally:
            faiss.set_deserialization_vector_byte_limit(before[0])
            faiss.set_deserialization_loop_limit(before[1])


def try_search(index: Any) -> None:
    """Search for one vector.

    Raises:
        RuntimeError: and any other error of FAISS.
    """
    import numpy as np

    if index.ntotal:
        index.search(np.full((1, index.d), index.d**-0.5, dtype=np.float32), min(10, index.ntotal))


def _load(path: str, name: str, *, mapped: bool, metric: Metric) -> Any:
    try:
        found = os.stat(path)
    except OSError:
        raise _missing(name) from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{name}: not a readable FAISS index (not a regular file); give an index file")
    key, known = os.path.abspath(path), _identity(found)
    is_sound = _sound.get(key) == known
    mapped = mapped and found.st_size > MAP_BYTES
    try:
        if mapped and not is_sound and _written.get(key) != known:
            _try_in_another_process(path, found.st_size)
            is_sound = True
        index = read_limited(path, found.st_size, mapped=mapped)
        if not is_sound:
            check_structure(index)
        limit_search(index)
        if not is_sound and found.st_size <= MAP_BYTES:  # larger files fail soon enough
            try_search(index)
        reason = why_other_metric(index, metric)
    except Exception as error:  # FAISS passes on any error of its libraries, even std::bad_alloc
        raise InputError(
            f"{name}: not a readable FAISS index ({faiss_reason(error)}); remove it and build again"
        ) from None
    if reason is not None:
        raise InputError(f"{name}: {reason}; build the index again: cnclip index")
    _sound[key] = known
    return index


def _try_in_another_process(path: str, num_bytes: int) -> None:
    """Map and search a file in another process, which damage may crash.

    Raises:
        ValueError: if that fails, or ends the process.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "eval.index.probe", os.path.abspath(path)],
            env={**os.environ, **import_environment()},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120 + num_bytes / _SLOWEST_BYTES_PER_SECOND,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError("FAISS does not finish reading it") from None
    if done.returncode < 0:
        raise ValueError(f"it ends the process that reads it, by signal {-done.returncode}")
    if done.returncode:
        lines = (done.stdout.strip() or done.stderr.strip() or f"status {done.returncode}").splitlines()
        raise ValueError(lines[-1])


def _missing(name: str) -> InputError:
    return InputError(f"{name}: no such file; build the index first")


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
