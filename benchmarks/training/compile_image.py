"""Measure the locked image tower compiled by torch (`compile = true`) against the same tower uncompiled.

    python benchmarks/training/compile_image.py                 # ViT-B/16 at batch 8, one thread; 3 minutes
    python benchmarks/training/compile_image.py --full          # RN50 too, and more rounds
    python benchmarks/training/compile_image.py --device cuda   # bf16 autocast at batch 256; B/16, L/14, H/14

Times are medians of alternating rounds, in CPU seconds, or by the clock on a GPU. `equal` says that the
unit-norm features differ by no more than 1e-5 in float32, 2e-2 in bfloat16. `compile_seconds` are those of
the first call, by the clock.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dataclasses
import functools
import time
from typing import Any

import torch

from benchmarks.harness import in_turns, medians, parse, parser, record, report, seconds, unit_of_seconds
from training.config.train import TrainConfig
from training.engine.towers import Towers
from training.model.clip import build_clip
from training.model.config import MODELS

TOLERANCE = {"cpu": 1e-5, "cuda": 2e-2}
BATCH = {"cpu": 8, "cuda": 256}


def main() -> int:
    options = parse(parser(__doc__, full="RN50 too, and more rounds", rounds=(7, 15), device=True))
    models = ["ViT-B-16", "RN50"] if options.full else ["ViT-B-16"]
    if options.device == "cuda":
        models = ["ViT-B-16", "ViT-L-14", "ViT-H-14"]
    torch.set_num_threads(1)
    results = [compare(model, options.device, rounds=options.rounds) for model in models]
    for result in results:
        print(
            f"{result['name']}: {result['ours']} images/s compiled, {result['peer']} as it is, ratio"
            f" {result['ratio']}, {result['compile_seconds']} s to compile, equal {result['equal']}"
        )
    return report(results)


def compare(model: str, device: str, *, rounds: int) -> dict[str, Any]:
    """Compare one model's towers with the same weights, in turn on the same uint8 images."""
    torch.manual_seed(0)
    clip = build_clip(MODELS[model])
    clip.lock_image_tower()
    batch = BATCH[device]
    config = TrainConfig(epochs=1, global_batch=batch, lanes=1, lock_image=True)
    towers = {
        "peer": Towers(clip, num_samples_of_ranks=(batch,), config=config).to(device),
        "ours": Towers(
            clip, num_samples_of_ranks=(batch,), config=dataclasses.replace(config, compile=True)
        ).to(device),
    }
    size_px = clip.config.vision.image_size_px
    image_BCHW = torch.randint(0, 256, (batch, 3, size_px, size_px), dtype=torch.uint8, device=device)
    features: dict[str, torch.Tensor] = {}
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        features["peer"] = towers["peer"].encode_image(image_BCHW)
        start = time.perf_counter()
        features["ours"] = towers["ours"].encode_image(image_BCHW)
        compile_seconds = time.perf_counter() - start
        sides = {side: functools.partial(tower.encode_image, image_BCHW) for side, tower in towers.items()}
        taken = medians(in_turns(sides, rounds, lambda: seconds(device)))
    difference = (features["ours"] - features["peer"]).abs().max().item()
    return record(
        f"compile_image/{model}",
        ours=batch / taken["ours"],
        peer=batch / taken["peer"],
        unit=f"images/{unit_of_seconds(device)}",
        equal=difference <= TOLERANCE[device],
        device=device,
        compile_seconds=round(compile_seconds, 1),
        largest_difference=difference,
    )


if __name__ == "__main__":
    sys.exit(main())
