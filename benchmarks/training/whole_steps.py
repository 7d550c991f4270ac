"""Measure whole training steps on an accelerator, optimizer included: the engine's, and the peers'.

All take the same batches from shards by worker processes, before the clock starts: what decodes images as
fast as a GPU uses them is a matter of how many processors it has (benchmarks/gpu/data_rate.py).
"""

import contextlib
import functools
import importlib.metadata
import itertools
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch._dynamo.exc import TorchDynamoException

from benchmarks.harness import record, seconds
from benchmarks.peers import Peer
from benchmarks.training.image_path import Source, draw_jpegs, make_source
from benchmarks.training.step_models import (
    CONTEXT_LENGTH,
    KINDS,
    MEAN_TOKENS,
    Kind,
    be_the_only_rank,
    config_of,
    make_tokens,
    models_of,
    take_step,
    without_dropout,
)
from benchmarks.training.step_pair import LOSSES, Pair
from pipeline.core.records import Shard
from training.data.feature_cache import FeatureCache, build, most_images, requests
from training.data.feeder import Feeder, Request
from training.data.image_workers import ImageWorkers
from training.data.loader import Batch, BatchReader
from training.engine.engine import Towers, build_engine, join_ranks
from training.flops import PEAK_FLOPS, find_device, training_flops
from training.model.compiled import lacks
from training.model.config import MODELS
from training.model.preprocess import normalise

Side = Literal["ours"] | Peer

