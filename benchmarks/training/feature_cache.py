"""Measure stage 1 on cached features: what the cache costs to build, and when it has paid.

    python benchmarks/training/feature_cache.py           # ViT-B/16 with RoBERTa-base, 8 images; one thread
    python benchmarks/training/feature_cache.py --full    # more rounds

Measured for each image, in CPU seconds: decoding, augmenting and embedding it once (K views cost K times
that), reading one cached feature with its check, and a training step's share with images (live) and with
features (cached); captions have lengths like Flickr30K-CN's. The cache has paid after
K · view / (live - cached) epochs; a run of fewer is quicker live. `equal` says that a step on cached features
has the loss of the live step on the same views to 2e-3.

There is no --device: on a GPU the steps are `train_step/live` and `train_step/cached` of train_step.py and a
view's embedding is `encode/image` of encode.py; its decoding and augmenting stay on the CPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tempfile
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch

from benchmarks.harness import in_turns, medians, parse, parser, record, report
from benchmarks.training.image_path import draw_jpegs, make_source, read
from benchmarks.training.step_models import make_tokens
from pipeline.core.records import Shard
from training.config.train import AugmentConfig, TrainConfig
from training.data.feature_cache import FeatureCache, build, cache_key
from training.data.loader import Batch
from training.data.views import ViewReader
from training.engine.towers import Towers
from training.model.clip import build_clip
from training.model.config import VIT_B_16

NUM_IMAGES, TOLERANCE = 8, 2e-3
VIEWS = (1, 4, 8)


def main() -> int:
    options = parse(parser(__doc__, rounds=(2, 5)))
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(0)
    clip = build_clip(VIT_B_16)
    clip.lock_image_tower()
    for module in clip.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = TrainConfig(epochs=1, global_batch=NUM_IMAGES, lanes=1, lock_image=True)
    towers = Towers(clip.train(), num_samples_of_ranks=(NUM_IMAGES,), config=config)
    tokens_BL = make_tokens(NUM_IMAGES, clip.config.text.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(Path(folder), draw_jpegs()[:NUM_IMAGES])
        reader = source.reader
        tar = Path(folder) / "00000.tar"
        shard = Shard(str(tar), NUM_IMAGES, tar.stat().st_size, "0" * 64)
        key = cache_key(
            clip.visual, AugmentConfig(), image_size_px=224, seed=0, num_views=1, dtype=torch.float32
        )
        cache = FeatureCache([shard], key, num_views=1, dim=clip.config.embed_dim)

        def encode(image_BCHW: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return towers.encode_image(image_BCHW)

        def views() -> Iterator[torch.Tensor]:
            image_BHWC = np.empty((NUM_IMAGES, 224, 224, 3), np.uint8)
            ViewReader(source.views).read(reader.visits(0, range(NUM_IMAGES)), image_BHWC)
            yield torch.from_numpy(image_BHWC).permute(0, 3, 1, 2)

        def build_once() -> None:
            build(cache, [0], views(), encode, lambda *_: None, lambda: False)

        build_once()

        def live() -> Batch:
            reader.features = None
            return reader.request(0).finish(read(source, 0))

        def cached() -> Batch:
            reader.features = cache
            request = reader.request(0)
            assert request.ready is not None
            return request.finish(torch.from_numpy(request.ready))

        assert live().image.ndim == 4
        assert cached().image.ndim == 2
        losses: dict[str, float] = {}

        def step(name: str, batch: Batch) -> None:
            loss = towers.loss(towers(batch.image, tokens_BL), batch)
            loss.backward()  # type: ignore[no-untyped-call]
            losses[name] = loss.item()

        measured: dict[str, Callable[[], object]] = {
            "view": build_once,
            "read": cached,
            "live": lambda: step("live", live()),
            "cached": lambda: step("cached", cached()),
        }
        taken = medians(in_turns(measured, options.rounds))
    view, reading, live_seconds, cached_seconds = (taken[name] / NUM_IMAGES for name in measured)
    result = record(
        "feature_cache",
        ours=cached_seconds,
        peer=live_seconds,
        unit="CPU s a sample",
        equal=abs(losses["live"] - losses["cached"]) < TOLERANCE,
        seconds_a_view=round(view, 5),
        seconds_a_read=round(reading, 7),
        bytes_a_view=2 * clip.config.embed_dim,
        break_even_epochs={
            str(views): round(views * view / (live_seconds - cached_seconds), 2) for views in VIEWS
        },
    )
    print(
        f"a view {view:.3f} CPU s to build, {1e6 * reading:.0f} µs to read; a sample {live_seconds:.3f} live,"
        f" {cached_seconds:.3f} cached; paid after "
        + ", ".join(
            f"{epochs} epochs at K = {views}" for views, epochs in result["break_even_epochs"].items()
        )
    )
    return report(result)


if __name__ == "__main__":
    sys.exit(main())
