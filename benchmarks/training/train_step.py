"""One training step against cn_clip's: its towers and `get_loss`, forward and backward; optimizer apart.

    python benchmarks/training/train_step.py                 # ViT-B/16 with RoBERTa-base, batch 8, one thread
    python benchmarks/training/train_step.py --full          # more rounds
    python benchmarks/training/train_step.py --device cuda   # bf16: ViT-B/16, L/14 and H/14, with utilisation
    python benchmarks/training/train_step.py --device cuda --models ViT-L-14 --batch 192

Both sides have the same weights, no dropout, and the same pictures and captions. Captions have lengths like
Flickr30K-CN's (19.7 characters in the mean); cn_clip computes on 52 tokens of each. `equal` says that the
loss and the gradient of every parameter agree in float32.

On the CPU the optimizer's step, the same in both, is timed apart. Times are CPU seconds of one thread, so
that other work on the machine does not count.

On a GPU, which its figures need, steps are whole ones, optimizer included, in samples a second by the clock:
ours in the engine that trains (DeepSpeed, `zero1_bf16`), cn_clip's in its automatic mixed precision, in
bfloat16, with AdamW. Each side has its fastest setting that runs there: activations are recomputed only where
memory asks for it. cn_clip's image tower attends by PyTorch's fused kernels; `--use-flash-attention` of its
own wants the interface of flash-attn 1, which later ones no longer have, and is left out. Utilisation counts
the operations that the model needs for captions as long as they are, by the data sheet's peak. `equal` asks
for float32 on the GPU too, and for losses of the bfloat16 steps that agree to 0.05.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import functools
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import machine, seconds
from benchmarks.peers import cn_clip_of
from training.config.train import TrainConfig
from training.data.loader import Batch
from training.engine.engine import build_engine, join_ranks, train_step
from training.engine.optim import build_optimizer
from training.engine.towers import Towers
from training.flops import PEAK_FLOPS, find_device, training_flops
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS
from training.ranks.launcher import free_port
from training.weights.weights import state_for_file

Kind = Literal["live", "cached", "stage2"]
Side = Literal["ours", "peer"]
KINDS: tuple[Kind, ...] = ("live", "cached", "stage2")

BATCH, CONTEXT_LENGTH = 8, 52
LENGTHS = (11, 14, 16, 18, 20, 22, 25, 32)  # characters, 19.75 in the mean
TOLERANCE = 1e-4  # of losses; of a gradient relative to its length ten times that
CACHE_TOLERANCE = 2e-3  # of the loss on float16 features
BF16_TOLERANCE = 0.05  # of losses
# Gradients shorter than this share of the longest are rounding (those of keys' biases are 0 by formula).
NOISE = 1e-4
# Samples a step on a GPU: as many as leave room for the activations of a step in 80 GB.
GPU_BATCHES = {"ViT-B-16": 512, "ViT-L-14": 192, "ViT-H-14": 96}
WARM_UP, LEARNING_RATE = 3, 1e-6


def main() -> int:
    options = _options()
    if options.device == "cpu":
        torch.set_num_threads(1)
        results = [compare(kind, 5 if options.full else 2) for kind in KINDS]
    else:
        results = []
        for model in options.models:
            batch_size = options.batch or GPU_BATCHES.get(model, 256)
            results += compare_on_accelerator(model, options.device, batch_size, 30 if options.full else 10)
    for result in results:
        print(
            f"{result['name']:<27} ours {result['ours']:.3f} peer {result['peer']:.3f} {result['unit']},"
            f" ratio {result['ratio']:.2f}, equal {result['equal']}, optimizer"
            f" {result['optimizer_seconds']:.3f} s, utilisation {result.get('utilisation')}"
            f" and {result.get('peer_utilisation')}"
        )
    print(json.dumps(results))
    return 0 if all(result["equal"] for result in results) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="more rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--models", nargs="+", choices=sorted(MODELS), help=f"on a GPU; unset: {', '.join(GPU_BATCHES)}"
    )
    parser.add_argument("--batch", type=int, help="samples a step on a GPU; unset: by model")
    options = parser.parse_args()
    if options.device == "cpu" and (options.models or options.batch):
        parser.error("--models and --batch need --device cuda: on the CPU it is ViT-B/16 with 8 samples")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    options.models = options.models or list(GPU_BATCHES)
    return options


def compare(kind: Kind, rounds: int) -> dict[str, Any]:
    """Samples a CPU second of both sides on one batch, forward and backward."""
    pair = Pair("ViT-B-16", kind, "cpu")
    equal = pair.agree()
    ours, theirs = pair.seconds(rounds)
    pair.our_step()
    adam = build_optimizer(pair.clip, pair.config)
    start = seconds()
    adam.step()
    return {
        "name": f"train_step/{kind}",
        "ours": round(BATCH / ours, 3),
        "peer": round(BATCH / theirs, 3),
        "unit": "samples/CPU s",
        "ratio": round(theirs / ours, 3),
        "equal": equal,
        "gradients_apart": float(f"{pair.gradients_apart:.1e}"),
        "optimizer_seconds": round(seconds() - start, 3),
        "machine": f"{machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
    }


class Pair:
    """Both sides in float32, with the same weights, on one batch of 8."""

    def __init__(self, model: str, kind: Kind, device: str) -> None:
        self.config = config_of(kind, BATCH)
        self._device = device
        self.clip, self.peer = models_of(model, kind)
        self.clip.to(device)
        self.peer.to(device)
        self.towers = Towers(self.clip, num_samples_of_ranks=(BATCH,), config=self.config).to(device)
        image_BCHW, self._tokens_BL = make_batch(model, BATCH)
        self._image: Tensor = image_BCHW.to(device)
        self._pixel_BCHW = self.towers.normalise(self._image)
        if kind == "cached":
            with torch.no_grad():
                self._image = self.clip.encode_image(self._pixel_BCHW).half()
        self._tolerance = CACHE_TOLERANCE if kind == "cached" else TOLERANCE
        self.gradients_apart = float("nan")

    def our_step(self) -> Tensor:
        features = self.towers(self._image, self._tokens_BL)
        loss = self.towers.loss(features, SimpleNamespace(image_id_B=None, caption_id_B=None))  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def peer_step(self) -> Tensor:
        loss = peer_loss(self.peer, self._pixel_BCHW, self._tokens_BL.to(self._device))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def agree(self) -> bool:
        """Loss and every gradient are the same; also the warm-up."""
        losses = [self.our_step(), self.peer_step()]
        ours, theirs = gradients_of(self.clip), gradients_of(self.peer)
        assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
        noise = NOISE * max(float(gradient.norm()) for gradient in theirs.values())
        self.gradients_apart = max(
            float((ours[name] - gradient).norm()) / max(float(gradient.norm()), noise)
            for name, gradient in theirs.items()
        )
        for model in (self.clip, self.peer):
            model.zero_grad()
        loss_apart = abs(losses[0] - losses[1]).item()
        return bool(loss_apart < self._tolerance and self.gradients_apart < 10 * self._tolerance)

    def seconds(self, rounds: int) -> list[float]:
        """Median seconds of each side's step, in turn, so that noise hits both alike."""
        sides = ((self.our_step, self.clip), (self.peer_step, self.peer))
        found: list[list[float]] = [[] for _ in sides]
        for _ in range(rounds):
            for times, (step, model) in zip(found, sides, strict=True):
                start = seconds(self._device)
                step()
                times.append(seconds(self._device) - start)
                model.zero_grad()
        return [statistics.median(times) for times in found]


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Gradients of our model or of cn_clip's, by the names in cn_clip's files."""
    if isinstance(model, CLIP):
        trained = {name for name, tensor in model.named_parameters() if tensor.grad is not None}
        holder = build_clip(model.config)
        holder.load_state_dict(
            {
                name: tensor.grad.cpu() if name in trained else torch.zeros_like(tensor, device="cpu")
                for name, tensor in model.state_dict(keep_vars=True).items()
            }
        )
        found = state_for_file(holder)
    else:
        found = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    return {name: tensor.detach().float().cpu() for name, tensor in found.items() if tensor.any()}


@dataclass(frozen=True, slots=True)
class Measured:
    """Whole steps of one side on an accelerator."""

    step_seconds: float
    optimizer_seconds: float
    losses: tuple[float, ...]
    peak_bytes: int
    checkpointing: bool


def compare_on_accelerator(
    model: str, device: str, batch_size: int, rounds: int, kinds: tuple[Kind, ...] = KINDS
) -> list[dict[str, Any]]:
    """Samples a second of both sides, each measured in a process of its own: it leaves no memory behind."""
    config = MODELS[model]
    known = find_device(torch.cuda.get_device_name(device)) if device != "cpu" else None
    peak = None if known is None else PEAK_FLOPS[known]
    num_tokens = statistics.fmean(length + 2 for length in LENGTHS)
    results = []
    for kind in kinds:
        equal = _alone(agree_in_float32, model, kind, device)
        sides: dict[Side, Measured] = {}
        for side in ("ours", "peer"):
            sides[side] = fastest(
                functools.partial(_alone, measure, side, model, kind, device, batch_size, rounds)
            )
        ours, peer = sides["ours"], sides["peer"]
        loss_apart = max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True))
        flops = training_flops(config, config_of(kind, batch_size), num_tokens)
        # The peer has no features to read: what its model needs is a live step.
        peer_flops = training_flops(
            config, config_of("live" if kind == "cached" else kind, batch_size), num_tokens
        )
        results.append(
            {
                "name": f"train_step/{kind}@{model}",
                "ours": round(batch_size / ours.step_seconds, 2),
                "peer": round(batch_size / peer.step_seconds, 2),
                "unit": "samples/s",
                "ratio": round(peer.step_seconds / ours.step_seconds, 3),
                "equal": bool(equal and loss_apart < BF16_TOLERANCE),
                "losses_apart": round(loss_apart, 5),
                "batch": batch_size,
                "utilisation": share(flops * batch_size / ours.step_seconds, peak),
                "peer_utilisation": share(peer_flops * batch_size / peer.step_seconds, peak),
                "optimizer_seconds": round(ours.optimizer_seconds, 5),
                "peer_optimizer_seconds": round(peer.optimizer_seconds, 5),
                "checkpointing": {"ours": ours.checkpointing, "peer": peer.checkpointing},
                "peak_gib": {"ours": gib(ours.peak_bytes), "peer": gib(peer.peak_bytes)},
                "machine": machine(device),
            }
        )
    return results


def fastest(run: Callable[[bool], Measured | None]) -> Measured:
    """Without activation checkpointing, which is slower, or with it where memory asks for it."""
    for checkpointing in (False, True):
        if (found := run(checkpointing)) is not None:
            return found
    raise SystemExit("a step does not fit the GPU's memory, checkpointing or not: take a smaller --batch")


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def agree_in_float32(model: str, kind: Kind, device: str) -> bool:
    return Pair(model, kind, device).agree()


def measure(
    side: Side, model: str, kind: Kind, device: str, batch_size: int, rounds: int, checkpointing: bool
) -> Measured | None:
    """One side's whole steps in bfloat16; None where they do not fit into memory."""
    make = {"ours": our_training, "peer": peer_training}[side]
    try:
        step, optimizer = make(model, kind, device, batch_size, checkpointing)
        losses, times = [], []
        for number in range(WARM_UP + rounds):
            start = seconds(device)
            losses.append(step())
            if number >= WARM_UP:
                times.append(seconds(device) - start)
        optimizer_seconds = _timed_inside(step, optimizer, device)
    except torch.OutOfMemoryError:
        return None
    peak = 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)
    return Measured(statistics.median(times), optimizer_seconds, tuple(losses), peak, checkpointing)


