"""The optimizer's parameter groups and the learning rate of every step (paper, Table 8)."""

import math
from typing import Any

import torch
from torch import nn

from training.config.train import TrainConfig
from training.engine.muon import MuonAdamW

# Modules whose parameters are gains and shifts, not maps between spaces: they are not decayed.
_NORMALISATIONS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,  # every batch norm's base class; torch has no public name for it
)


# Compiled kernels read 16 bytes at once, and torch compiles one for all layers of a kind. DeepSpeed lays the
# parameters of a group end to end, so that one of an odd size would move all that follow it.
_ALIGNED_VALUES = 8  # of bfloat16


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
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
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build torch's own AdamW, so that DeepSpeed compiles none, or Muon around it."""
    groups = parameter_groups(model, config.weight_decay)
    settings: dict[str, Any] = {
        "lr": 0.0,  # `learning_rate` sets it before every step
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "fused": True,
    }
    if config.optimizer == "muon":
        return MuonAdamW(_with_matrices_apart(groups, _matrices(model)), **settings)
    return torch.optim.AdamW(groups, **settings)


def _matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights that Muon trains: maps from features to features.

    Convolutions, embeddings, the patches' among them, and position embeddings are AdamW's.
    """
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names.add("text_projection")
    return {parameter for name, parameter in model.named_parameters() if name in names}


def _with_matrices_apart(groups: list[dict[str, Any]], matrices: set[nn.Parameter]) -> list[dict[str, Any]]:
    apart = []
    for group in groups:
        for is_muon in (True, False):
            chosen = [parameter for parameter in group["params"] if (parameter in matrices) == is_muon]
            if chosen:
                apart.append({**group, "params": chosen, "is_muon": is_muon})
    return apart


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate after `step` finished steps: linear warm-up, then a cosine to 0 (Table 8).

    As the released code counts: the first step already has 1 / warmup_steps of the peak.
    """
    if step < config.warmup_steps:
        return config.peak_learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.peak_learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