BF16_TOLERANCE = 0.05  # of losses
WARM_UP, LEARNING_RATE = 3, 1e-6
STEPS = 10**6  # never reached
UNIQUE_IMAGES = 32
# Distributions, and how a record says which settings of the peer were measured.
PEERS: dict[Peer, tuple[str, str]] = {
    "cn_clip": ("cn_clip", "bf16 autocast, PyTorch's attention, AdamW"),
    "open_clip": (
        "open_clip_torch",
        "bf16 autocast, fused AdamW, text by HFTextEncoder: transformers' BERT with our weights",
    ),
}


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Whole steps of one side on an accelerator."""

    step_seconds: float
    optimizer_seconds: float
    losses: tuple[float, ...]
    peak_bytes: int
    checkpointing: bool
    compiled: bool


def compare_on_accelerator(
    model: str, device: str, batch_size: int, rounds: int, kinds: tuple[Kind, ...] = KINDS
) -> Iterator[dict[str, Any]]:
    """Yield samples a second of ours and of each peer, as soon as they are known.

    Each side is measured in a separate process.
    """
    for kind in kinds:
        sides: dict[Side, StepTimes] = {}
        for side in ("ours", *PEERS):
            sides[side] = fastest(
                functools.partial(alone, measure, side, model, kind, device, batch_size, rounds)
            )
            if side != "ours":
                yield _compared(side, sides, model, kind, device, batch_size)


def _compared(
    peer_name: Peer, sides: dict[Side, StepTimes], model: str, kind: Kind, device: str, batch_size: int
) -> dict[str, Any]:
    """Return the record of ours against a peer."""
    equal = alone(agree_in_float32, model, kind, device, peer_name)
    config = MODELS[model]
    known = find_device(torch.cuda.get_device_name(device)) if device != "cpu" else None
    peak = None if known is None else PEAK_FLOPS[known]
    ours, peer = sides["ours"], sides[peer_name]
    loss_apart = max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True))
    flops = training_flops(config, config_of(kind, batch_size), MEAN_TOKENS)
    # The peer has no features to read: what its model needs is a live step.
    peer_flops = training_flops(
        config, config_of("live" if kind == "cached" else kind, batch_size), MEAN_TOKENS
    )
    distribution, settings = PEERS[peer_name]
    return record(
        f"train_step/{kind}@{model}" if peer_name == "cn_clip" else f"train_step/{kind}/{peer_name}@{model}",
        ours=batch_size / ours.step_seconds,
        peer=batch_size / peer.step_seconds,
        unit="samples/s",
        equal=bool(equal and loss_apart < BF16_TOLERANCE),
        device=device,
        peer_is=f"{distribution} {importlib.metadata.version(distribution)}: {settings}",
        losses_apart=round(loss_apart, 5),
        batch=batch_size,
        utilisation=share(flops * batch_size / ours.step_seconds, peak),
        peer_utilisation=share(peer_flops * batch_size / peer.step_seconds, peak),
        optimizer_seconds=round(ours.optimizer_seconds, 5),
        peer_optimizer_seconds=round(peer.optimizer_seconds, 5),
        compiled={"ours": ours.compiled, "peer": peer.compiled},
        checkpointing={"ours": ours.checkpointing, "peer": peer.checkpointing},
        peak_gib={"ours": gib(ours.peak_bytes), "peer": gib(peer.peak_bytes)},
    )


def fastest(run: Callable[[bool], StepTimes | None]) -> StepTimes:
    """Run without activation checkpointing, which is slower, or with it if memory asks for it."""
    for checkpointing in (False, True):
        if (found := run(checkpointing)) is not None:
            return found
    raise SystemExit("a step does not fit the GPU's memory, checkpointing or not: take a smaller --batch")


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a separate process, which leaves no memory behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def agree_in_float32(model: str, kind: Kind, device: str, peer: Peer) -> bool:
    return Pair(model, kind, device, peer).agree()


def measure(
    side: Side,
    model: str,
    kind: Kind,
    device: str,
    batch_size: int,
    rounds: int,
    checkpointing: bool,
    compiled: bool | None = None,
) -> StepTimes | None:
    """Measure one side's whole steps in bfloat16; None if they do not fit into memory.

    By default ours and open_clip are compiled if there is a GPU with all that it takes; open_clip is measured
    uncompiled if torch fails to compile it.
    """
    make = our_training if side == "ours" else functools.partial(peer_training, side)
    if compiled is None:
        compiled = side != "cn_clip" and device != "cpu" and not lacks(on_gpu=True)
    try:
        with made_source(model, batch_size) as source:
            count = WARM_UP + rounds + 1  # one for the optimizer's time
            step, optimizer = make(model, kind, device, source, checkpointing, compiled=compiled, count=count)
            losses, times = [], []
            for number in range(WARM_UP + rounds):
                start = seconds(device)
                losses.append(step())
                if number >= WARM_UP:
                    times.append(seconds(device) - start)
            optimizer_seconds = _timed_inside(step, optimizer, device)
    except torch.OutOfMemoryError:
        return None
    except TorchDynamoException as error:
        if side == "ours" or not compiled:
            raise
        print(f"{side} is measured uncompiled: {type(error).__name__}: {error}", flush=True)
        return measure(side, model, kind, device, batch_size, rounds, checkpointing, compiled=False)
    peak = 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)
    return StepTimes(
        statistics.median(times), optimizer_seconds, tuple(losses), peak, checkpointing, compiled
    )


def _timed_inside(step: Callable[[], float], optimizer: Any, device: str) -> float:
    """Return seconds that one more step spends in the optimizer's."""
    update, spent = optimizer.step, []

    def timed(*arguments: Any, **named: Any) -> Any:
        start = seconds(device)
        result = update(*arguments, **named)
        spent.append(seconds(device) - start)
        return result

    with mock.patch.object(optimizer, "step", timed):
        step()
    return sum(spent)


@contextlib.contextmanager
def made_source(model: str, batch_size: int) -> Iterator[Source]:
    """Yield a shard of as many images as a batch has, each step of which is an epoch."""
    config = MODELS[model]
    jpegs = list(itertools.islice(itertools.cycle(draw_jpegs(UNIQUE_IMAGES)), batch_size))
    with tempfile.TemporaryDirectory() as folder:
        yield make_source(
            Path(folder),
            jpegs,
            tokenizer=_LikeFlickr(config.text.vocab_size),
            size_px=config.vision.image_size_px,
        )


class _LikeFlickr:
    """Turn captions into random tokens of usual lengths."""

    digest = "like Flickr30K-CN"

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def encode(self, texts: Any, context_length: int) -> npt.NDArray[np.int32]:
        return make_tokens(len(texts), self._vocab_size).numpy().astype(np.int32)[:, :context_length]

    def num_truncated(self, texts: Any, context_length: int) -> int:
        return 0


def _workers(source: Source, device: str, images: int) -> ImageWorkers:
    return ImageWorkers(
        len(os.sched_getaffinity(0)), source.views, most_images=images, pinned=device != "cpu"
    )


