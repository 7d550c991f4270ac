"""Make `import torchvision` work in every interpreter of an environment, without the project's imports.

`python -m training.model.torchvision_site`, which `make install` runs, looks if the installed torchvision
loads next to the installed torch. If it does not, a `.pth` file puts `torchvision_ops` into each interpreter
that starts: `from transformers import ChineseCLIPModel` and `import timm` then work by themselves.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from training.model import torchvision_ops

# A copy, not an import of the project: a folder `training/` of the user's must not be found instead.
_MODULE = "cnclip_torchvision"
_LINE = f"import {_MODULE}; {_MODULE}.install()\n"


def write_hook(folder: Path) -> None:
    """Write the hook and the `.pth` that starts it into a folder of site packages."""
    source = Path(torchvision_ops.__file__).read_text(encoding="utf-8")
    (folder / f"{_MODULE}.py").write_text(source, encoding="utf-8")
    (folder / f"{_MODULE}.pth").write_text(_LINE, encoding="utf-8")


def remove_hook(folder: Path) -> None:
    """Remove what `write_hook` wrote, if it is there."""
    for ending in (".pth", ".py"):
        (folder / f"{_MODULE}{ending}").unlink(missing_ok=True)


def torchvision_loads() -> bool:
    """Return whether a fresh interpreter of this environment imports torchvision."""
    # Isolated: neither PYTHONPATH nor the working directory counts.
    command = [sys.executable, "-I", "-c", "import torchvision"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Write the hook if it is needed, and say what was found; the status is 1 if it does not help."""
    folder = Path(sysconfig.get_paths()["purelib"])
    remove_hook(folder)
    if torchvision_loads():
        print("torchvision loads next to this torch")
        return 0
    write_hook(folder)
    if torchvision_loads():
        print(f"torchvision is built for another torch: {folder / _MODULE}.pth lets it load")
        return 0
    remove_hook(folder)
    print("error: torchvision does not load: python -c 'import torchvision' says why", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
