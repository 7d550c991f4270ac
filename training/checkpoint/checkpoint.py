"""Checkpoints to resume from: whole or not there, verified when read, and independent of the number of ranks.

A checkpoint is a folder `step_<step>` with `weights.safetensors` (parameters in float32 and buffers, by the
model's names), `optimizer.safetensors` (Adam's two moments by the same names), `metrics.jsonl` as it was, and
`state.json`: the step, what the run is (`identity`), every file's sha256 and, last, a digest of all this.
There is no random state in it: every draw of a step is a function of the seed and the step.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, float64, tensor
from torch import distributed as dist

from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.files import durability
from pipeline.core.files.foreign import parse_json
from pipeline.core.files.written import check_safetensors
from pipeline.core.records import InputError
from training.checkpoint.folders import steps_in
from training.engine.engine import load_weights
from training.engine.towers import Engine
from training.engine.zero_state import (
    MOMENTS,
    adam_of,
    loss_scaling,
    set_loss_scaling,
    set_moment,
    whole_moment,
    whole_weight,
)

_LEFT_OVER = re.compile(r"\.step_\d{9}\.partial|step_\d{9}\.removing")  # of a kill while saving or removing
_STATE = "state.json"
_OWN_DIGEST = "digest"  # of what else state.json holds
_LOSS_SCALING = "loss_scaling."
_WEIGHTS, _OPTIMIZER, _METRICS = "weights.safetensors", "optimizer.safetensors", "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    folder: str
    step: int  # optimizer steps that were finished

    @property
    def metrics_path(self) -> str:
        """Its copy of `metrics.jsonl`, as it was at that step."""
        return os.path.join(self.folder, _METRICS)


@dataclass(frozen=True, slots=True)
class TrainState:
    """What a run resumes from, whole and on the CPU."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]  # `exp_avg.<name>`, `exp_avg_sq.<name>`; for float16 `loss_scaling.<name>`
    num_updates: int | None = None  # steps that changed weights, if some were left out; None: all


def gather_state(engine: Engine, step: int) -> TrainState:
    """Put a state together from all ranks for rank 0; a collective, so every rank calls it.

    The others get one without weights and moments, and drop each as it comes: ranks share a machine's memory.
    """
    moments = {}
    for name, parameter in engine.module.clip.named_parameters():
        if parameter.requires_grad:
            for moment in MOMENTS:
                whole = whole_moment(engine, parameter, moment)
                if dist.get_rank() == 0:
                    moments[f"{moment}.{name}"] = whole.cpu().contiguous()
    for name, value in loss_scaling(engine).items():
        moments[f"{_LOSS_SCALING}{name}"] = tensor(value, dtype=float64)
    num_updates = int(next(iter(adam_of(engine).state.values()))["step"].item())
    return TrainState(step, gather_weights(engine), moments, num_updates)


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """Return all weights and buffers by the names of `CLIP.state_dict`, on rank 0's CPU; others get none.

    Parameters come from their float32 masters; what bfloat16 had to round and nothing trained is as it came.
    A collective: every rank calls it.
    """
    clip, writes = engine.module.clip, dist.get_rank() == 0
    parameters, weights = dict(clip.named_parameters()), {}
    for name, value in {**clip.state_dict(), **parameters}.items():
        whole = whole_weight(parameters[name]) if name in parameters else value
        if writes:
            weights[name] = engine.module.exact.get(name, whole).detach().cpu().contiguous()
    return weights


def restore_state(engine: Engine, state: TrainState) -> None:
    """Put a state into an engine; each rank keeps its part."""
    load_weights(engine, state.weights)
    for values in adam_of(engine).state.values():
        values["step"].fill_(state.step if state.num_updates is None else state.num_updates)
    for name, parameter in engine.module.clip.named_parameters():
        if parameter.requires_grad:
            for moment in MOMENTS:
                set_moment(engine, parameter, state.moments[f"{moment}.{name}"], moment)
    scaling = {
        name.removeprefix(_LOSS_SCALING): value.item()
        for name, value in state.moments.items()
        if name.startswith(_LOSS_SCALING)
    }
    set_loss_scaling(engine, scaling)