def _timed_inside(step: Callable[[], float], optimizer: Any, device: str) -> float:
    """Seconds that one more step spends in the optimizer's."""
    update, spent = optimizer.step, []

    def timed(*arguments: Any, **named: Any) -> Any:
        start = seconds(device)
        result = update(*arguments, **named)
        spent.append(seconds(device) - start)
        return result

    with mock.patch.object(optimizer, "step", timed):
        step()
    return sum(spent)


def our_training(
    model: str, kind: Kind, device: str, batch_size: int, checkpointing: bool
) -> tuple[Callable[[], float], Any]:
    """(a step that gives its loss, what has the optimizer's `step`) of the engine that trains."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    config = replace(
        config_of(kind, batch_size), deepspeed="zero1_bf16", checkpoint_activations=checkpointing
    )
    join_ranks(config)
    clip = without_dropout(model, kind)
    clip.set_activation_checkpointing(checkpointing)
    image, tokens_BL = make_batch(model, batch_size)
    image = image.to(device)
    towers = Towers(clip, num_samples_of_ranks=(batch_size,), config=config).to(device)
    if kind == "cached":
        with torch.no_grad():
            parts = [clip.encode_image(towers.normalise(part)).half() for part in image.split(32)]
        image = torch.cat(parts)
    engine = build_engine(towers, config)
    engine.train()
    ids_B = torch.arange(batch_size)
    batch = Batch(
        step=0,
        keys=np.array([f"{row:032x}".encode() for row in range(batch_size)]),
        image=image,
        tokens_BL=tokens_BL,
        image_id_B=ids_B,
        caption_id_B=ids_B,
    )
    return lambda: train_step(engine, batch, LEARNING_RATE, config.max_temperature, 0).loss, engine


def peer_training(
    model: str, kind: Kind, device: str, batch_size: int, checkpointing: bool
) -> tuple[Callable[[], float], Any]:
    """The same of cn_clip: automatic mixed precision in bfloat16, and AdamW on float32 weights."""
    _, peer = models_of(model, kind)
    peer.to(device)
    if checkpointing:
        peer.set_grad_checkpointing()
    adam = torch.optim.AdamW(
        [p for p in peer.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0
    )
    image_BCHW, tokens_BL = make_batch(model, batch_size)
    config = config_of(kind, batch_size)
    normalise = (
        Towers(without_dropout("tiny-vit", kind), num_samples_of_ranks=(1,), config=config)
        .to(device)
        .normalise
    )
    pixel_BCHW, tokens_BL = normalise(image_BCHW.to(device)), tokens_BL.to(device)

    def step() -> float:
        adam.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = peer_loss(peer, pixel_BCHW, tokens_BL)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        peer.logit_scale.data = torch.clamp(peer.logit_scale.data, 0, 4.6052)  # as its `train` does
        return loss.item()

    return step, adam


def config_of(kind: Kind, batch_size: int) -> TrainConfig:
    return TrainConfig(
        epochs=1,
        global_batch=batch_size,
        lanes=1,
        weight_decay=0.0,
        lock_image=kind != "stage2",
        cached_views=int(kind == "cached"),
    )


def without_dropout(model: str, kind: Kind) -> CLIP:
    """Our model with seeded weights, in training mode."""
    torch.manual_seed(0)
    config = MODELS[model]
    clip = build_clip(replace(config, text=replace(config.text, dropout=0.0)))
    if kind != "stage2":
        clip.lock_image_tower()
    return clip.train()


def models_of(model: str, kind: Kind) -> tuple[CLIP, Any]:
    """Our model and cn_clip's with the same weights, in training mode."""
    clip = without_dropout(model, kind)
    peer = cn_clip_of(clip.config)
    found = peer.load_state_dict(state_for_file(clip), strict=False)
    lacking = [key for key in found.missing_keys if "pooler" not in key and "position_ids" not in key]
    assert not lacking, lacking
    assert not found.unexpected_keys, found.unexpected_keys
    if kind != "stage2":
        for parameter_name, parameter in peer.named_parameters():
            if parameter_name.startswith("visual."):
                parameter.requires_grad = False  # as its `--freeze-vision`
    return clip, peer.train()


