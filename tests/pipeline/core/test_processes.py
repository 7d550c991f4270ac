"""What ranks say while others say something too."""

import io

import pytest

from pipeline.core.processes import say


class Written(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def write(self, text: str) -> int:
        self.parts.append(text)
        return super().write(text)


def test_a_line_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, standard = Written(), Written()
    monkeypatch.setattr("sys.stdout", standard)
    say("stopped: by SIGTERM", stream)
    say("going on")
    assert (stream.parts, standard.parts) == (["stopped: by SIGTERM\n"], ["going on\n"])
