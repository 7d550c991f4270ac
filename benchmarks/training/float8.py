"""Compare training with matrix products in float8 with training in bfloat16: loss curves, and speed on a GPU.

    python benchmarks/training/float8.py                   # tiny-vit on the CPU
    python benchmarks/training/float8.py --plot out.svg    # draws both curves, too
    python benchmarks/training/float8.py --device cuda     # ViT-B/16 and ViT-L/14, samples a second too

Both sides train in the engine (`zero1_bf16`) from the same weights on the same noise and random captions,
four batches again and again, until they know them by heart. A CPU computes the numbers of float8 without
its hardware, so that its curves count and its times do not. `equal` says that the means of ten losses are
nowhere further apart than BAND, which allows curves that fall at other steps, and not one that stays up.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import os

sys.path += filter(None, [os.environ.get("FLOAT8_SITE")])  # torchao, apart from other packages

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.harness import line, parse, parser, record, report, significant
from benchmarks.training.step_models import (
    MEAN_TOKENS,
    be_the_only_rank,
    config_of,
    make_batch,
    take_step,
    without_dropout,
)
from benchmarks.training.whole_steps import share
from training.data.loader import Batch
from training.engine.engine import Towers, build_engine, join_ranks
from training.flops import PEAK_FLOPS, find_device, training_flops
from training.model.config import MODELS

# model: (samples of a batch, steps, learning rate)
ON_CPU = {"tiny-vit": (32, 100, 1e-3)}
ON_GPU = {"ViT-B-16": (256, 80, 1e-4), "ViT-L-14": (128, 60, 5e-5)}
NUM_BATCHES, WARM_UP, MEAN_OF = 4, 10, 10
BAND = 0.3  # nats, of a loss that begins at the logarithm of the batch


@dataclass(frozen=True, slots=True)
class Curve:
    """One training."""

    losses: list[float]  # by step
    step_seconds: float

    def means(self) -> list[float]:
        """Return the mean of each ten losses."""
        return [
            statistics.fmean(self.losses[first : first + MEAN_OF])
            for first in range(0, len(self.losses), MEAN_OF)
        ]


def main() -> int:
    made = parser(__doc__, full="ten times the steps", device=True)
    made.add_argument("--plot", type=Path, help="an SVG file for the curves")
    options = parse(made)
    be_the_only_rank()
    join_ranks(config_of("stage2", 8))
    results = []
    for model, (batch_size, steps, rate) in (ON_CPU if options.device == "cpu" else ON_GPU).items():
        steps *= 10 if options.full else 1
        both = {fp8: trained(model, batch_size, steps, rate, fp8=fp8) for fp8 in (False, True)}
        results += compared(model, batch_size, both, options.device)
    for result in results:
        print(line(result))
    if options.plot:
        plot(results, options.plot)
    return report(results)


def trained(model: str, batch_size: int, steps: int, rate: float, *, fp8: bool) -> Curve:
    """Train on NUM_BATCHES batches in turn, with a linear warm-up."""
    config = replace(config_of("stage2", batch_size), deepspeed="zero1_bf16", fp8=fp8)
    towers = Towers(without_dropout(model, "stage2"), num_samples_of_ranks=(batch_size,), config=config)
    engine = build_engine(towers, config)
    engine.train()
    batches = list(made_batches(model, batch_size, next(towers.parameters()).device))
    losses, times = [], []
    for step in range(steps):
        start = time.perf_counter()
        warm = min(1.0, (step + 1) / WARM_UP)
        losses.append(take_step(engine, batches[step % NUM_BATCHES], rate * warm, config))  # waits
        times.append(time.perf_counter() - start)
    engine.destroy()
    torch._dynamo.reset()
    return Curve(losses, statistics.median(times[WARM_UP:]))


def made_batches(model: str, batch_size: int, device: torch.device) -> Iterator[Batch]:
    image_BCHW, tokens_BL = make_batch(model, NUM_BATCHES * batch_size)
    for number, (image, tokens) in enumerate(
        zip(image_BCHW.split(batch_size), tokens_BL.split(batch_size), strict=True)
    ):
        ids_B = torch.arange(batch_size)
        keys = np.array([b"%032x" % (number * batch_size + row) for row in range(batch_size)])
        yield Batch(
            step=number,
            keys=keys,
            image=image.to(device),
            tokens_BL=tokens,
            image_id_B=ids_B,
            caption_id_B=ids_B,
        )


def compared(model: str, batch_size: int, both: dict[bool, Curve], device: str) -> Iterator[dict[str, Any]]:
    """Yield the record of the curves' ends, and on a GPU that of the speed."""
    ours, peer = both[True], both[False]
    apart = max(abs(a - b) for a, b in zip(ours.means(), peer.means(), strict=True))
    common: dict[str, Any] = {
        "equal": apart < BAND,
        "device": device,
        "peer_is": "ours in bfloat16",
        "batch": batch_size,
    }
    yield record(
        f"float8/loss@{model}",
        ours=ours.means()[-1],
        peer=peer.means()[-1],
        unit="nats",
        steps=len(ours.losses),
        apart=significant(apart),
        losses={"fp8": rounded(ours.means()), "bf16": rounded(peer.means())},
        **common,
    )
    if device != "cpu":
        known = find_device(torch.cuda.get_device_name(device))
        flops = training_flops(MODELS[model], config_of("stage2", batch_size), MEAN_TOKENS)
        peak = None if known is None else PEAK_FLOPS[known]
        yield record(
            f"float8/step@{model}",
            ours=batch_size / ours.step_seconds,
            peer=batch_size / peer.step_seconds,
            unit="samples/s",
            # Both of the peak in bfloat16.
            utilisation=share(flops * batch_size / ours.step_seconds, peak),
            peer_utilisation=share(flops * batch_size / peer.step_seconds, peak),
            **common,
        )


def rounded(values: Sequence[float]) -> list[float]:
    return [significant(value) for value in values]


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each model's two curves into an SVG file."""
    import matplotlib.figure

    drawn = [result for result in results if "losses" in result]
    figure = matplotlib.figure.Figure(figsize=(5 * len(drawn), 3.5), layout="constrained")
    for place, result in enumerate(drawn, 1):
        axes = figure.add_subplot(1, len(drawn), place)
        for name, losses in result["losses"].items():
            axes.plot([MEAN_OF * (number + 0.5) for number in range(len(losses))], losses, label=name)
        axes.set(
            title=result["name"].partition("@")[2], xlabel="step", ylabel=f"loss, mean of {MEAN_OF} steps"
        )
        axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