def make_batch(model: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """uint8 pictures of noise, and token ids of captions padded to 52."""
    side = MODELS[model].vision.image_size_px
    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.randint(0, 256, (batch_size, 3, side, side), generator=generator, dtype=torch.uint8)
    return image_BCHW, make_tokens(batch_size, MODELS[model].text.vocab_size)


def make_tokens(batch_size: int, vocab_size: int) -> Tensor:
    """Random token ids of captions of LENGTHS, padded to 52."""
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.zeros(batch_size, CONTEXT_LENGTH, dtype=torch.int64)
    for row in range(batch_size):
        num_tokens = LENGTHS[row % len(LENGTHS)] + 2
        tokens_BL[row, :num_tokens] = torch.randint(5, vocab_size, (num_tokens,), generator=generator)
    return tokens_BL


def peer_loss(peer: Any, pixel_BCHW: Tensor, tokens_BL: Tensor) -> Tensor:
    """What cn_clip's `train` computes of a batch, at one rank."""
    from cn_clip.training import train

    options = SimpleNamespace(
        accum_freq=1,
        aggregate=False,
        distillation=False,
        mask_ratio=0,
        local_device_rank=0,
        report_training_batch_acc=False,
    )
    device = pixel_BCHW.device
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor.to(device)):
        cross_entropy = F.cross_entropy
        loss: Tensor
        loss, _ = train.get_loss(peer, pixel_BCHW, tokens_BL, cross_entropy, cross_entropy, options)
    return loss


def share(flops: float, peak: float | None) -> float | None:
    """Of the device's peak; None where it is not known."""
    return None if peak is None else round(flops / peak, 3)


def gib(num_bytes: int) -> float:
    return round(num_bytes / 2**30, 2)


if __name__ == "__main__":
    sys.exit(main())