def save(
    root: str,
    state: TrainState,
    identity: Mapping[str, Any],
    metrics_path: str,
    *,
    keep: int,
    keep_also: Collection[int] = (),
    made_with: Mapping[str, Any] | None = None,
    rank_steps: Callable[[Checkpoint], Sequence[int]] = lambda _: (),
    damaged: Collection[int] = (),
) -> None:
    """Publish a checkpoint under `root`; remove all but the newest `keep` and those that they may need.

    These are the steps `keep_also` and, for each one kept, the first of the steps that `rank_steps` gives for
    it, best first, that is still there: a run that falls back to it may end with those weights. Later steps
    and those that a start found `damaged` count, and stay, only if they are whole. `made_with` says how it
    was computed, for whoever resumes from it on other ranks. One rank calls it.

    Raises:
        InputError: if the disk is full.
    """
    name = f"step_{state.step:09d}"
    partial, target = os.path.join(root, f".{name}.partial"), os.path.join(root, name)
    durability.make_folder(root)
    try:
        sweep(root)
        os.mkdir(partial)
        save_file(state.weights, os.path.join(partial, _WEIGHTS))
        save_file(state.moments, os.path.join(partial, _OPTIMIZER))
        for name in (_WEIGHTS, _OPTIMIZER):
            check_safetensors(os.path.join(partial, name), os.path.join(target, name))
        shutil.copyfile(metrics_path, os.path.join(partial, _METRICS))
        files = {file: store.digest_file(os.path.join(partial, file)) for file in sorted(os.listdir(partial))}
        with open(os.path.join(partial, _STATE), "w", encoding="utf-8") as file:
            fields = {"step": state.step, "num_updates": state.num_updates, "made_with": made_with}
            fields = json.loads(json.dumps({**fields, "identity": identity, "sha256": files}))
            json.dump({**fields, _OWN_DIGEST: digest(fields)}, file, indent=1)
        for path in (*files, _STATE, ""):
            _flush_to_disk(os.path.join(partial, path))
        store.remove(target)  # a damaged one of the same step
        os.rename(partial, target)
        _flush_to_disk(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"{target}: cannot write the checkpoint: {error}; make room and rerun the same command to resume"
        ) from None
    steps = steps_in(root)
    # Damaged ones would take the place of whole ones.
    doubtful = [step for step in steps if step > state.step or (step in damaged and step != state.step)]
    whole = set(steps) - {step for step in doubtful if find_damage(at_step(root, step)) is not None}
    earlier = sorted(step for step in whole if step <= state.step)
    kept = (whole - set(earlier[:-keep])) | set(keep_also)
    unseen = list(kept)
    while unseen:
        ranked = rank_steps(at_step(root, unseen.pop()))
        best = next((step for step in ranked if step in whole), None)
        if best is not None and best not in kept:
            kept.add(best)
            unseen.append(best)
    for step in set(steps) - kept:
        store.remove(at_step(root, step).folder)


def sweep(root: str) -> None:
    """Delete leftovers of interrupted saves and deletions.

    Not safe to call concurrently.
    """
    for name in os.listdir(root) if os.path.isdir(root) else []:
        if _LEFT_OVER.fullmatch(name):
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)


def find_newest(
    root: str, identity: Mapping[str, Any], shared_steps: int = 0
) -> tuple[Checkpoint | None, dict[int, str]]:
    """Return the newest whole checkpoint, None if there is none, and the damage of later ones by step.

    Up to `shared_steps` steps its `epochs` may be others.

    Raises:
        InputError: if it belongs to another model, corpus or configuration.
    """
    damage: dict[int, str] = {}
    for step in sorted(steps_in(root), reverse=True):
        checkpoint = at_step(root, step)
        found = find_damage(checkpoint)
        if found is None:
            _require_same_run(checkpoint, identity, shared_steps)
            return checkpoint, damage
        damage[step] = found
    return None, damage


