"""Progress for people: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time

from pipeline.core.stage import Progress
from pipeline.core.terminal import one_line, unguarded

_SECONDS_BETWEEN_LINES = 10.0


def make_progress(label: str, unit: str = "task") -> Progress:
    """A Progress that draws on standard error; one per stage."""
    return _Bar(label, unit) if _can_draw() else _Lines(label)


def _can_draw() -> bool:
    """A terminal that says how large it is; on one that does not, a bar would be invisible."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0


class _Lines:
    def __init__(self, label: str) -> None:
        self._label = label
        self._last = time.monotonic()

    def __call__(self, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        if done < total and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        print(
            one_line(f"{self._label}: {done:,} of {total:,}{'  ' + text if text else ''}"),
            file=sys.stderr,
            flush=True,
        )


class _Bar:
    def __init__(self, label: str, unit: str) -> None:
        from tqdm import tqdm

        # The bar moves the cursor, which a guarded stream would not let it.
        self._bar = tqdm(
            desc=one_line(label), unit=unit, dynamic_ncols=True, leave=True, file=unguarded(sys.stderr)
        )

    def __call__(self, done: int, total: int, text: str = "") -> None:
        self._bar.total = total
        self._bar.set_postfix_str(one_line(text), refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()
        if done >= total:
            self._bar.close()
