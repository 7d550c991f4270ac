"""transformers and timm load in an interpreter that knows nothing of this project."""

import subprocess
import sys
from pathlib import Path

import pytest

from training.model.torchvision_site import remove_hook, torchvision_loads, write_hook

_PROGRAM = """
import site, sys
site.addsitedir(sys.argv[1])
assert "torch" not in sys.modules  # the hook costs nothing before torchvision is imported
from transformers import ChineseCLIPModel
import timm
print(ChineseCLIPModel.__name__, "training.model" in sys.modules)
"""


def _run(folder: Path, program: str = _PROGRAM) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_transformers_gives_its_chinese_clip_in_a_fresh_interpreter(tmp_path: Path) -> None:
    if not torchvision_loads():  # what `make install` looks at
        write_hook(tmp_path)
    done = _run(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["ChineseCLIPModel", "False"]


def test_the_hook_does_no_harm_next_to_the_projects_own(tmp_path: Path) -> None:
    write_hook(tmp_path)
    root = str(Path(__file__).parents[3])
    program = (
        f"import site, sys; site.addsitedir(sys.argv[1]); sys.path.insert(0, {root!r});"
        "import training.model, torchvision; print(torchvision.transforms.Resize.__name__)"
    )
    done = _run(tmp_path, program)
    assert done.stdout.strip() == "Resize", done.stderr[-2000:]


def test_removing_the_hook_leaves_nothing(tmp_path: Path) -> None:
    write_hook(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    remove_hook(tmp_path)
    assert not list(tmp_path.iterdir())