def taken(
    wanted: Iterator[Request[Batch]], workers: ImageWorkers | None, device: str, count: int
) -> Iterator[Batch]:
    """Return the first batches, their images on the device; none is made while the steps are measured."""
    with Feeder(wanted, workers, device) as feeder:
        return iter(list(itertools.islice(feeder, count)))


def _with_features(source: Source, towers: Towers, device: str) -> None:
    """Have the reader give features of each image's view of epoch 0."""
    num_samples = len(source.jpegs)
    shard = Shard(source.views.paths[0], num_samples, 1, "0" * 64)
    cache = FeatureCache([shard], "benchmark", num_views=1, dim=towers.clip.config.embed_dim)

    def encode(image_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return towers.encode_image(image_BCHW)

    with Feeder(
        requests(cache, [0], source.reader.visits), _workers(source, device, most_images(1)), device
    ) as images:
        build(cache, [0], iter(images), encode, lambda *_: None, lambda: False)
    source.reader.features = cache


def _views_of_features(reader: BatchReader) -> Iterator[Request[Batch]]:
    """Yield requests for the images whose features the other side reads."""
    for step in range(STEPS):
        request = reader.request(step)
        assert request.wanted is not None
        request.wanted["epoch"] = 0
        yield request


def our_training(
    model: str,
    kind: Kind,
    device: str,
    source: Source,
    checkpointing: bool,
    *,
    compiled: bool | None = None,
    count: int,
) -> tuple[Callable[[], float], Any]:
    """Return (a step that gives its loss, what has the optimizer's `step`) of the engine that trains."""
    be_the_only_rank()
    batch_size = len(source.jpegs)
    config = replace(
        config_of(kind, batch_size),
        deepspeed="zero1_bf16",
        checkpoint_activations=checkpointing,
        compile=compiled,
    )
    join_ranks(config)
    clip = without_dropout(model, kind)
    clip.set_activation_checkpointing(checkpointing)
    towers = Towers(clip, num_samples_of_ranks=(batch_size,), config=config).to(device)
    if kind == "cached":
        _with_features(source, towers, device)
    workers = None if kind == "cached" else _workers(source, device, batch_size)
    batches = taken(source.reader.requests(0, STEPS), workers, device, count)
    engine = build_engine(towers, config)
    engine.train()
    return lambda: take_step(engine, next(batches), LEARNING_RATE, config), engine


def peer_training(
    peer_name: Peer,
    model: str,
    kind: Kind,
    device: str,
    source: Source,
    checkpointing: bool,
    *,
    compiled: bool,
    count: int,
) -> tuple[Callable[[], float], Any]:
    """Return the same of a peer: automatic mixed precision in bfloat16, and AdamW on float32 weights."""
    _, peer = models_of(model, kind, peer_name)
    peer.to(device)
    if checkpointing:
        peer.set_grad_checkpointing()
    forward = torch.compile(peer) if compiled else peer  # the whole model, as open_clip's `--torchcompile`
    loss_of = LOSSES[peer_name]
    adam = torch.optim.AdamW(
        [p for p in peer.parameters() if p.requires_grad],
        lr=LEARNING_RATE,
        weight_decay=0,
        fused=True if peer_name == "open_clip" else None,
    )
    reader = source.reader
    wanted = _views_of_features(reader) if kind == "cached" else reader.requests(0, STEPS)
    workers = _workers(source, device, len(source.jpegs))
    batches = taken(wanted, workers, device, count)

    def step() -> float:
        batch = next(batches)
        pixel_BCHW, tokens_BL = normalise(batch.image), batch.tokens_BL.to(device)
        tokens_BL = torch.nn.functional.pad(tokens_BL, (0, CONTEXT_LENGTH - tokens_BL.shape[1]))
        adam.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_of(forward, pixel_BCHW, tokens_BL)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        peer.logit_scale.data = torch.clamp(peer.logit_scale.data, 0, 4.6052)  # as their training loops do
        return loss.item()

    return step, adam


def share(flops: float, peak: float | None) -> float | None:
    """Return the share of the device's peak; None if that is not known."""
    return None if peak is None else round(flops / peak, 3)


def gib(num_bytes: int) -> float:
    return round(num_bytes / 2**30, 2)
