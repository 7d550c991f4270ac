"""The one-line bar of `pipeline.core.progress`, drawn by rich, which is imported only for a bar."""

import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from pipeline.core.text_table import display_width

_WIDTH = 78  # columns at most: 80 with the ^C that a terminal may append
_SHORTEST_BAR = 8


class Bar(Progress):
    """rich's Progress in one line: label, bar, and text that is truncated before the line would wrap."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self._terminal = Console(file=stream)
        words = Column(no_wrap=True, overflow="crop")
        super().__init__(
            TextColumn("{task.description}", markup=False, table_column=words),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[words]}", markup=False, table_column=words),
            console=self._terminal,
            auto_refresh=False,  # no thread, since processes fork and Ctrl-C must not hit a drawing
            expand=True,
            # A standard output that goes into a file stays there.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=True,
        )
        self._label = label
        self._task = self.add_task("", total=None, words="")

    def show(self, done: int, total: int, count: str, words: str, left: str) -> None:
        """Set the content of the next drawing."""
        width = self._columns()
        label = self._label if display_width(self._label) <= width // 2 else ""
        room = width - display_width(label) - _SHORTEST_BAR - 2
        self.update(
            self._task,
            description=label,
            completed=done,
            total=total,
            words=fit(count, words.split(" · ") if words else [], left, room),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Draw at most _WIDTH columns on a terminal of any width."""
        yield Constrain(self.make_tasks_table(self.tasks), self._columns())

    def _columns(self) -> int:
        return max(1, min(_WIDTH, self._terminal.width - 2))


def fit(count: str, words: list[str], left: str, room: int) -> str:
    """Return count, text and time left in at most `room` columns; drop last words first, then the time."""
    for kept in range(len(words), -1, -1):
        line = "  ".join(part for part in (count, " · ".join(words[:kept]), left) if part)
        if display_width(line) <= room:
            return line
    return count if len(count) <= room else ""
