"""A rank that hangs ends the run with an error that says who waits for what, instead of waiting for ever."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path

from pipeline.core import store

_EXIT_FAILED = 1
# Validating, saving and starting may take so many times as long as a step: one rank works, the others wait.
_PATIENCE_BETWEEN_STEPS = 8


class Watchdog:
    """Ends this process when it shows no sign of life for `limit_seconds`, or longer between steps.

    In a collective every rank waits for the one that hangs, so all of them end: each writes down what it was
    doing, gives the others the time to do so too, and prints all of it. A rank that wrote nothing is the one
    that is stopped or gone.
    """

    def __init__(self, folder: str, *, stage: str, rank: int, ranks: int, limit_seconds: float) -> None:
        self._folder, self._stage = Path(folder), stage
        self._rank, self._ranks, self._limit_seconds = rank, ranks, limit_seconds
        self._now = ("starting", time.monotonic(), _PATIENCE_BETWEEN_STEPS * limit_seconds)
        self._ended = threading.Event()
        store.remove(str(self._note(rank)))  # of an earlier start
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def alive(self, doing: str, *, between_steps: bool = False) -> None:
        """Give a sign of life, and say what comes now."""
        patience = _PATIENCE_BETWEEN_STEPS if between_steps else 1
        self._now = (doing, time.monotonic(), patience * self._limit_seconds)

    def close(self) -> None:
        """Stop watching: the rank is done."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        period_seconds = min(5.0, self._limit_seconds / 10)
        while not self._ended.wait(period_seconds):
            doing, since, limit_seconds = self._now
            if time.monotonic() - since > limit_seconds:
                self._end(doing, limit_seconds, 3 * period_seconds)

    def _end(self, doing: str, limit_seconds: float, grace_seconds: float) -> None:
        with contextlib.suppress(OSError):  # a full disk must not hide the message below
            self._note(self._rank).write_text(json.dumps({"doing": doing}), encoding="utf-8")
        time.sleep(grace_seconds)
        said = [f"rank {rank}: {self._last_words(rank)}" for rank in range(self._ranks)]
        faulthandler.dump_traceback(sys.stderr)
        print(
            f"error: [{self._stage}] no sign of life for {limit_seconds:g} s; {'; '.join(said)};"
            " the log shows where each rank is; rerun the same command to resume, with a higher"
            " stall_seconds if a step, a validation or a checkpoint takes that long",
            file=sys.stderr,
            flush=True,
        )
        os._exit(_EXIT_FAILED)

    def _last_words(self, rank: int) -> str:
        try:
            doing: str = json.loads(self._note(rank).read_text(encoding="utf-8"))["doing"]
        except (OSError, ValueError):
            return "no response; the process is stopped or dead"
        return doing

    def _note(self, rank: int) -> Path:
        return self._folder / f"stalled_rank_{rank}.json"
