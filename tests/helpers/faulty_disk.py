"""A disk on which one call fails: the n-th open, read, write, fsync, rename, unlink or making of a folder."""

import builtins
import contextlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KINDS = ("open", "read", "write", "fsync", "rename", "unlink", "mkdir", "list")
_CALLS = {
    "open": "open", "fsync": "fsync", "rename": "rename", "replace": "rename", "remove": "unlink",
    "unlink": "unlink", "rmdir": "unlink", "mkdir": "mkdir", "scandir": "list", "listdir": "list",
}  # fmt: skip


class FaultyDisk:
    """Counts the calls that touch a folder, or what is in it; one of them may fail."""

    def __init__(self, root: Path) -> None:
        self.calls: Counter[str] = Counter()
        self._root = str(root)
        self._fails: tuple[str, int] | None = None
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def failing(self, kind: str = "", number: int = 0, error: BaseException | None = None) -> Iterator[None]:
        """Let the `number`-th call of a kind raise the error inside; without a kind, only count calls."""
        self.calls.clear()
        self._fails, self._error = (kind, number), error
        opened = builtins.open
        with pytest.MonkeyPatch.context() as patch:
            for name, kind_of_call in _CALLS.items():
                patch.setattr(os, name, self._counted(getattr(os, name), kind_of_call))
            for module in (builtins, io):
                patch.setattr(module, "open", self._opener(opened))
            yield

    def met(self, kind: str) -> None:
        """Count a call; raise if it is the one that fails."""
        self.calls[kind] += 1
        if self._error is not None and self._fails == (kind, self.calls[kind]):
            raise self._error

    def _is_ours(self, target: Any, dir_fd: int | None = None) -> bool:
        if isinstance(target, int) or dir_fd is not None:
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{target if dir_fd is None else dir_fd}")
        return isinstance(target, str | os.PathLike) and os.path.abspath(target).startswith(self._root)

    def _counted(self, call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            target = arguments[0] if arguments else "."
            if self._is_ours(target, options.get("dir_fd")):
                self.met(kind)
            return call(*arguments, **options)

        return counted

    def _opener(self, opened: Callable[..., Any]) -> Callable[..., Any]:
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.met("write")
                return super().write(data)

            def readinto(self, buffer: Any) -> int:
                disk.met("read")
                return super().readinto(buffer)

            def readall(self) -> bytes:
                disk.met("read")
                return super().readall()

        def counted(
            file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
            errors: str | None = None, newline: str | None = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if not self._is_ours(file) or "+" in mode or buffering == 0:
                return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not isinstance(file, int):
                self.met("open")
            raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            is_read = "r" in mode
            buffered = io.BufferedReader(raw) if is_read else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return counted