def at_step(root: str, step: int) -> Checkpoint:
    """Return the checkpoint of a step, not verified."""
    return Checkpoint(os.path.join(root, f"step_{step:09d}"), step)


def load(checkpoint: Checkpoint) -> TrainState:
    """Return the state of a checkpoint that was verified; `restore_state` puts it into an engine."""
    return TrainState(
        checkpoint.step,
        load_weights_of(checkpoint),
        load_file(os.path.join(checkpoint.folder, _OPTIMIZER)),
        parse_json(store.read_text(os.path.join(checkpoint.folder, _STATE))).get("num_updates"),
    )


def load_verified_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the weights of a checkpoint that nobody has verified.

    Raises:
        InputError: if it is damaged.
    """
    if (damage := find_damage(checkpoint)) is not None:
        raise InputError(
            f"{checkpoint.folder}: damaged ({damage}), and it is the best of the stage, whose weights are"
            " wanted; rerun the same command: it resumes from the newest whole checkpoint and chooses"
            " among the weights that are left"
        )
    return load_weights_of(checkpoint)


def load_weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return only the weights and buffers, by the names of `CLIP.state_dict`."""
    return load_file(os.path.join(checkpoint.folder, _WEIGHTS))


def find_damage(checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with a checkpoint on disk, None if it is whole; reads all of it."""
    folder, file = checkpoint.folder, _STATE
    try:
        state = parse_json(store.read_text(os.path.join(folder, _STATE)))
        if state.pop(_OWN_DIGEST) != digest(state):
            return f"{_STATE} has other values than were written"
        for file, sha256 in state["sha256"].items():
            if store.digest_file(os.path.join(folder, file)) != sha256:
                return f"{file} has other bytes than were written"
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{_STATE} cannot be read: {error!r}"
    return None


def remove_other_schedules(
    root: str, identity: Mapping[str, Any], shared_steps: int
) -> tuple[int, list[int]]:
    """Remove what followed the schedule of other `epochs`, if an earlier checkpoint is there that did not.

    Return these epochs and the steps that are gone; 0 and no steps if there is nothing to remove. One rank
    calls it.
    """
    others: dict[int, int] = {}
    for step in sorted(steps_in(root), reverse=True):
        checkpoint = at_step(root, step)
        if step <= shared_steps:
            if find_damage(checkpoint) is None:
                break
            continue
        try:
            saved = _read_state(checkpoint)["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: `find_newest` tells of it
        if [key for key, _, _ in _differences(saved, identity)] != ["epochs"]:
            return 0, []  # of this run, or of another one, which `find_newest` refuses
        others[step] = saved["epochs"]
    else:
        return 0, []
    for step in others:
        store.remove(at_step(root, step).folder)
    return next(iter(others.values()), 0), sorted(others)


def made_with(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return how a verified checkpoint was computed; empty if it was saved before that was noted."""
    found: Mapping[str, Any] = _read_state(checkpoint).get("made_with") or {}
    return found


def saved_epochs(checkpoint: Checkpoint) -> int:
    """Return the epochs that a verified checkpoint's schedule was for."""
    return int(_read_state(checkpoint)["identity"]["epochs"])


def _read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    state: dict[str, Any] = parse_json(store.read_text(os.path.join(checkpoint.folder, _STATE)))
    return state


def _differences(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    now = json.loads(json.dumps(identity))  # tuples are lists there
    keys = sorted(saved.keys() | now.keys())
    return [(key, saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)]


def _require_same_run(checkpoint: Checkpoint, identity: Mapping[str, Any], shared_steps: int) -> None:
    folder = checkpoint.folder
    for key, before, now in _differences(_read_state(checkpoint)["identity"], identity):
        if key == "epochs" and checkpoint.step <= shared_steps:
            continue
        raise InputError(
            f"{folder}: made with {key} = {before}, but this run has {now}:"
            f" remove {os.path.dirname(folder)} to train anew, or restore the old value to resume"
        )


def _flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
