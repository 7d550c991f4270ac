"""Shared files in which download workers report what they are doing, read by the stage while they work.

img2dataset reports nothing until a shard is done, and a worker that dies or fills the disk never reports
anything. So each worker has a board, a memory-mapped file of fixed size: the addresses that it has open, how
many it has finished, and its current shard. Errors that stop all work, such as a full disk, go into another
file, whose space is reserved beforehand.
"""

import contextlib
import json
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BOARD_VARIABLE = "CNCLIP_DOWNLOAD_BOARD"  # environment variable of the download workers: the boards' folder

_HEAD = struct.Struct("<qq")  # addresses done with, img2dataset's shard + 1 (0: none)
_HEAD_BYTES = 64
_SLOT = struct.Struct("<dH")  # start (time.time(); 0: nothing is open), bytes of the text
_SLOT_BYTES = 512
_NUM_SLOTS = 130  # the first is for the decoding thread; threads beyond the last slot share it
_FAULT = "fault"
_FAULT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Open:
    """An address that a worker is fetching or decoding."""

    address: str
    since: float  # time.time()


@dataclass(frozen=True, slots=True)
class View:
    """The current state of all workers of one call."""

    num_done: int  # addresses
    open: list[Open]  # longest first
    num_working: int  # workers that have a shard
    death: tuple[int, list[Open]] | None  # the shard that a worker left unfinished, and what it had open


class Board:
    """A worker's own board."""

    def __init__(self, folder: str, num_threads: int) -> None:
        self._num_slots = min(num_threads + 1, _NUM_SLOTS)
        size = _HEAD_BYTES + self._num_slots * _SLOT_BYTES
        with open(os.path.join(folder, str(os.getpid())), "w+b") as file:
            file.write(bytes(size))  # reserves the space now: running out of it in a mapping raises SIGBUS
            file.flush()
            self._memory = mmap.mmap(file.fileno(), size)
        self._lock = threading.Lock()
        self._own = threading.local()
        self._next_slot, self._num_done = 1, 0

    def begin_shard(self, number: int) -> None:
        """Report that the worker has begun img2dataset's shard `number`."""
        self._write_head(number + 1)

    def end_shard(self) -> None:
        """Report that the worker has no shard and no open addresses."""
        self._write_head(0)

    def _write_head(self, shard: int) -> None:
        self._shard = shard
        _HEAD.pack_into(self._memory, 0, self._num_done, shard)

    @contextlib.contextmanager
    def open(self, address: str) -> Iterator[None]:
        """Mark an address as open around its request."""
        slot = self._slot()
        self._write(slot, time.time(), address)
        try:
            yield
        finally:
            self._write(slot, 0.0, "")
            with self._lock:
                self._num_done += 1
                struct.pack_into("<q", self._memory, 0, self._num_done)

    @contextlib.contextmanager
    def decode(self, address: str) -> Iterator[None]:
        """Mark the body from an address as being decoded."""
        self._write(0, time.time(), f"decoding {address}")
        try:
            yield
        finally:
            self._write(0, 0.0, "")

    def _slot(self) -> int:
        # Each shard starts new threads, so slots are reused in turn.
        if not hasattr(self._own, "slot"):
            with self._lock:
                self._own.slot = self._next_slot
                self._next_slot = self._next_slot % (self._num_slots - 1) + 1
        slot: int = self._own.slot
        return slot

    def _write(self, slot: int, since: float, address: str) -> None:
        text = address[: _SLOT_BYTES // 2].encode("utf-8", "replace")[: _SLOT_BYTES - _SLOT.size]
        place = _HEAD_BYTES + slot * _SLOT_BYTES
        self._memory[place + _SLOT.size : place + _SLOT.size + len(text)] = text
        _SLOT.pack_into(self._memory, place, since, len(text))


def report(folder: str, error: OSError) -> None:
    """Report an error that stops the work to the stage; the first one counts."""
    told = json.dumps([error.errno, error.strerror or str(error)]).encode()[: _FAULT_BYTES - 1]
    with contextlib.suppress(OSError), open(os.path.join(folder, _FAULT), "r+b") as file:
        if file.read(1) == b"\0":
            file.seek(0)
            file.write(told)


class Boards:
    """All boards of one call of img2dataset, for the stage."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, before any worker starts."""
        self.folder = folder
        folder.mkdir()
        (folder / _FAULT).write_bytes(bytes(_FAULT_BYTES))
        self._done_before = 0  # by workers that ended

    def fault(self) -> OSError | None:
        """Return the error that a worker reported, or None."""
        told = (self.folder / _FAULT).read_bytes().rstrip(b"\0")
        if not told:
            return None
        try:
            number, text = json.loads(told)
        except ValueError:  # cut, or still being written
            return None
        return OSError(number, text)

    def look(self) -> View:
        """Return the state of the workers, and remove the boards of workers that have ended."""
        done, working, opened, death = 0, 0, list[Open](), None
        for path in self.folder.iterdir():
            if path.name == _FAULT:
                continue
            alive = _is_alive(int(path.name))  # before the board is read, since workers report last
            data = path.read_bytes()
            if len(data) < _HEAD_BYTES:
                continue
            num_done, shard = _HEAD.unpack_from(data)
            here = _read_slots(data) if shard else []
            if alive:
                done += num_done
                working += shard != 0
                opened += here
                continue
            if shard:
                death = (shard - 1, here)
            self._done_before += num_done
            path.unlink()
        opened.sort(key=lambda item: item.since)
        return View(self._done_before + done, opened, working, death)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with (
        contextlib.suppress(OSError),
        open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file,
    ):
        return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")  # a zombie is dead
    return True


def _read_slots(data: bytes) -> list[Open]:
    found = []
    for place in range(_HEAD_BYTES, len(data) - _SLOT_BYTES + 1, _SLOT_BYTES):
        since, size = _SLOT.unpack_from(data, place)
        if since:
            text = data[place + _SLOT.size : place + _SLOT.size + size]
            found.append(Open(text.decode("utf-8", "ignore"), since))
    return found


def name_open(opened: list[Open], most: int = 3) -> str:
    """Return text that names the addresses open the longest, and for how long."""
    now = time.time()
    named = [f"{item.address} (for {now - item.since:.0f} s)" for item in opened[:most]]
    if len(opened) > most:
        named.append(f"and {len(opened) - most} more")
    return ", ".join(named)
