"""Checkpoints to resume from: complete or absent, verified on reading, independent of the number of ranks.

A checkpoint is a folder `step_<step>` with `weights.safetensors` (parameters in float32 and buffers, by the
model's names), `optimizer.safetensors` (Adam's two moments, Muon's one, by the same names), `metrics.jsonl`
as it was, and `state.json`: the step, the run's `identity`, every file's sha256 and, last, a digest of this.
It holds no random state, because every random draw of a step is a function of the seed and the step.
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
from training.checkpoint.folders import STATE_FILE, step_folder, steps_in
from training.checkpoint.host_memory import HostMemory
from training.engine.engine import load_weights
from training.engine.towers import Engine
from training.engine.zero_state import (
    adam_of,
    loss_scaling,
    moments_of,
    set_loss_scaling,
    set_moment,
    whole_moment,
    whole_weight,
)

_LEFT_OVER = re.compile(r"\.step_\d{9}\.partial|step_\d{9}\.removing")  # left by a kill
_STATE = STATE_FILE
_OWN_DIGEST = "digest"  # of everything else in state.json
_LOSS_SCALING = "loss_scaling."
_WEIGHTS, _OPTIMIZER, _METRICS = "weights.safetensors", "optimizer.safetensors", "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    folder: str
    step: int  # finished optimizer steps

    @property
    def metrics_path(self) -> str:
        """Return the path of its copy of `metrics.jsonl` at that step."""
        return os.path.join(self.folder, _METRICS)


@dataclass(frozen=True, slots=True)
class TrainState:
    """The complete state from which a run resumes, on the CPU."""

    step: int
    weights: dict[str, Tensor]
    # `exp_avg.<name>`, Adam's `exp_avg_sq.<name>`; in float16 also `loss_scaling.<name>`; averages of weights
    moments: dict[str, Tensor]
    num_updates: int | None = None  # steps that changed weights, if some were skipped; None: all


def gather_state(engine: Engine, step: int, memory: HostMemory) -> TrainState:
    """Gather a copy of the state from all ranks in rank 0's memory; a collective, so every rank calls it.

    Other ranks get a state without weights and moments and drop each tensor on arrival, because ranks share
    a machine's memory.
    """
    moments = {}
    for name, parameter in engine.module.clip.named_parameters():
        if parameter.requires_grad:
            for moment in moments_of(engine, parameter):
                whole = whole_moment(engine, parameter, moment)
                if dist.get_rank() == 0:
                    moments[f"{moment}.{name}"] = memory.copy(f"{moment}.{name}", whole)
    for name, value in loss_scaling(engine).items():
        moments[f"{_LOSS_SCALING}{name}"] = tensor(value, dtype=float64)
    if (averages := engine.module.averages) is not None:
        moments |= {name: memory.copy(name, value) for name, value in averages.state().items()}
    num_updates = int(next(iter(adam_of(engine).state.values()))["step"].item())
    weights = gather_weights(engine, memory)
    memory.wait()
    return TrainState(step, weights, moments, num_updates)


def gather_weights(engine: Engine, memory: HostMemory | None = None) -> dict[str, Tensor]:
    """Return weights and buffers by the names of `CLIP.state_dict` on rank 0's CPU, elsewhere an empty dict.

    They are copies if `memory` takes them, else perhaps the model's own. Parameters come from their float32
    masters; untrained weights that bfloat16 rounds keep their original values. A collective: every rank calls
    it.
    """
    clip, writes = engine.module.clip, dist.get_rank() == 0
    parameters, weights = dict(clip.named_parameters()), {}
    for name, value in {**clip.state_dict(), **parameters}.items():
        whole = whole_weight(parameters[name]) if name in parameters else value
        if writes:
            exact = engine.module.exact.get(name, whole).detach()
            weights[name] = exact.cpu().contiguous() if memory is None else memory.copy(name, exact)
    return weights


def restore_state(engine: Engine, state: TrainState) -> None:
    """Load a state into an engine; each rank keeps its part."""
    load_weights(engine, state.weights)
    for values in adam_of(engine).state.values():
        values["step"].fill_(state.step if state.num_updates is None else state.num_updates)
    for name, parameter in engine.module.clip.named_parameters():
        if parameter.requires_grad:
            for moment in moments_of(engine, parameter):
                set_moment(engine, parameter, state.moments[f"{moment}.{name}"], moment)
    scaling = {
        name.removeprefix(_LOSS_SCALING): value.item()
        for name, value in state.moments.items()
        if name.startswith(_LOSS_SCALING)
    }
    set_loss_scaling(engine, scaling)
    if (averages := engine.module.averages) is not None:
        averages.restore(state.moments, state.step, engine.module.clip)


def save(
    root: str,
    state: TrainState,
    identity: Mapping[str, Any],
    metrics: bytes,
    *,
    keep: int,
    keep_also: Collection[int] = (),
    made_with: Mapping[str, Any] | None = None,
    rank_steps: Callable[[Checkpoint], Sequence[int]] = lambda _: (),
    damaged: Collection[int] = (),
) -> None:
    """Publish a checkpoint under `root`; remove all except the newest `keep` and those that they may need.

    The needed ones are the steps `keep_also` and, for each kept checkpoint, the first existing one of the
    steps that `rank_steps` returns for it, best first: a run that falls back to the checkpoint may end with
    those weights. Later steps, and those that a start found `damaged`, count and stay only if they are
    intact. `metrics` are the bytes of `metrics.jsonl` at that step. `made_with` records how the checkpoint
    was computed, for a resume on other ranks. Only one rank calls it.

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
        with open(os.path.join(partial, _METRICS), "wb") as file:
            file.write(metrics)
        files = {file: store.digest_file(os.path.join(partial, file)) for file in sorted(os.listdir(partial))}
        with open(os.path.join(partial, _STATE), "w", encoding="utf-8") as text:
            fields = {"step": state.step, "num_updates": state.num_updates, "made_with": made_with}
            fields = json.loads(json.dumps({**fields, "identity": identity, "sha256": files}))
            json.dump({**fields, _OWN_DIGEST: digest(fields)}, text, indent=1)
        for path in (*files, _STATE, ""):
            _flush_to_disk(os.path.join(partial, path))
        store.remove(target)  # a damaged checkpoint of the same step
        os.rename(partial, target)
        _flush_to_disk(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"{target}: cannot write the checkpoint: {error}; make room and rerun the same command to resume"
        ) from None
    steps = steps_in(root)
    # Damaged checkpoints must not displace intact ones.
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
    """Return the newest intact checkpoint, or None, and the damage of later ones by step.

    Up to step `shared_steps`, its `epochs` may differ.

    Raises:
        InputError: if the checkpoint belongs to another model, corpus or configuration.
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
    """Return the checkpoint of a step without verification."""
    return Checkpoint(step_folder(root, step), step)


def load(checkpoint: Checkpoint) -> TrainState:
    """Return the state of a verified checkpoint, which `restore_state` loads into an engine."""
    return TrainState(
        checkpoint.step,
        load_weights_of(checkpoint),
        load_file(os.path.join(checkpoint.folder, _OPTIMIZER)),
        parse_json(store.read_text(os.path.join(checkpoint.folder, _STATE))).get("num_updates"),
    )


def load_verified_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the weights of a checkpoint after verifying it.

    Raises:
        InputError: if it is damaged.
    """
    if (damage := find_damage(checkpoint)) is not None:
        raise InputError(
            f"{checkpoint.folder}: damaged ({damage}), and the stage needs its weights as the best ones;"
            " rerun the same command: it resumes from the newest intact checkpoint and chooses among the"
            " remaining weights"
        )
    return load_weights_of(checkpoint)


