"""A training stage whose folder is in an object store: where it works on this machine, and what it copies.

Ranks write local files only. Checkpoints, curves and logs are copied to the stage's folder when a checkpoint
is written, outputs when training is done, and a start on another machine copies them back.
No torch here: the stage itself uses this before training starts.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator

import platformdirs

from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import ConfigError, InputError
from training.checkpoint.folders import STATE_FILE, checkpoints_folder, step_folder, steps_in

_NOTE = "work.json"  # in the stage's folder; removed with it, so that a redo finds no checkpoint of before
_CONTINUED = ("log.jsonl", "tracking.wandb.json", "tracking.mlflow.json")  # files that a start appends to
_CURVES = "tensorboard"
_ID = re.compile(r"[0-9a-f]{16}")


def work_folder(stage_folder: str, cache_folder: str | None, *, begin: bool = False) -> str:
    """Return the local folder in which a stage works: its own, or for a URL one below `cache_folder`.

    `begin` names the work of a stage that has none yet.

    Raises:
        ConfigError: if the stage has no work yet, or its note is damaged.
    """
    if store.is_local(stage_folder):
        return stage_folder
    path = store.join(stage_folder, _NOTE)
    if not store.exists(path):
        if not begin:
            raise ConfigError(
                f"{path}: no such file: the stage was never started; start it with `cnclip run`"
            )
        store.write_text(path, json.dumps({"id": secrets.token_hex(8)}))
    try:
        name = str(parse_json(store.read_text(path))["id"])
    except (ValueError, KeyError, TypeError):
        name = ""
    if not _ID.fullmatch(name):  # folders next to it are removed, so it must not lead elsewhere
        raise ConfigError(
            f"{path}: holds no id of 16 hexadecimal digits; remove it: a rerun resumes from the checkpoints"
            " next to it"
        )
    base = os.path.abspath(cache_folder or platformdirs.user_cache_dir("cnclip"))
    return os.path.join(base, "training", digest(stage_folder)[:16], name)


def prepare(stage_folder: str, cache_folder: str | None) -> str:
    """Return the local folder in which a stage works, made, and remove what an earlier redone one left.

    Raises:
        InputError: if it cannot be made.
    """
    folder = work_folder(stage_folder, cache_folder, begin=True)
    if store.is_local(stage_folder):
        return folder
    parent = os.path.dirname(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        for entry in os.scandir(parent):
            if entry.path != folder:
                shutil.rmtree(entry.path, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made ({error.strerror}): set cache_folder to a folder on this machine"
        ) from None
    return folder


def bring(folder: str, stage_folder: str) -> None:
    """Copy the checkpoints of a stage's folder to its local folder, and the files that a start appends to.

    Checkpoints that are here too are not copied; local ones that the store lacks were written last, and stay.

    Raises:
        InputError: if a checkpoint cannot be copied.
    """
    root, remote_root = checkpoints_folder(folder), checkpoints_folder(stage_folder)
    for step in steps_in(remote_root):
        bring_checkpoint(root, remote_root, step)
    for name in _CONTINUED:
        source, target = store.join(stage_folder, name), os.path.join(folder, name)
        if not os.path.exists(target) and store.exists(source):
            with _copying(source, target):
                store.write_bytes(target, store.read_bytes(source))


def bring_checkpoint(root: str, remote_root: str, step: int) -> None:
    """Copy a checkpoint to a local folder, unless it is there; one whose copy there is not whole is none.

    Raises:
        InputError: if it cannot be copied.
    """
    source, target = step_folder(remote_root, step), step_folder(root, step)
    state = _state(source)
    if state is None or state == _state(target):
        return
    partial = os.path.join(root, f".{os.path.basename(target)}.partial")
    with _copying(source, target):
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        for name in store.list_files(source):
            fs, remote = store.remote(store.join(source, name))
            fs.get_file(remote, os.path.join(partial, name))
        store.remove(target)
        os.rename(partial, target)


def send(folder: str, stage_folder: str, notice: Callable[[str], None]) -> None:
    """Copy what is new of checkpoints, curves and logs to a stage's folder, and remove old checkpoints there.

    A store that does not answer costs only a notice: the next checkpoint is copied with all that is missing.
    """
    try:
        _send_checkpoints(checkpoints_folder(folder), checkpoints_folder(stage_folder))
        _send_files(folder, stage_folder)
    except (OSError, ConfigError) as error:
        notice(
            f"{stage_folder}: the checkpoint cannot be copied there ({error}): training continues and copies"
            f" it with the next one; until then it is only in {folder}"
        )


def finish(folder: str, stage_folder: str, outputs: list[str]) -> None:
    """Copy all that a finished stage keeps to its folder, and remove the local folder.

    `outputs` are the names of files that have to be there.

    Raises:
        InputError: if it cannot be copied.
    """
    with _copying(folder, stage_folder):
        _send_checkpoints(checkpoints_folder(folder), checkpoints_folder(stage_folder))
        _send_files(folder, stage_folder, also=outputs)
    shutil.rmtree(folder, ignore_errors=True)


def send_log(folder: str, stage_folder: str) -> None:
    """Copy the logs of a start that failed or was stopped, if the store takes them."""
    with contextlib.suppress(OSError, ConfigError):
        _send_files(folder, stage_folder)


def _send_checkpoints(root: str, remote_root: str) -> None:
    steps = steps_in(root)
    for step in steps:
        source, target = step_folder(root, step), step_folder(remote_root, step)
        state, before = _state(source), _state(target)
        if state is None or state == before:
            continue
        if before is not None:  # while its files are replaced it is not whole
            store.remove(store.join(target, STATE_FILE))
        names = [name for name in store.list_files(source) if name != STATE_FILE]
        for name in (*names, STATE_FILE):
            _put(os.path.join(source, name), store.join(target, name))
    for step in set(steps_in(remote_root)) - set(steps):
        store.remove(store.join(step_folder(remote_root, step), STATE_FILE))
        store.remove(step_folder(remote_root, step))


def _send_files(folder: str, stage_folder: str, also: list[str] | None = None) -> None:
    outputs = also or []
    for name in store.list_files(folder):
        if name.endswith((".jsonl", ".json", ".tsv", ".log")) and name not in outputs:
            _put(os.path.join(folder, name), store.join(stage_folder, name))
    for name in store.list_files(os.path.join(folder, _CURVES)):
        _put(os.path.join(folder, _CURVES, name), store.join(stage_folder, _CURVES, name))
    for name in outputs:
        _put(os.path.join(folder, name), store.join(stage_folder, name))


def _put(source: str, target: str) -> None:
    fs, name = store.remote(target)
    fs.put_file(source, name)


def _state(folder: str) -> bytes | None:
    try:
        return store.read_bytes(store.join(folder, STATE_FILE))
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _copying(source: str, target: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{target}: cannot be copied from {source} ({error}): make room or check the store, and rerun the"
            " same command to resume"
        ) from None
