"""Whole parameters and Adam moments of a DeepSpeed engine, wherever its ZeRO stage keeps their parts.

Stage 0 has them on every rank. Stages 1 and 2 have a float32 master and the moments as parts of one flat
vector a parameter group; stage 3 has part of every parameter too. All functions but `adam_of` are
collectives: every rank calls them, for the same parameters in the same order.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch import distributed as dist

from training.engine.muon import MuonAdamW, Places
from training.engine.towers import Engine

# What DeepSpeed's DynamicLossScaler changes as it goes
_LOSS_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's names for them
MUON_MOMENTS = ("exp_avg",)


def adam_of(engine: Engine) -> torch.optim.AdamW:
    """Return the AdamW inside: of the model's parameters at ZeRO stage 0, else of flat parts of them."""
    optimizer = engine.optimizer
    adam: torch.optim.AdamW = optimizer.optimizer if engine.zero_optimization() else optimizer
    return adam


def make_adam_state(engine: Engine) -> None:
    """Make the state that Adam would make at its first step.

    DeepSpeed links parameters to their part of it after the first *group's* first step, when the second group
    has none yet, and never again: with two groups, a checkpoint would find half of the moments.
    """
    adam = adam_of(engine)
    # Stage 3's groups are empty between steps: it lends Adam one flat part at a time.
    flat_parts = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    groups = [{"params": flat_parts}] if flat_parts else adam.param_groups
    for group in groups:
        for parameter in group["params"]:
            moments = MUON_MOMENTS if group.get("is_muon") else MOMENTS
            adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in moments},
            }
    if isinstance(adam, MuonAdamW) and engine.zero_optimization():
        for group, places in zip(adam.param_groups, _places(engine), strict=True):
            group["places"] = places
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _places(engine: Engine) -> list[Places]:
    """Return where each parameter starts in its group's flat vector, and its shape, at ZeRO 1 and 2."""
    optimizer = engine.optimizer
    # The first is that of the optimizer which DeepSpeed has for bfloat16 weights at ZeRO 1.
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    starts = getattr(optimizer, "round_robin_bit16_offsets", None)  # it knows `parameter_alignment`
    if starts is None:  # end to end
        sizes = [[whole.numel() for whole in group] for group in groups]
        starts = [list(accumulate(each, initial=0))[:-1] for each in sizes]
    return [
        tuple((start, whole.shape) for start, whole in zip(of_group, group, strict=True))
        for of_group, group in zip(starts, groups, strict=True)
    ]


def moments_of(engine: Engine, parameter: nn.Parameter) -> tuple[str, ...]:
    """Return which of the MOMENTS the optimizer has of a trained parameter."""
    adam = adam_of(engine)
    is_muons = isinstance(adam, MuonAdamW) and parameter in adam.matrices
    return MUON_MOMENTS if is_muons else MOMENTS


def whole_weight(parameter: nn.Parameter) -> Tensor:
    """Return a trained parameter in float32, from its master; any other as the module has it."""
    if _is_partitioned(parameter) and not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    master = safe_get_full_fp32_param(parameter)
    return parameter.detach() if master is None else master


def set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the module's parameter and the float32 master behind it; `value` is whole, equal on all ranks."""
    value = value.to(parameter.device)
    if _is_partitioned(parameter):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, _own_part(parameter, value))
        return
    if hasattr(parameter, "_hp_mapping"):
        safe_set_full_fp32_param(parameter, value)
    parameter.data.copy_(value)


@torch.no_grad()
def clamp_weight(parameter: nn.Parameter, low: float, high: float, *, unless: Tensor) -> None:
    """Keep a trained parameter and the float32 master behind it within limits; no collective.

    Clamping only the module would be undone by the next step, which writes the master over it. If `unless`,
    a scalar on the device, is true, nothing changes.
    """

    def clamped(part: Tensor) -> Tensor:
        return torch.where(unless.to(part.device), part, part.clamp(low, high))

    held: Any = parameter
    if _is_partitioned(parameter):
        safe_set_local_fp32_param(parameter, clamped(safe_get_local_fp32_param(parameter)))
        parts = [held.ds_tensor.data]
    else:
        parts = [own_master(parameter)]
    for part in (*parts, parameter.data):
        part.copy_(clamped(part))


def own_master(parameter: nn.Parameter) -> Tensor:
    """Return this rank's values of a trained parameter's float32 master; none if other ranks have them."""
    if _is_partitioned(parameter):
        values: Tensor = safe_get_local_fp32_param(parameter)
        before: int = dist.get_rank() * parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        whole: int = parameter.ds_numel  # type: ignore[attr-defined]
        return values.detach().flatten()[: max(0, whole - before)]
    if hasattr(parameter, "_hp_mapping"):
        mapping: Any = parameter._hp_mapping
        fragment: Tensor = parameter.new_empty(0) if mapping is None else mapping.get_hp_fragment()
        return fragment.detach()
    return parameter.detach().flatten()


def whole_moment(engine: Engine, parameter: nn.Parameter, moment: str) -> Tensor:
    """Return one of Adam's MOMENTS of a trained parameter, in float32."""
    found = safe_get_full_optimizer_state(parameter, moment)
    value: Tensor = adam_of(engine).state[parameter][moment] if found is None else found
    return value


def set_moment(engine: Engine, parameter: nn.Parameter, value: Tensor, moment: str) -> None:
    """Set one of Adam's MOMENTS of a trained parameter; `value` is whole, the same on all ranks."""
    value = value.to(parameter.device)
    if _is_partitioned(parameter):
        safe_set_local_optimizer_state(parameter, _own_part(parameter, value), moment)
    elif hasattr(parameter, "_hp_mapping"):
        safe_set_full_optimizer_state(parameter, value, moment)
    else:
        adam_of(engine).state[parameter][moment].copy_(value)


def loss_scaling(engine: Engine) -> dict[str, float]:
    """Return the state of float16's dynamic loss scaling, equal on all ranks; empty for other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: float(getattr(scaler, name)) for name in _LOSS_SCALING}


def set_loss_scaling(engine: Engine, values: Mapping[str, float]) -> None:
    """Continue from what `loss_scaling` gave; a run that now has another precision takes none of it."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name in loss_scaling(engine):
        if name in values:
            setattr(scaler, name, type(getattr(scaler, name))(values[name]))


@contextmanager
def gathered(*parameters: nn.Parameter) -> Iterator[None]:
    """Gather whole parameters inside, for reading, if modules that own them are not called as modules."""
    partitioned = [parameter for parameter in parameters if _is_partitioned(parameter)]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        yield


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's part of a whole value; the last ranks' parts of a small parameter are padding."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * dist.get_world_size(), dtype=torch.float32, device=value.device)
    padded[: value.numel()] = value.flatten()
    return padded.narrow(0, size * dist.get_rank(), size)
