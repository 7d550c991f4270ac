"""Detects when a call of img2dataset cannot succeed, which img2dataset reports late or not at all."""

import contextlib
import errno
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from data_prep.download.board import Boards, name_open
from pipeline.core.records import InputError

_LEAST_FREE_BYTES = 1 << 20  # below this and without progress, the disk of img2dataset's files counts as full
_FULL_SECONDS = 3.0
_COUNT_SECONDS = 2.0  # from one count of the bytes to the next, while nothing else moves
_START_SECONDS = 240.0


@dataclass
class Watch:
    """Detects that img2dataset has ended, hangs, has lost a worker, or has no disk space."""

    folder: str  # of the stage, for errors
    stall_seconds: float
    raw: Path
    log: str
    process: subprocess.Popen[bytes]
    boards: Boards

    def __post_init__(self) -> None:
        self._last_change = self._last_count = time.monotonic()
        self._last_done, self._last_bytes = -1, -1
        self._ended: int | None = None

    def look_before(self) -> None:
        """Record whether img2dataset has ended; called before its files are read, so that they are final."""
        self._ended = self.process.poll()

    def look(self, num_waiting: int, num_tasks: int) -> tuple[int, str] | None:
        """Return the shard on which a worker died and a description; None if no worker died.

        Raises:
            OSError: if a worker or the disk itself reports that the disk is full.
            InputError: if img2dataset has ended, or nothing has moved for `stall_seconds`.
        """
        if (fault := self.boards.fault()) is not None:
            raise OSError(fault.errno, fault.strerror, str(self.raw))
        view = self.boards.look()
        if view.death is not None:
            number, its_open = view.death
            at = f" while at {name_open(its_open)}" if its_open else ""
            return number, f"its worker died, as if killed or out of memory,{at or ' before it asked'}"
        now = time.monotonic()
        # Counting reads all folders, so do it rarely and only while no image is finished.
        if view.num_done != self._last_done:
            self._last_change, self._last_done = now, view.num_done
        elif now - max(self._last_count, self._last_change) > min(_COUNT_SECONDS, self.stall_seconds / 4):
            self._last_count, num_bytes = now, _num_bytes(self.raw)
            if num_bytes != self._last_bytes:
                self._last_change, self._last_bytes = now, num_bytes
        idle = now - self._last_change
        if (idle > _FULL_SECONDS or self._ended is not None) and _is_full(self.raw):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.raw))
        if self._ended is not None:
            raise InputError(
                f"{self.folder}: img2dataset ended with status {self._ended} and left"
                f" {num_waiting} of {num_tasks} partitions; see {self.log}, then run again"
            )
        # Workers spend a while on imports before they begin, longer on a busy machine.
        limit = self.stall_seconds if view.num_working else max(self.stall_seconds, _START_SECONDS)
        if idle > limit:
            at = f" at {name_open(view.open)}" if view.open else ", and has no address open"
            raise InputError(
                f"{self.folder}: img2dataset wrote nothing for {limit:g} s, so a"
                f" worker hangs{at}: rerun the same command to resume with the remaining partitions"
            )
        return None


def _is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < _LEAST_FREE_BYTES


def _num_bytes(raw: Path) -> int:
    """Return bytes plus files below img2dataset's output folder; the sum grows while anything happens."""
    total = 0
    for path in raw.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size + 1
    return total
