"""What the watch over img2dataset looks at, and how often."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.download import watch
from data_prep.download.watch import Watch
from pipeline.core.records import InputError


def _watch(raw: Path, stall_seconds: float) -> tuple[Watch, Any]:
    view = SimpleNamespace(death=None, num_done=0, num_working=1, open=())
    boards: Any = SimpleNamespace(fault=lambda: None, look=lambda: view)
    process: Any = SimpleNamespace(poll=lambda: None)
    return Watch("run/download", stall_seconds, raw, "log", process, boards), view


def test_files_are_counted_seldom_and_growth_is_no_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, counted, real = [1000.0], [], watch._num_bytes
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch, "_num_bytes", lambda raw: (counted.append(raw), real(raw))[1])
    seen, view = _watch(tmp_path, 60.0)
    for look in range(5 * 100):  # five times a second, as the stage looks
        now[0] += 0.2
        if look % 50 == 0:
            (tmp_path / f"{look}.tar").write_bytes(b"a" * look)
        assert seen.look(1, 2) is None
    assert len(counted) < 60
    num_counted = len(counted)
    for _ in range(5 * 100):
        now[0] += 0.2
        view.num_done += 1
        assert seen.look(1, 2) is None
    assert len(counted) == num_counted  # images come to their end: there is nothing to count
    now[0] += 3
    assert seen.look(1, 2) is None
    now[0] += 70
    with pytest.raises(InputError, match="img2dataset wrote nothing for 60 s"):
        seen.look(1, 2)
