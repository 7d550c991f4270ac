"""What the download worker imports."""

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import sys
import data_prep.download.worker
import img2dataset.main
import img2dataset.logger
imported = [name for name in sys.modules if name.partition(".")[0] == "wandb"]
print(imported, getattr(sys.modules["wandb"], "__file__", None))
"""


def test_the_worker_imports_no_wandb_and_leaves_no_temporary_folder_of_it(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", _PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split("\n")[0] == "['wandb'] None"  # the name alone
    assert " wandb" not in said.stderr  # importtime: no module of it was loaded
    assert "img2dataset.logger" in said.stderr
    assert not list(tmp_path.glob("*wandb*"))


def test_real_wandb_would_make_such_folders(tmp_path: Path) -> None:
    """The folders are found by the test above if they are there."""
    program = "import os, img2dataset.logger; os._exit(0)"  # as a worker that is killed
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert list(tmp_path.glob("*wandb*"))


def test_a_worker_imports_neither_torch_nor_ray() -> None:
    """Both take half of its start and of its memory; webdataset and img2dataset work without."""
    program = (
        "import runpy, sys; sys.argv = ['worker', '/no/options.json']\n"
        "try: runpy.run_module('data_prep.download.worker', run_name='__main__')\n"
        "except Exception: pass\n"
        "print(sorted({'torch', 'ray', 'webdataset', 'img2dataset'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "['img2dataset', 'webdataset']"
