"""Digests of large files, remembered by size and time: source tables are not hashed again at every command.

A run's tasks are bound to the bytes of their tables. To hash these takes 13 minutes a terabyte and core, and
`plan`, `status` and each start of `run` ask for it.
"""

import concurrent.futures
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import platformdirs

from pipeline.core import store
from pipeline.core.files.foreign import parse_json

_LEAST_BYTES = 1 << 20  # smaller files are hashed in no time
_RACY_NS = 2_000_000_000  # a file that is younger may change again within one tick of its file system's clock
_MOST_THREADS = 16
_Stamp = tuple[int, str]  # bytes, and what changes whenever a file is written


def digests_of_files(
    paths: Sequence[str], hash_all: Callable[[Sequence[str]], Iterable[str]] | None = None
) -> list[str]:
    """Return the sha256, hex, of each file, as `store.digest_file`; from memory where a file is as it was.

    Other files are hashed by `hash_all`, which returns their digests in order; unset: several at once by
    threads. What is known is kept for all runs of a user, in `cnclip/digests.json` of the user's cache folder
    (XDG_CACHE_HOME).
    """
    with concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        stamps = list(pool.map(_stamp, paths))
        known = _read() if any(stamps) else {}
        found = {
            path: sha256
            for path, stamp in zip(paths, stamps, strict=True)
            if stamp is not None and (sha256 := known.get(_name(path), {}).get(_text(stamp)))
        }
        unknown = [path for path in dict.fromkeys(paths) if path not in found]
        digests = pool.map(store.digest_file, unknown) if hash_all is None else hash_all(unknown)
        hashed = dict(zip(unknown, digests, strict=True))
        again = list(pool.map(_stamp, unknown))
    before = dict(zip(paths, stamps, strict=True))
    settled = {
        _name(path): {_text(stamp): hashed[path]}
        for path, stamp in zip(unknown, again, strict=True)
        if stamp is not None and stamp == before[path] and not _is_racy(path)
    }
    if settled:
        _write({**_read(), **settled})
    return [found[path] if path in found else hashed[path] for path in paths]


def _stamp(path: str) -> _Stamp | None:
    """Return what tells a large file from what it was before; None for one that is not worth remembering.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if store.is_local(path):
        found = os.stat(path)
        if found.st_size < _LEAST_BYTES:
            return None
        return found.st_size, f"{found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
    fs, name = store.remote(path)
    info = fs.info(name)
    tag = info.get("ETag") or info.get("etag")
    return (int(info["size"]), str(tag)) if tag and info["size"] >= _LEAST_BYTES else None


def _is_racy(path: str) -> bool:
    return store.is_local(path) and time.time_ns() - os.stat(path).st_mtime_ns < _RACY_NS


def _name(path: str) -> str:
    return store.absolute(path)


def _text(stamp: _Stamp) -> str:
    return f"{stamp[0]} {stamp[1]}"


def _place() -> Path:
    return Path(platformdirs.user_cache_dir("cnclip"), "digests.json")


def _read() -> dict[str, Mapping[str, str]]:
    """Return path → what it was when it was hashed → sha256; nothing if that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        found = parse_json(store.read_bytes(str(_place())))
        if isinstance(found, dict):
            return {path: item for path, item in found.items() if _is_known(item)}
    return {}


def _is_known(item: object) -> bool:
    return isinstance(item, dict) and all(isinstance(sha256, str) for sha256 in item.values())


def _write(known: Mapping[str, Mapping[str, str]]) -> None:
    with contextlib.suppress(OSError):  # a home that is full or read-only: hashed again the next time
        store.write_text(str(_place()), json.dumps(known, ensure_ascii=False, indent=0))
