"""Finds a stage's checkpoints without importing torch, for code that runs before training starts."""

import re

from pipeline.core import store

STATE_FILE = "state.json"  # written last: its existence makes a checkpoint whole
_STEP_FOLDER = re.compile(r"step_(\d{9})")


def checkpoints_folder(folder: str) -> str:
    """Return the folder of the checkpoints in a stage's folder."""
    return store.join(folder, "checkpoints")


def step_folder(root: str, step: int) -> str:
    """Return the folder of a checkpoint."""
    return store.join(root, f"step_{step:09d}")


def steps_in(root: str) -> list[int]:
    """Return the steps of the checkpoints under `root` without verification, unsorted."""
    names = store.list_folders(root)
    return [int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name))]
