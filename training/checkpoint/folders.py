"""Finds a stage's checkpoints without importing torch, for code that runs before training starts."""

import os
import re

_STEP_FOLDER = re.compile(r"step_(\d{9})")


def checkpoints_folder(folder: str) -> str:
    """Return the folder of the checkpoints in a stage's folder."""
    return os.path.join(folder, "checkpoints")


def steps_in(root: str) -> list[int]:
    """Return the steps of the checkpoints under `root` without verification, unsorted."""
    names = os.listdir(root) if os.path.isdir(root) else []
    return [int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name))]
