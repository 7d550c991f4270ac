"""Measure the contrastive loss against cn_clip's own `get_loss`: seconds of one rank of 8, and extra memory.

    python benchmarks/training/loss.py           # N = 8,192 for time, 16,384 for memory (cn_clip: 5 GB)
    python benchmarks/training/loss.py --full    # more rounds
    python benchmarks/training/loss.py --device cuda

One process plays rank 0 of 8. What the seven other ranks would send (their features, log-sum-exps and column
gradients) is made beforehand by the plain formula, and handed to both sides where they call a collective, so
that what is timed is the rank's own work, and what comes out are the numbers of a real run of 8 ranks. Times
are CPU seconds of one thread: other work on the machine does not count. On a GPU they are seconds by the
clock, and memory is what PyTorch allocated.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import math
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

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
from benchmarks.peers import cn_clip_loss, cuda_is
from training.losses import contrastive as ours
from training.losses.contrastive import contrastive_loss

RANKS, DIM = 8, 512
TIME_SAMPLES, MEMORY_SAMPLES = 8_192, 16_384
SCALE = math.log(100.0)  # where trained models end
TOLERANCE = 1e-4  # of the loss, and of gradients relative to the largest


def main() -> int:
    options_of = parser(__doc__, rounds=(3, 9), device=True)
    options_of.add_argument("--extra-memory", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parse(options_of)
    if options.extra_memory:
        print(extra_memory_of(options.extra_memory, options.device))
        return 0
    torch.set_num_threads(1)
    results = [
        compare_times("loss/time", options.rounds, options.device, lock_image=False),
        compare_times("loss/time@stage1", options.rounds, options.device, lock_image=True),
        compare_memory(options.device),
    ]
    for result in results:
        print(line(result))
    return report(results)


def compare_times(name: str, rounds: int, device: str, *, lock_image: bool) -> dict[str, Any]:
    """Compare forward and backward of rank 0 of 8; in stage 1 the image features want no gradient."""
    image_ND, text_ND = features(TIME_SAMPLES, device)
    own = slice(0, TIME_SAMPLES // RANKS)
    wire = Wire(image_ND, text_ND, own)
    sides: dict[str, Callable[[], list[Tensor]]] = {
        "ours": lambda: wire.run_ours(lock_image),
        "peer": lambda: wire.run_peer(lock_image),
    }
    found = {side: run() for side, run in sides.items()}  # also the warm-up
    taken = medians(in_turns(sides, rounds, lambda: seconds(device)))
    equal = are_equal(found["ours"], found["peer"])
    return record(name, **taken, unit=unit_of_seconds(device), equal=equal, device=device)


def compare_memory(device: str) -> dict[str, Any]:
    """Compare peak memory beyond the inputs and the imports, each side in a separate process.

    All samples are on one rank here, which is the most that ours can take.
    """
    found = {}
    for side in ("ours", "peer"):
        command = [sys.executable, str(Path(__file__).resolve()), "--extra-memory", side, "--device", device]
        found[side] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    image_ND, text_ND = features(512, device)
    wire = Wire(image_ND, text_ND, slice(0, 512))
    equal = are_equal(wire.run_ours(False), wire.run_peer(False))
    return record("loss/memory", **found, unit="MB", equal=equal, device=device)


def extra_memory_of(side: str, device: str) -> float:
    image_ND, text_ND = features(MEMORY_SAMPLES, device)
    wire = Wire(image_ND, text_ND, slice(0, MEMORY_SAMPLES))
    small = Wire(image_ND[:64], text_ND[:64], slice(0, 64))
    run = {"ours": Wire.run_ours, "peer": Wire.run_peer}[side]
    inputs = wire.leaves(False)
    wire.leaves = lambda _: inputs  # type: ignore[method-assign]
    return extra_memory_mb(lambda: run(wire, False), lambda: run(small, False), device)


def extra_memory_mb(run: Callable[[], object], run_small: Callable[[], object], device: str) -> float:
    """Return how much more memory a run takes at its peak than was taken before it.

    `run_small` comes first: what a first call allocates for good is not the loss's.
    """
    run_small()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - allocated) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (Linux, proc(5))
    before = _memory_kb("VmRSS")
    run()
    return (_memory_kb("VmHWM") - before) / 1e3


def _memory_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def features(num_samples: int, device: str) -> tuple[Tensor, Tensor]:
    """Return unit-norm image and text features that resemble each other pair by pair, as in training."""
    generator = torch.Generator().manual_seed(0)
    image_ND = torch.randn(num_samples, DIM, generator=generator)
    text_ND = 0.1 * image_ND + torch.randn(num_samples, DIM, generator=generator)
    return F.normalize(image_ND, dim=1).to(device), F.normalize(text_ND, dim=1).to(device)


class Wire:
    """What rank 0 puts in and what it would receive; each `run` gives [loss, gradients of its inputs …]."""

    def __init__(self, image_ND: Tensor, text_ND: Tensor, own: slice) -> None:
        self.image_ND, self.text_ND, self.own = image_ND, text_ND, own
        self.ranks = len(image_ND) // own.stop
        scale = math.exp(SCALE)
        # The others' shares by the plain formula; rows are texts and columns are images.
        self.others_loss = image_ND.new_zeros(())
        self.others_lse_N = image_ND.new_full((len(image_ND),), -torch.inf)
        self.others_column_ND = torch.zeros_like(image_ND)
        if self.ranks == 1:
            return
        logit_NN = scale * text_ND @ image_ND.T
        row_lse_N, column_lse_N = logit_NN.logsumexp(1), logit_NN.logsumexp(0)
        diagonal_N = logit_NN.diagonal()
        rest = slice(own.stop, None)
        self.others_lse_N = logit_NN[rest].logsumexp(0)
        per_sample_N = row_lse_N + column_lse_N - 2 * diagonal_N
        self.others_loss = per_sample_N[rest].sum() / (2 * len(image_ND))
        weight = (logit_NN[rest] - row_lse_N[rest, None]).exp() + (logit_NN[rest] - column_lse_N).exp()
        self.others_column_ND = weight.T @ text_ND[rest]

    def run_ours(self, lock_image: bool) -> list[Tensor]:
        def sum_to_owner(grad_ND: Tensor, _: Any) -> Tensor:
            return grad_ND[self.own] + self.others_column_ND[self.own]

        patches = {
            "num_ranks": lambda: self.ranks,
            "gather": lambda local, _: self.image_ND if self.ranks > 1 else local,
            "log_sum_exp_over_ranks": lambda lse_N: torch.logaddexp(lse_N, self.others_lse_N),
            "sum_to_owner": sum_to_owner,
            "dist": SimpleNamespace(all_reduce=lambda loss: loss.add_(self.others_loss), is_initialized=bool),
        }
        image_BD, text_BD, scale = self.leaves(lock_image)
        with mock.patch.multiple(ours, **patches):
            sizes = (self.own.stop,) * self.ranks
            loss = contrastive_loss(image_BD, text_BD, scale, num_samples_of_ranks=sizes)
            loss.backward()  # type: ignore[no-untyped-call]
        return [loss.detach(), *(leaf.grad for leaf in (image_BD, text_BD) if leaf.grad is not None)]

    def run_peer(self, lock_image: bool) -> list[Tensor]:
        image_BD, text_BD, scale = self.leaves(lock_image)

        def all_gather(parts: list[Tensor], local: Tensor) -> None:
            whole = self.image_ND if local is image_BD else self.text_ND
            for part, sent in zip(parts, whole.split(self.own.stop), strict=True):
                part.copy_(sent)

        group = SimpleNamespace(get_world_size=lambda: self.ranks, get_rank=lambda: 0, all_gather=all_gather)
        loss = cn_clip_loss(
            lambda images, texts, mask_ratio: (images, texts, scale.exp()), image_BD, text_BD, group=group
        )
        with cuda_is(image_BD.device):
            loss.backward()  # type: ignore[no-untyped-call]
        return [loss.detach(), *(leaf.grad for leaf in (image_BD, text_BD) if leaf.grad is not None)]

    def leaves(self, lock_image: bool) -> tuple[Tensor, Tensor, Tensor]:
        image_BD, text_BD = self.image_ND[self.own].clone(), self.text_ND[self.own].clone()
        scale = torch.tensor([SCALE], device=image_BD.device, requires_grad=True)
        return image_BD.requires_grad_(not lock_image), text_BD.requires_grad_(), scale


def are_equal(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(mine) == len(theirs) and all(
        ((a - b).abs().max() / b.abs().max()).item() < TOLERANCE for a, b in zip(mine, theirs, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
