"""The end of a training stage: which weights it ends with, their averages, and the files."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch import distributed as dist

from pipeline.core import store
from pipeline.core.records import InputError
from training.checkpoint import checkpoint
from training.checkpoint.finished import mark_finished
from training.checkpoint.folders import checkpoints_folder
from training.config.averages import AveragesConfig
from training.config.job import TrainJob
from training.engine.averages import interpolated
from training.engine.towers import Engine, Towers
from training.model.clip import CLIP
from training.trainer import Recalls, Validate
from training.weights.weights import save_checkpoint, save_openai


def write_model(
    job: TrainJob,
    engine: Engine,
    last_step: int,
    chosen_step: int,
    *,
    validate: Validate | None,
    start: Callable[[], CLIP],
    notice: Callable[[str], None],
    alive: Callable[[str], None],
) -> None:
    """Consolidate and write the weights of a step by rank 0; every rank calls it.

    The engine holds those of `last_step`; those of an earlier one come from its checkpoint. If the stage
    averages weights, `validate` scores the averages, `start` gives the model that the stage started from, and
    `notice` hears the scores. `alive` hears what comes next: each part has the watchdog's time for itself.
    """
    alive("writing the model")
    weights = checkpoint.gather_weights(engine) if chosen_step == last_step else {}
    if dist.get_rank() == 0 and chosen_step != last_step:
        chosen = checkpoint.at_step(checkpoints_folder(job.folder), chosen_step)
        weights = checkpoint.load_verified_weights(chosen)
    averages = job.config.averages
    if averages is not None:
        weights = _with_averages(job, averages, engine.module, weights, validate, start, notice, alive)
        alive("writing the model")
    if dist.get_rank() == 0:
        metadata = {"stage": job.stage, "samples_seen": str(chosen_step * job.config.global_batch)}
        final = _filled(engine.module.clip, weights)
        if job.openai_model is not None:
            with _disk_may_be_full(job.openai_model, job.folder):
                save_openai(job.openai_model, final, final.config)
        with _disk_may_be_full(job.output_model, job.folder):
            save_checkpoint(job.output_model, final, final.config, metadata)
            mark_finished(job)
    dist.barrier()


def _with_averages(
    job: TrainJob,
    config: AveragesConfig,
    towers: Towers,
    plain: dict[str, Tensor],
    validate: Validate | None,
    start: Callable[[], CLIP],
    notice: Callable[[str], None],
    alive: Callable[[str], None],
) -> dict[str, Tensor]:
    """Score and write every average; return the weights with which the stage ends, on rank 0."""
    plain = {name: tensor.clone() for name, tensor in plain.items()}  # they may be the model's own
    found = {"plain": plain}
    if dist.get_rank() == 0:
        assert towers.averages is not None
        found |= towers.averages.weights(plain)
        first = start().state_dict() if config.interpolate else {}
        for share in config.interpolate:
            found[f"interpolated_{share:g}"] = interpolated(first, plain, share)
    scores: dict[str, Recalls] = {}
    for name in config.names:
        alive(f"scoring the {name} weights")
        _put(towers.clip, found.get(name, {}))
        scores[name] = _score(towers, validate)
    means = {name: _mean(recalls, job.config.choose_on) for name, recalls in scores.items()}
    used: str = config.use
    if config.use == "best":
        used = max(means, key=lambda name: means[name] or 0.0)
    listed = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items() if mean is not None)
    recall = f"mean recall: {listed}" if listed else "no evaluation set to score the averages on"
    notice(f"[{job.stage}] {recall}; the stage ends with the {used} weights")
    if dist.get_rank() == 0:
        for name in config.names:
            alive(f"writing the {name} weights")
            path = store.join(job.folder, f"model_{name}.safetensors")
            with _disk_may_be_full(path, job.folder):
                model = _filled(towers.clip, found[name])
                save_checkpoint(path, model, model.config, {"stage": job.stage, "average": name})
        document = {"used": used, "mean_recall": means, "recalls": scores}
        store.write_text(os.path.join(job.folder, "averages.json"), json.dumps(document, indent=1))
    return found.get(used, {})


def _put(clip: CLIP, weights: Mapping[str, Tensor]) -> None:
    """Give every rank's model the weights that rank 0 has; a collective."""
    with torch.no_grad():
        for name, tensor in clip.state_dict().items():
            sent = tensor.clone()
            if name in weights:
                sent.copy_(weights[name])
            dist.broadcast(sent, 0)
            tensor.copy_(sent)


def _score(towers: Towers, validate: Validate | None) -> Recalls:
    if validate is None:
        return {}
    towers.clip.eval()
    with towers.autocast():
        shared = [validate(towers.clip)]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def _mean(recalls: Recalls, deciding: Collection[str]) -> float | None:
    """Return the mean over the evaluation sets that decide, over all of them if none is named."""
    found = [
        float(recall["mean_recall"]) for name, recall in recalls.items() if not deciding or name in deciding
    ]
    return sum(found) / len(found) if found else None


def _filled(like: CLIP, weights: Mapping[str, Tensor]) -> CLIP:
    model = CLIP(like.config)
    if like.logit_bias is not None:
        model.add_logit_bias()
    model.load_state_dict(weights)
    return model


@contextlib.contextmanager
def _disk_may_be_full(path: str, folder: str) -> Iterator[None]:
    """Explain a model that cannot be written; a rerun resumes from the newest checkpoint.

    Raises:
        InputError: if it cannot.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free
        raise InputError(
            f"{path}: cannot write the model: {error}; {folder} has {free / 1e9:.2f} GB free; make room and"
            " rerun the same command to resume"
        ) from None
