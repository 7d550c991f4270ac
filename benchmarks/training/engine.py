"""Measure what DeepSpeed costs on one rank: a training step in it against PyTorch's DistributedDataParallel.

    python benchmarks/training/engine.py           # tiny-rn of the demo, batch 64, one thread
    python benchmarks/training/engine.py --full    # ViT-B/16 with RoBERTa-base too, batch 4, and more rounds
    python benchmarks/training/engine.py --device cuda

Both sides take the same batches through the same towers, loss, learning rates and AdamW; what differs is who
wraps the module and steps the optimizer. `equal` says that losses of all steps agree to 1e-4. Times are CPU
seconds of one thread and process; on a GPU, seconds by the clock. `ratio` is DDP's time by DeepSpeed's: below
1 is DeepSpeed's overhead.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import medians, parse, parser, record, report, seconds, unit_of_seconds
from benchmarks.training.step_models import be_the_only_rank, take_step
from training.config.train import TrainConfig
from training.data.loader import Batch
from training.engine.engine import Towers, build_engine, join_ranks
from training.engine.optim import build_optimizer, learning_rate
from training.model.clip import CLIP, build_clip
from training.model.config import TINY_RN, VIT_B_16, ModelConfig

ENGINES = ("zero0", "zero1")
TOLERANCE = 1e-4


def main() -> int:
    options = parse(parser(__doc__, full="ViT-B/16 too, and more rounds", rounds=(12, 24), device=True))
    torch.set_num_threads(1)
    be_the_only_rank()
    os.environ["DS_ACCELERATOR"] = options.device
    results = compare(TINY_RN, options.device, batch_size=64, steps=options.rounds)
    if options.full:
        results += compare(VIT_B_16, options.device, batch_size=4, steps=4)
    for result in results:
        print(
            f"{result['name']:<24} DeepSpeed {result['ours']:.4f} DDP {result['peer']:.4f} {result['unit']},"
            f" overhead {100 * (1 / result['ratio'] - 1):+.1f}%, equal {result['equal']}"
        )
    return report(results)


def compare(model: ModelConfig, device: str, *, batch_size: int, steps: int) -> list[dict[str, Any]]:
    """Compare DeepSpeed at each of the stages against DDP, steps in turn so that noise hits all alike."""
    config = TrainConfig(
        epochs=1, global_batch=batch_size, lanes=1, peak_learning_rate=1e-4, warmup_steps=2, weight_decay=0.1
    )
    sides: dict[str, Callable[[Batch, float], float]] = {}
    if not dist.is_initialized():
        join_ranks(config)
    sides["ddp"] = with_ddp(towers_of(model, config).to(device), config)
    for name in ENGINES:
        own = TrainConfig(**{**as_arguments(config), "deepspeed": name})
        sides[name] = with_deepspeed(towers_of(model, own), own)
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(steps):
        batch = make_batch(model, batch_size, step)
        rate = learning_rate(step, steps, config)
        for name, run in sides.items():
            start = seconds(device)
            losses[name].append(run(batch, rate))
            if step >= 2:  # the first steps allocate
                times[name].append(seconds(device) - start)
    taken = medians(times)
    return [
        record(
            f"engine/{model.name}@{name}",
            ours=taken[name],
            peer=taken["ddp"],
            unit=f"{unit_of_seconds(device)} a step",
            equal=bool(np.allclose(losses[name], losses["ddp"], atol=TOLERANCE)),
            device=device,
        )
        for name in ENGINES
    ]


def as_arguments(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def towers_of(model: ModelConfig, config: TrainConfig) -> Towers:
    torch.manual_seed(0)
    clip: CLIP = build_clip(model)
    for module in clip.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return Towers(clip.train(), num_samples_of_ranks=(config.global_batch,), config=config)


def make_batch(model: ModelConfig, batch_size: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    side = model.vision.image_size_px
    image = torch.randint(0, 256, (batch_size, side, side, 3), generator=generator, dtype=torch.uint8)
    ids = torch.arange(batch_size)
    return Batch(
        step=step,
        keys=np.array([f"{row:032x}".encode() for row in range(batch_size)]),
        image=image.permute(0, 3, 1, 2),
        tokens_BL=torch.randint(5, model.text.vocab_size, (batch_size, 20), generator=generator),
        image_id_B=ids,
        caption_id_B=ids,
    )


def with_deepspeed(towers: Towers, config: TrainConfig) -> Callable[[Batch, float], float]:
    engine = build_engine(towers, config)
    engine.train()
    return lambda batch, rate: take_step(engine, batch, rate, config)


def with_ddp(towers: Towers, config: TrainConfig) -> Callable[[Batch, float], float]:
    """Return the same step in plain PyTorch."""
    module, device = DistributedDataParallel(towers), towers.clip.logit_scale.device
    adam = build_optimizer(towers.clip, config)
    bounds = (0, math.log(config.max_temperature))

    def step(batch: Batch, rate: float) -> float:
        for group in adam.param_groups:
            group["lr"] = rate
        loss = towers.loss(module(batch.image.to(device), batch.tokens_BL), batch)
        value = loss.item()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            towers.clip.logit_scale.clamp_(*bounds)
        return value

    return step


if __name__ == "__main__":
    sys.exit(main())
