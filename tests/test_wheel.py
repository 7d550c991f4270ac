"""The wheel holds all that a run needs: installed elsewhere, in any folder, it runs the demo to the end."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A tenth of the demo: what is shown is that every stage finds its code, its data and its children.
SMALL = (
    "corpus.num_clean=300", "corpus.num_evaluation=30", "corpus.dirt=0.02", "download.retries=0",
    "download.timeout_seconds=2.0", "english.epochs=1", "stage1.epochs=1", "stage2.epochs=1",
)  # fmt: skip


def _installed(folder: Path) -> Path:
    """Install the wheel into a new environment with the dependencies of this one, and return `bin`."""
    wheels = folder / "wheels"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels)]
    copy = folder / "source"
    # Builds leave files in the source: they take place in a copy of what git tracks.
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in tracked.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(copy)], check=True)
    venv.create(folder / "environment", with_pip=True)
    place = folder / "environment"
    site = sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)})
    # A folder that a .pth file names is searched, but not for .pth files, such as an editable install's.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = wheels.glob("*.whl")
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--force-reinstall", str(wheel)], check=True)
    return place / "bin"


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_in_any_folder(tmp_path: Path) -> None:
    programs = _installed(tmp_path)
    here = tmp_path / "here"
    for name in ("training", "eval", "data_prep", "pipeline"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = [f"--set={item}" for item in SMALL]

    def cnclip(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(programs / "cnclip"), *arguments]
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)

    done = cnclip("run", "demo", *settings)
    assert done.returncode == 0, done.stderr
    assert "report: runs/demo/report/report.html" in done.stdout
    assert (here / "runs" / "demo" / "report" / "report.html").is_file()
    converted = cnclip("convert", "runs/demo/stage2/model.safetensors", "demo-clip")
    assert converted.returncode == 0, converted.stderr
    assert (here / "demo-clip" / "modeling_chinese_clip_resnet.py").is_file()  # package data
    program = "import cnclip, pipeline; print(cnclip.load('runs/demo').dim, pipeline.__file__)"
    python = str(programs / "python")
    loaded = subprocess.run(
        [python, "-c", program], cwd=here, env=environment, capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    assert str(tmp_path / "environment") in loaded.stdout
