"""Trackers are not imported by ranks, their launcher and workers: it would take a fifth of their start."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.core.processes import TRACKERS, without
from pipeline.core.stage import Task
from pipeline.executors.local import _each_in_pool

# What the project's programs import; _PROGRAM then says which trackers are there, and which can be imported.
_IMPORTS = {
    "a rank": "with importing(): import eval.features.evaluation_set, training.pretrain",
    "the launcher": "import training.ranks.deepspeed_launch",
    "a worker": "begin_worker(os.getppid()); import timm",
}
_PROGRAM = """
import os, sys
from importlib.util import find_spec
from pipeline.core.processes import begin_worker, importing
{imports}
trackers = ("wandb", "mlflow")
print([name for name in trackers if sys.modules.get(name)], [name for name in trackers if find_spec(name)])
os._exit(0)
"""


@pytest.mark.parametrize("program", _IMPORTS)
def test_no_tracker_is_imported_and_no_folder_left(program: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    said = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(imports=_IMPORTS[program])],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    later = [] if program == "a worker" else ["wandb", "mlflow"]  # a worker tracks nothing
    assert said.stdout.splitlines()[-1] == f"[] {later}"
    assert not list(tmp_path.glob("*wandb*"))


def hidden_trackers(_: Any) -> list[str]:
    return [name for name in TRACKERS if name in sys.modules and sys.modules[name] is None]


def test_workers_of_a_run_and_commands_hide_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = Task("0", {})
    assert list(_each_in_pool(hidden_trackers, [task], 1, {})) == [list(TRACKERS)]

    for name in TRACKERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    seen: list[list[str]] = []
    command = SimpleNamespace(main=lambda **_: seen.append(hidden_trackers(None)) or 0)
    monkeypatch.setattr("pipeline.cli.program", lambda: command)
    assert main(["doctor"]) == 0
    assert seen == [list(TRACKERS)]
    assert hidden_trackers(None) == []


def test_trackers_that_are_imported_already_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", os)
    monkeypatch.delitem(sys.modules, "comet_ml", raising=False)
    with without(*TRACKERS):
        assert sys.modules["wandb"] is os
        with pytest.raises(ImportError):
            import comet_ml  # noqa: F401
    assert sys.modules["wandb"] is os
    assert "comet_ml" not in sys.modules
