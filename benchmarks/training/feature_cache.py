"""Stage 1 on cached features: what the cache costs to build, and after how many epochs it has paid.

    python benchmarks/training/feature_cache.py           # ViT-B/16 with RoBERTa-base, 8 pictures; one thread
    python benchmarks/training/feature_cache.py --full    # more rounds

Measured for each picture, in CPU seconds: decoding, augmenting and embedding it once (K views cost K times
that), reading one cached feature with its check, and a training step's share with pictures (live) and with
features (cached); captions have lengths like Flickr30K-CN's. The cache has paid after
K · view / (live - cached) epochs; a run of fewer is quicker live. `equal` says that a step on cached features
has the loss of the live step on the same views to 2e-3.

There is no --device: on a GPU the steps are `train_step/live` and `train_step/cached` of train_step.py and a
view's embedding is `encode/image` of encode.py; its decoding and augmenting stay on the CPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import cv2
import torch

from benchmarks.harness import machine
from benchmarks.training.image_path import draw_jpegs, make_reader
from benchmarks.training.train_step import make_tokens
from pipeline.core.records import Shard
from training.config.train import AugmentConfig, TrainConfig
from training.data.feature_cache import FeatureCache, build, cache_key
from training.data.loader import Batch, BatchReader
from training.engine.towers import Towers
from training.model.clip import build_clip
from training.model.config import VIT_B_16

NUM_PICTURES, TOLERANCE = 8, 2e-3
VIEWS = (1, 4, 8)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="more rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(0)
    clip = build_clip(VIT_B_16)
    clip.lock_image_tower()
    for module in clip.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = TrainConfig(epochs=1, global_batch=NUM_PICTURES, lanes=1, lock_image=True)
    towers = Towers(clip.train(), num_samples_of_ranks=(NUM_PICTURES,), config=config)
    tokens_BL = make_tokens(NUM_PICTURES, clip.config.text.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        reader = make_reader(Path(folder), draw_jpegs()[:NUM_PICTURES])
        live = reader.read(0)
        tar = Path(folder) / "00000.tar"
        shard = Shard(str(tar), NUM_PICTURES, tar.stat().st_size, "0" * 64)
        key = cache_key(
            clip.visual, AugmentConfig(), image_size_px=224, seed=0, num_views=1, dtype=torch.float32
        )
        cache = FeatureCache([shard], key, num_views=1, dim=clip.config.embed_dim)

        def encode(image_BCHW: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return clip.encode_image(towers.normalise(image_BCHW))

        def build_once() -> None:
            build(cache, [0], lambda _: NUM_PICTURES, reader.images, encode, lambda *_: None, lambda: False)

        build_once()
        cached_reader = make_cached(reader, cache)
        cached = cached_reader.read(0)
        losses: dict[str, float] = {}

        def step(name: str, read: BatchReader) -> None:
            batch: Batch = read.read(0)
            loss = towers.loss(towers(batch.image, tokens_BL), batch)
            loss.backward()  # type: ignore[no-untyped-call]
            losses[name] = loss.item()

        live_reader = make_cached(reader, None)
        measured: dict[str, Callable[[], object]] = {
            "view": build_once,
            "read": lambda: cached_reader.read(0),
            "live": lambda: step("live", live_reader),
            "cached": lambda: step("cached", cached_reader),
        }
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(5 if options.full else 2):
            for name, run in measured.items():
                start = time.process_time()
                run()
                seconds[name].append((time.process_time() - start) / NUM_PICTURES)
    assert live.image.ndim == 4
    assert cached.image.ndim == 2
    view, read, live_seconds, cached_seconds = (statistics.median(seconds[name]) for name in measured)
    equal = abs(losses["live"] - losses["cached"]) < TOLERANCE
    result: dict[str, Any] = {
        "name": "feature_cache",
        "ours": round(cached_seconds, 5),
        "peer": round(live_seconds, 5),
        "unit": "CPU s a sample",
        "ratio": round(live_seconds / cached_seconds, 2),
        "equal": equal,
        "machine": machine(),
        "seconds_a_view": round(view, 5),
        "seconds_a_read": round(read, 7),
        "bytes_a_view": 2 * clip.config.embed_dim + 4,
        "break_even_epochs": {
            str(views): round(views * view / (live_seconds - cached_seconds), 2) for views in VIEWS
        },
    }
    print(
        f"a view {view:.3f} CPU s to build, {1e6 * read:.0f} µs to read; a sample {live_seconds:.3f} live,"
        f" {cached_seconds:.3f} cached; paid after "
        + ", ".join(
            f"{epochs} epochs at K = {views}" for views, epochs in result["break_even_epochs"].items()
        )
    )
    print(json.dumps(result))
    return 0 if equal else 1


def make_cached(reader: BatchReader, cache: FeatureCache | None) -> BatchReader:
    """The same reader with features in place of pictures."""
    other = copy.copy(reader)
    other.features = cache
    return other


if __name__ == "__main__":
    sys.exit(main())
