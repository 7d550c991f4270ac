"""Measure the sigmoid loss against open_clip's, and several positives against the plain formula.

    python benchmarks/training/pair_losses.py          # N = 4,096 for time, 16,384 for memory (peers: 5 GB)
    python benchmarks/training/pair_losses.py --full   # more rounds

All samples are on one rank here. No peer has several positives in its loss: theirs is the formula with its
N × N matrices, in PyTorch's own operations. A part of the captions and of the images comes twice.
Times are CPU seconds of one thread; on a GPU they are seconds by the clock.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import math
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import (
    in_turns,
    line,
    medians,
    parse,
    parser,
    record,
    report,
    seconds,
    unit_of_seconds,
)
from benchmarks.training.loss import are_equal, extra_memory_mb, features
from training.losses.contrastive import contrastive_loss
from training.losses.sigmoid import sigmoid_loss

TIME_SAMPLES, MEMORY_SAMPLES = 4_096, 16_384
SCALE, BIAS = math.log(10.0), -10.0  # where SigLIP starts


def main() -> int:
    options_of = parser(__doc__, rounds=(3, 9), device=True)
    options_of.add_argument("--extra-memory", choices=LOSSES, help=argparse.SUPPRESS)
    options = parse(options_of)
    if options.extra_memory:
        print(extra_memory_mb(*runs(options.extra_memory, options.device, MEMORY_SAMPLES), options.device))
        return 0
    torch.set_num_threads(1)
    pairs = {"sigmoid": ("ours", "open_clip"), "positives": ("several", "formula")}
    results = [
        compare(f"pair_losses/{name}", sides, options.rounds, options.device) for name, sides in pairs.items()
    ]
    results += [
        compare_memory(f"pair_losses/{name}_memory", sides, options.device) for name, sides in pairs.items()
    ]
    for result in results:
        print(line(result))
    return report(results)


def compare(name: str, sides: tuple[str, str], rounds: int, device: str) -> dict[str, Any]:
    """Compare forward and backward."""
    ours, peer = (runs(side, device, TIME_SAMPLES)[0] for side in sides)
    equal = are_equal(ours(), peer())  # also the warm-up
    taken = medians(in_turns({"ours": ours, "peer": peer}, rounds, lambda: seconds(device)))
    return record(name, **taken, unit=unit_of_seconds(device), equal=equal, device=device)


def compare_memory(name: str, sides: tuple[str, str], device: str) -> dict[str, Any]:
    """Compare peak memory beyond the inputs and the imports, each side in a process of its own."""
    found = []
    for side in sides:
        command = [sys.executable, str(Path(__file__).resolve()), "--extra-memory", side, "--device", device]
        found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    small = [runs(side, device, 512)[0]() for side in sides]
    return record(name, *found, unit="MB", equal=are_equal(*small), device=device)


def runs(side: str, device: str, num_samples: int) -> tuple[Callable[[], list[Tensor]], Callable[[], object]]:
    """Return what gives [loss, gradients …] of a loss, and the same on few samples."""
    whole, small = (Run(side, device, number) for number in (num_samples, 64))
    return whole, small


class Run:
    """A loss with its inputs, forward and backward."""

    def __init__(self, side: str, device: str, num_samples: int) -> None:
        image_ND, text_ND = features(num_samples, device)
        scale, bias = (torch.tensor([value], device=device) for value in (SCALE, BIAS))
        self.inputs = [tensor.requires_grad_() for tensor in (image_ND, text_ND, scale, bias)]
        if side in ("several", "formula"):
            self.inputs = self.inputs[:3]  # no bias there
        self.loss: Callable[..., Tensor] = LOSSES[side]

    def __call__(self) -> list[Tensor]:
        for tensor in self.inputs:
            tensor.grad = None
        loss = self.loss(*self.inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return [loss.detach(), *(tensor.grad for tensor in self.inputs if tensor.grad is not None)]


def ours(image_ND: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return sigmoid_loss(image_ND, text_ND, scale, bias, num_samples_of_ranks=(len(image_ND),))


def open_clip(image_ND: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    from open_clip.loss import SigLipLoss

    loss: Tensor = SigLipLoss()(image_ND, text_ND, scale.exp(), bias)
    return loss


def several(image_ND: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
    image_id_N, caption_id_N = ids(len(image_ND), image_ND.device)
    return contrastive_loss(
        image_ND,
        text_ND,
        scale,
        num_samples_of_ranks=(len(image_ND),),
        image_id_B=image_id_N,
        caption_id_B=caption_id_N,
        are_positives=True,
    )


def formula(image_ND: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
    image_id_N, caption_id_N = ids(len(image_ND), image_ND.device)
    shares_NN = (image_id_N[:, None] == image_id_N) | (caption_id_N[:, None] == caption_id_N)
    target_NN = shares_NN / shares_NN.sum(1, keepdim=True)
    logits_NN = scale.exp() * text_ND @ image_ND.T
    return (F.cross_entropy(logits_NN, target_NN) + F.cross_entropy(logits_NN.T, target_NN)) / 2


def ids(num_samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (image_id_N, caption_id_N): a quarter of the images and an eighth of the captions come again."""
    number_N = torch.arange(num_samples, device=device)
    return number_N % (num_samples * 3 // 4), number_N % (num_samples * 7 // 8)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "ours": ours,
    "open_clip": open_clip,
    "several": several,
    "formula": formula,
}


if __name__ == "__main__":
    sys.exit(main())
