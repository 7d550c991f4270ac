"""The end of a step: the gradient's norm, clipping, and leaving the step out, without the host knowing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from training.engine.towers import Engine
from training.engine.zero_state import adam_of

_TINY = 1e-6  # DeepSpeed adds as much to a norm before it divides


def step_if_finite(engine: Engine, loss: Tensor, max_norm: float | None) -> Tensor:
    """Take the optimizer's step, unless the loss or the gradient is not finite; return whether it was not.

    The answer is a boolean scalar on the device, equal on all ranks. Weights and Adam's state are as before
    if it is true: the optimizer reads it there. A gradient longer than `max_norm` is clipped.
    """
    is_bad_loss = ~loss.isfinite()
    if not engine.module.judges_gradients:  # DeepSpeed looks at the gradient, and waits for what it finds
        engine.step()
        # In float16 an overflow is how DeepSpeed finds the loss scale: it leaves the step out and continues.
        return is_bad_loss | bool(engine.optimizer.overflow and not engine.fp16_enabled())
    norm = gradient_norm(gradients_by_group(engine), are_shared=engine.zero_optimization())
    is_bad = is_bad_loss | ~norm.isfinite()
    adam: Any = adam_of(engine)
    adam.found_inf = is_bad.float()
    # DeepSpeed gives Adam one flat float32 part at a time, which it makes in its step.
    clipping = None if max_norm is None else adam.register_step_pre_hook(_clipping(norm, max_norm))
    engine.step()
    if clipping is not None:
        clipping.remove()
    return is_bad


def gradients_by_group(engine: Engine) -> list[list[Tensor]]:
    """Return what the optimizer's step will use, by parameter group, after the ranks' gradients are averaged.

    At ZeRO 1 and 2 it is this rank's part of them.
    """
    if engine.zero_optimization():
        parts: dict[int, list[Tensor]] = engine.optimizer.averaged_gradients
        return [parts[number] for number in sorted(parts)]
    groups = adam_of(engine).param_groups
    return [[each.grad for each in group["params"] if each.grad is not None] for group in groups]


def gradient_norm(groups: Sequence[Sequence[Tensor]], *, are_shared: bool) -> Tensor:
    """Return the length of the whole gradient, a float32 scalar on the device.

    `are_shared`: every rank has a part of it, and the ranks add up what they have.
    """
    squares = []
    for gradients in groups:
        # In float64 on a CPU, as DeepSpeed does it everywhere; a GPU has fewer units for that.
        dtype = torch.float64 if gradients[0].device.type == "cpu" else torch.float32
        norms = torch._foreach_norm(list(gradients), 2.0, dtype=dtype)
        squares.append(torch.stack(norms).square().sum().float())
    square = torch.stack(squares)
    if are_shared and dist.get_world_size() > 1:
        dist.all_reduce(square)
    norm: Tensor = torch.linalg.vector_norm(square.sqrt())
    return norm


def _clipping(norm: Tensor, max_norm: float) -> Any:
    factor = 1.0 / ((norm + _TINY) / max_norm).clamp(min=1.0)

    def clip(adam: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [each.grad for group in adam.param_groups for each in group["params"]]
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], factor)

    return clip