def load_weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return only the weights and buffers, by the names of `CLIP.state_dict`."""
    return load_file(os.path.join(checkpoint.folder, _WEIGHTS))


def find_damage(checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with a checkpoint on disk, or None if it is intact; this reads all of it."""
    folder, file = checkpoint.folder, _STATE
    try:
        state = parse_json(store.read_text(os.path.join(folder, _STATE)))
        if state.pop(_OWN_DIGEST) != digest(state):
            return f"{_STATE} has changed values"
        for file, sha256 in state["sha256"].items():
            if store.digest_file(os.path.join(folder, file)) != sha256:
                return f"{file} has changed bytes"
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
    """Remove checkpoints of a schedule with other `epochs` if an earlier one precedes the difference.

    Return these epochs and the removed steps, or 0 and no steps if there is nothing to remove. Only one rank
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
            continue  # damaged: `find_newest` reports it
        if [key for key, _, _ in _differences(saved, identity)] != ["epochs"]:
            return 0, []  # it belongs to this run, or to another, which `find_newest` refuses
        others[step] = saved["epochs"]
    else:
        return 0, []
    for step in others:
        store.remove(at_step(root, step).folder)
    return next(iter(others.values()), 0), sorted(others)


def made_with(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return how a verified checkpoint was computed; empty if it does not say."""
    found: Mapping[str, Any] = _read_state(checkpoint).get("made_with") or {}
    return found


def saved_epochs(checkpoint: Checkpoint) -> int:
    """Return the number of epochs of a verified checkpoint's schedule."""
    return int(_read_state(checkpoint)["identity"]["epochs"])


def _read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    state: dict[str, Any] = parse_json(store.read_text(os.path.join(checkpoint.folder, _STATE)))
    return state


def _differences(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    now = json.loads(json.dumps(identity))  # tuples become lists
    keys = sorted(saved.keys() | now.keys())
    return [(key, saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)]


def _require_same_run(checkpoint: Checkpoint, identity: Mapping[str, Any], shared_steps: int) -> None:
    folder = checkpoint.folder
    for key, before, now in _differences(_read_state(checkpoint)["identity"], identity):
        if key == "epochs" and checkpoint.step <= shared_steps:
            continue
        raise InputError(
            f"{folder}: made with {key} = {before}, but this run has {now}:"
            f" remove {os.path.dirname(folder)} to start over, or restore the old value to resume"
        )


def _flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
