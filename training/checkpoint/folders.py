"""Where a stage's checkpoints are, for whoever looks before training starts.

No torch here.
"""

import os
import re

_STEP_FOLDER = re.compile(r"step_(\d{9})")


def checkpoints_folder(folder: str) -> str:
    """Return where the checkpoints of a stage's folder are."""
    return os.path.join(folder, "checkpoints")


def steps_in(root: str) -> list[int]:
    """Return the steps of the checkpoints under `root`, not verified, in no order."""
    names = os.listdir(root) if os.path.isdir(root) else []
    return [int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name))]
