"""AdamW's parameter groups and the learning rate of every step (paper, Table 8)."""

import math

import torch
from torch import nn

from training.config.train import TrainConfig

# Modules whose parameters are gains and shifts, not maps between spaces: they are not decayed.
_NORMALISATIONS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,  # every batch norm's base class; torch has no public name for it
)


# Compiled kernels read 16 bytes at once, and torch compiles one for all layers of a kind. DeepSpeed lays the
# parameters of a group end to end, so that one of an odd size would move all that follow it.
_ALIGNED_VALUES = 8  # of bfloat16


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return trainable parameters as two groups, decayed and not, each in the model's order.

    Those whose size is no multiple of 16 bytes (the temperature) come last.

    Weight matrices, convolutions and embeddings decay. Biases, normalisations and all that has fewer than two
    dimensions (class token, temperature) do not. What a parameter is, its module's type says: CN-CLIP asks
    whether the name contains "bn" or "ln", and so decays BERT's `LayerNorm` weights by mistake.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_gain_or_shift = isinstance(module, _NORMALISATIONS) or name.endswith("bias")
            (kept if is_gain_or_shift or parameter.squeeze().ndim < 2 else decayed).append(parameter)
    for group in (decayed, kept):
        group.sort(key=lambda parameter: parameter.numel() % _ALIGNED_VALUES != 0)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build torch's own AdamW, so that DeepSpeed compiles none."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=0.0,  # `learning_rate` sets it before every step
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate after `step` finished steps: linear warm-up, then a cosine to 0 (Table 8).

    As the released code counts: the first step already has 1 / warmup_steps of the peak.
    """
    if step < config.warmup_steps:
        return config.peak_learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.peak_learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
