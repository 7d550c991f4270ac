"""Measure an optimizer's step by itself: torch's AdamW, and Muon for the matrices, on one device."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dataclasses

import torch

from benchmarks.gpu.common import DEVICE, IS_CUDA, median_seconds, peak_gib, result
from benchmarks.training.step_models import config_of
from training.config.train import TrainConfig
from training.engine.muon import orthogonal
from training.engine.optim import build_optimizer
from training.flops import muon_step
from training.model.clip import build_clip
from training.model.config import MODELS

PLAN = ("ViT-B-16", "ViT-L-14") if IS_CUDA else ("tiny-vit",)
BATCH = 512  # of `config_of`; a step of an optimizer does not depend on it
SHAPE = (768, 3072)


def main() -> int:
    for model in PLAN:
        config = config_of("stage2", BATCH)
        muon = dataclasses.replace(config, optimizer="muon")
        adamw_ms, adamw_gib = step_of(model, config)
        muon_ms, muon_gib = step_of(model, muon)
        result(
            f"optimizer/{model}",
            adamw_ms=adamw_ms,
            muon_ms=muon_ms,
            muon_tflops=muon_step(MODELS[model], locks_image=False) / muon_ms / 1e9,
            adamw_peak_gib=adamw_gib,
            muon_peak_gib=muon_gib,
        )
    difference = difference_from_the_cpu()
    result("optimizer/muon_against_cpu", shape=SHAPE, relative_difference=difference)
    return int(difference > 0.05)


def step_of(model: str, config: TrainConfig) -> tuple[float, float]:
    """Return a step's milliseconds, and the most memory with weights, gradients and states."""
    torch.manual_seed(0)
    peak_gib(reset=True)
    clip = build_clip(MODELS[model]).to(DEVICE)
    for parameter in clip.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = build_optimizer(clip, config)
    return 1000 * median_seconds(optimizer.step), peak_gib()


def difference_from_the_cpu() -> float:
    """Return the relative difference of a step in the device's format from that in float32 on the CPU."""
    mean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    (expected,) = orthogonal([mean])
    (found,) = orthogonal([mean.to(DEVICE)])
    return float((found.cpu() - expected).norm() / expected.norm())


if __name__ == "__main__":
    sys.exit(main())
