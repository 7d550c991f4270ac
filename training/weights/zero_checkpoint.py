"""DeepSpeed's training checkpoints: the float32 weights put together from the parts of all ranks.

Layout of DeepSpeed 0.9 and later: a folder with `latest` and one folder a tag, which holds
`*_model_states.pt` (shapes, buffers, frozen parameters) and, a rank each, `*_optim_states.pt` (its part of
the float32 masters). DeepSpeed's own `zero_to_fp32` unpickles without restriction; this does not.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.core import store
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError
from training.weights.pickle_machine import Foreign
from training.weights.tensor_files import check_size, read_pickle, strip_prefixes

_MODEL_STATES, _OPTIMIZER_STATES = "_model_states.pt", "_optim_states.pt"


def find_zero_checkpoint(folder: str) -> str | None:
    """Return the folder of the newest tag, below or the folder itself; None without such a checkpoint."""
    if any(name.endswith(_MODEL_STATES) for name in store.list_files(folder)):
        return folder
    latest = store.join(folder, "latest")
    if not store.exists(latest):
        return None
    with foreign(latest, "name of a tag's folder", "copy the whole folder again"):
        tag = store.read_text(latest).strip()
    if not tag or tag != os.path.basename(tag) or "\0" in tag:
        raise InputError(f"{latest}: names the tag {tag[:80]!r}, which is not a folder name")
    chosen = store.join(folder, tag)
    if not any(name.endswith(_MODEL_STATES) for name in store.list_files(chosen)):
        raise InputError(
            f"{latest}: names {tag}, but {chosen} holds no *{_MODEL_STATES}: copy the whole folder"
        )
    return chosen


def read_zero_checkpoint(folder: str) -> dict[str, torch.Tensor]:
    """Return a tag's weights by name, from float32 masters if they exist, at ZeRO stage 0, 1, 2 or 3.

    Raises:
        InputError: if a rank's file is missing or damaged, or the parts do not add up.
    """
    names = store.list_files(folder)
    models = [_read(folder, name) for name in _by_rank(names, _MODEL_STATES)]
    with foreign(folder, "DeepSpeed checkpoint", "copy every rank's files again"):
        optimizers = [
            _read(folder, name)["optimizer_state_dict"] for name in _by_rank(names, _OPTIMIZER_STATES)
        ]
        num_bytes = sum(store.num_bytes(store.join(folder, name)) for name in names)
        if optimizers:
            check_size(folder, _parts(optimizers, models), num_bytes)  # before they are put together
            weights = _assemble(folder, models, optimizers)
        else:  # stage 0 keeps whole weights
            if models[0].get("param_shapes"):
                raise InputError(
                    f"{folder}: no *{_OPTIMIZER_STATES} next to the shapes: copy every rank's files"
                )
            weights = models[0].get("module") or {}
        tensors = {
            name: value.detach()
            for name, value in weights.items()
            if isinstance(value, torch.Tensor) and isinstance(name, str)
        }
    if not tensors:
        raise InputError(
            f"{folder}: its *{_MODEL_STATES} hold no tensors by name: copy the whole folder, or give another"
            " checkpoint"
        )
    check_size(folder, tensors, num_bytes)
    return strip_prefixes(tensors)


def _by_rank(names: Sequence[str], suffix: str) -> list[str]:
    """Return file names in the order of ranks: by the numbers in them."""
    return sorted(
        (name for name in names if name.endswith(suffix)),
        key=lambda name: [int(number) for number in re.findall(r"\d+", name)],
    )


def _read(folder: str, name: str) -> dict[str, Any]:
    payload = read_pickle(store.join(folder, name))
    if not isinstance(payload, dict):
        raise InputError(
            f"{store.join(folder, name)}: holds a {type(payload).__name__}: not DeepSpeed's file"
        )
    return payload


def _assemble(
    folder: str, models: Sequence[Mapping[str, Any]], optimizers: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    stage, world = optimizers[0]["zero_stage"], optimizers[0]["partition_count"]
    stage = stage.arguments[0] if isinstance(stage, Foreign) else stage
    world = max(world) if isinstance(world, list) else world
    if world != len(optimizers):
        raise InputError(
            f"{folder}: written by {world} ranks, but {len(optimizers)} *{_OPTIMIZER_STATES} are there:"
            " copy every rank's files"
        )
    shapes = models[0]["param_shapes"]
    if stage < 3:
        # Buffers and frozen parameters are whole here (zero_to_fp32 loses the latter at stage 1); what was
        # trained stands here in the precision of the forward pass and is replaced by its master.
        weights = dict(models[0]["module"])
        paddings = optimizers[0].get("param_alignment_paddings")
        for index, group in enumerate(shapes):
            parts = [optimizer["single_partition_of_fp32_groups"][index] for optimizer in optimizers]
            weights |= _cut(torch.cat(parts), group, paddings[index] if paddings else None)
        return weights
    if len(models) != world:
        raise InputError(
            f"{folder}: written by {world} ranks, but {len(models)} *{_MODEL_STATES} are there: copy them all"
        )
    weights = {name: models[0]["module"][name] for name in models[0]["buffer_names"]}
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        fragments = [model["frozen_param_fragments"][name] for model in models]
        weights[name] = torch.cat(fragments)[: math.prod(shape)].view(shape)
    flat_of_ranks = [
        torch.cat([part.view(-1) for part in optimizer["fp32_flat_groups"]]) for optimizer in optimizers
    ]
    offset = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        share = math.ceil(
            math.prod(shape) / world
        )  # each rank holds as much of every parameter; the last is padded
        whole = torch.cat([flat[offset : offset + share] for flat in flat_of_ranks])
        weights[name] = whole[: math.prod(shape)].view(shape)
        offset += share
    return weights


def _parts(
    optimizers: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """Return every rank's parts, by any names."""
    lists = [
        optimizer[key]
        for optimizer in optimizers
        for key in ("single_partition_of_fp32_groups", "fp32_flat_groups")
        if key in optimizer
    ]
    lists += [list((model.get("frozen_param_fragments") or {}).values()) for model in models]
    return {
        f"{number}.{place}": part for number, parts in enumerate(lists) for place, part in enumerate(parts)
    }


def _cut(
    flat: torch.Tensor, shapes: Mapping[str, torch.Size], paddings: Sequence[int] | None
) -> dict[str, torch.Tensor]:
    """Split one flat group into its parameters, which lie in it in order, each followed by its padding."""
    weights, offset = {}, 0
    for index, (name, shape) in enumerate(shapes.items()):
        numel = math.prod(shape)
        weights[name] = flat[offset : offset + numel].view(shape)
        offset += numel + (paddings[index] if paddings else 0)
    return weights
