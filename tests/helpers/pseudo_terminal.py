"""Runs a command in a terminal of a given width, and types Ctrl-C into it."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_ERASE = "\x1b[2K"
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True, slots=True)
class Shown:
    """What a command wrote to its terminal."""

    status: int
    text: str  # with control sequences

    def lines(self) -> list[str]:
        """Return the lines on the screen; a carriage return restarts a line."""
        lines, line = [], ""
        for part in re.split(r"(\r\n|\r|\x1b\[2K)", self.text):
            if part == "\r\n":
                lines.append(line)
                line = ""
            elif part == "\r":
                pass  # the next text goes over this one, from its beginning
            elif part == _ERASE:
                line = ""
            else:
                shown = _SEQUENCE.sub("", part)
                line = shown + line[len(shown) :] if line else shown
        return [*lines, line] if line else lines

    def drawings(self) -> list[str]:
        """Return every state of every line, in order."""
        parts = re.split(r"\r\n|\r", self.text)
        return [found for part in parts if (found := _SEQUENCE.sub("", part))]


def run_in_terminal(
    command: Sequence[str],
    *,
    columns: int = 80,
    environment: Mapping[str, str] | None = None,
    interrupt_at: str = "",
    timeout_seconds: float = 120.0,
) -> Shown:
    """Run a command in a terminal; Ctrl-C is typed once the text `interrupt_at` is shown."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")
    }
    process_id, terminal = pty.fork()
    if process_id == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background of a shell ignore it
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.chdir(ROOT)
        settings = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **(environment or {})}
        os.execvpe(command[0], list(command), {**inherited, **settings})
    seen, typed, until = b"", False, time.monotonic() + timeout_seconds
    while True:
        readable, _, _ = select.select([terminal], [], [], 0.1)
        if readable:
            try:
                found = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if not found:
                break
            seen += found
        if interrupt_at and not typed and interrupt_at.encode() in seen:
            os.write(terminal, b"\x03")
            typed = True
        if time.monotonic() > until:
            os.kill(process_id, signal.SIGKILL)
            os.waitpid(process_id, 0)
            raise subprocess.TimeoutExpired(list(command), timeout_seconds, seen)
    os.close(terminal)
    _, status = os.waitpid(process_id, 0)
    return Shown(os.waitstatus_to_exitcode(status), seen.decode("utf-8", "replace"))
