"""All receipts of a stage with many tasks in one file, so that a survey does not ask a store for each.

A store answers each request after some 20 ms, and a client takes milliseconds of its own: 30,000 receipts
one by one take minutes. `receipts/.folded` has what the driver has seen, with what a listing says of each
receipt; one of which it says something else now is read itself. The file may be missing at any time.
"""

import contextlib
import dataclasses
import functools
import json
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pipeline.core import store
from pipeline.core.files.stamps import stamps
from pipeline.core.records import ConfigError, Receipt
from pipeline.core.stage import receipts_at

LEAST = 256  # receipts of a stage, below which each is read by itself
_SECONDS = 300.0  # from one writing to the next while a stage runs: what a kill leaves to read one by one
_NAME = ".folded"
_LEVEL = 1  # of zlib: receipts of one stage are much alike
_DIGEST_BYTES = 64  # hex, before the data

Seen = dict[str, tuple[str, Receipt]]  # name → its stamp when it was read, and what it held


def read_receipts_in(
    folder: str, names: Collection[str] | None = None, seen: Seen | None = None
) -> dict[str, Receipt | None]:
    """Return name → receipt of the files in a folder of receipts, in order; None for one that is damaged.

    `names`: those that are wanted, such as `00000.json`; None: all. What is not there has no entry. `seen`
    has what earlier calls read, and gets what this one reads.
    """
    found = {
        name: stamp
        for name, stamp in sorted(stamps(folder).items())
        if name.endswith(".json") and not name.startswith(".") and (names is None or name in names)
    }
    receipts = _that_fit(found, seen or {})
    if found.keys() - receipts.keys() and len(found) >= LEAST:
        receipts |= _that_fit({name: found[name] for name in found.keys() - receipts.keys()}, _read(folder))
    unknown = [name for name in found if name not in receipts]
    receipts |= zip(unknown, receipts_at([store.join(folder, name) for name in unknown]), strict=True)
    if seen is not None:
        seen |= {name: (found[name], receipt) for name, receipt in receipts.items() if receipt is not None}
    return {name: receipts[name] for name in found}


def _that_fit(found: Mapping[str, str], known: Seen) -> dict[str, Receipt | None]:
    """Return the known receipts of files that are still what they were."""
    return {
        name: known[name][1]
        for name, stamp in found.items()
        if stamp and name in known and known[name][0] == stamp
    }


def fold_receipts(folder: str, receipts: Mapping[str, Receipt]) -> None:
    """Write the receipts of a stage, by task, for later readers; nothing for few tasks.

    They must be those that the folder holds.
    """
    if len(receipts) < LEAST:
        return
    found = stamps(folder)
    entries = [
        [name, stamp, dataclasses.asdict(receipt)]
        for task, receipt in receipts.items()
        for name in [f"{task}.json"]
        if (stamp := found.get(name))
    ]
    data = zlib.compress(json.dumps(entries, ensure_ascii=False).encode("utf-8"), _LEVEL)
    store.write_bytes(store.join(folder, _NAME), store.digest_bytes(data).encode("ascii") + data)


@contextlib.contextmanager
def folding(folder: str, receipts: Mapping[str, Receipt]) -> Iterator["Folding"]:
    """Fold `receipts`, to which the block adds, now and then and when the block ends in any way."""
    fold = Folding(folder, receipts)
    try:
        yield fold
    finally:
        # It only saves time later, and an error of the block says more than this one.
        with contextlib.suppress(OSError, ConfigError):
            fold.write()


class Folding:
    """The writing of one stage's receipts into one file while the stage runs."""

    def __init__(self, folder: str, receipts: Mapping[str, Receipt]) -> None:
        self._folder, self._receipts = folder, receipts
        self._num_written, self._last = len(receipts), time.monotonic()

    def look(self) -> None:
        """Write if it is time."""
        if time.monotonic() - self._last > _SECONDS:
            self.write()

    def write(self) -> None:
        """Write if a receipt has come."""
        if len(self._receipts) > self._num_written:
            fold_receipts(self._folder, self._receipts)
            self._num_written = len(self._receipts)
        self._last = time.monotonic()


def _read(folder: str) -> Seen:
    """Return name → (stamp, receipt) of what was folded; nothing if that is missing or damaged."""
    try:
        data = store.read_bytes(store.join(folder, _NAME))
    except (FileNotFoundError, IsADirectoryError):
        return {}
    if store.digest_bytes(data[_DIGEST_BYTES:]).encode("ascii") != data[:_DIGEST_BYTES]:
        return {}
    try:
        entries: Sequence[tuple[str, str, Receipt]] = _adapter().validate_json(
            zlib.decompress(data[_DIGEST_BYTES:])
        )
    except (ValueError, zlib.error):  # of another release
        return {}
    return {name: (stamp, receipt) for name, stamp, receipt in entries}


@functools.cache
def _adapter() -> Any:
    import pydantic

    return pydantic.TypeAdapter(list[tuple[str, str, Receipt]])
