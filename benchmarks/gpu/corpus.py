"""Measure encoding a corpus, images a second from a shard's tar to features, and exact search among them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import functools
import tempfile
import time

import numpy as np
import torch

from benchmarks.gpu.common import DEVICE, IS_CUDA, PEAK, median_seconds, peak_gib, result, wait
from benchmarks.training.encode_corpus import features, shard_of
from eval.index.gpu_search import nearest
from training.data.squares import ImageRange, SquareConfig
from training.flops import image_forward
from training.image_encoder import ImageEncoder, Precision, can_compile
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS
from training.model.preprocess import standardise

RUNS: tuple[tuple[str, Precision], ...] = (
    (("ViT-B-16", "bf16"), ("ViT-B-16", "float32"), ("ViT-L-14", "bf16"))
    if IS_CUDA
    else (("tiny-vit", "bf16"), ("tiny-vit", "float32"))
)
BATCH = 512 if IS_CUDA else 64
NUM_IMAGES = 16_384 if IS_CUDA else 512  # as many as workers are started for
ROWS, QUERIES, DIM, K = (1_000_000, 1000, 512, 100) if IS_CUDA else (3000, 20, 64, 10)


def main() -> int:
    is_right = True
    with tempfile.TemporaryDirectory() as folder:
        images = shard_of(Path(folder), NUM_IMAGES)
        for name, precision in RUNS:
            torch.manual_seed(0)
            is_right &= measure(build_clip(MODELS[name]).eval().to(DEVICE), precision, images)
    is_right &= search()
    return 0 if is_right else 1


def encoder_of(clip: CLIP, precision: Precision, *, compiled: bool) -> ImageEncoder:
    """Return what encodes; `embed --shards` compiles where it can."""
    return ImageEncoder(
        functools.partial(clip.encode_image, compiled=compiled),
        SquareConfig(image_size_px=clip.config.vision.image_size_px),
        DEVICE,
        embed_dim=clip.config.embed_dim,
        precision=precision,
        fixed_batches=compiled,
    )


def measure(clip: CLIP, precision: Precision, images: list[ImageRange]) -> bool:
    """Measure one model, and return whether its features are near those of float32, uncompiled."""
    some = images[:BATCH]
    exact_ND = features(encoder_of(clip, "float32", compiled=False), some, BATCH)
    encoder = encoder_of(clip, precision, compiled=can_compile(clip.visual, DEVICE))
    side = clip.config.vision.image_size_px
    peak_gib(reset=True)
    found_ND = features(encoder, images, BATCH)[: len(exact_ND)]  # starts the workers, and compiles
    wait()
    start = time.perf_counter()
    features(encoder, images, BATCH)
    rate = len(images) / (time.perf_counter() - start)
    image_BCHW = torch.zeros(BATCH, 3, side, side, dtype=torch.uint8, device=DEVICE)
    alone = BATCH / median_seconds(lambda: encoder.encode_pixels(standardise(image_BCHW)))
    off = float(np.abs(found_ND - exact_ND).max())
    result(
        "encode corpus",
        model=clip.config.name,
        precision=precision,
        images_per_s=rate,
        images_per_s_without_decoding=alone,
        workers=torch.get_num_threads(),
        mfu=rate * image_forward(clip.config) / PEAK,
        mfu_without_decoding=alone * image_forward(clip.config) / PEAK,
        peak_gib=peak_gib(),
        largest_difference_from_float32=off,
    )
    return off < (0.03 if precision == "bf16" else 1e-5)


def search() -> bool:
    """Measure exact search, and return whether a full sort in float64 finds the same rows."""
    random = np.random.default_rng(0)
    rows_ND, query_QD = (random.normal(size=(count, DIM)).astype(np.float32) for count in (ROWS, QUERIES))
    for some in (rows_ND, query_QD):
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    blocks = np.array_split(rows_ND, 4)
    _, found_QK = nearest(query_QD, blocks, K, DEVICE)
    wait()
    start = time.perf_counter()
    nearest(query_QD, blocks, K, DEVICE)
    taken = time.perf_counter() - start
    score_QN = query_QD[:10].astype(np.float64) @ rows_ND.T.astype(np.float64)
    is_right = np.array_equal(found_QK[:10], np.argsort(-score_QN, axis=1, kind="stable")[:, :K])
    result("exact search", rows=ROWS, queries=QUERIES, k=K, queries_per_s=QUERIES / taken, equal=is_right)
    return bool(is_right)


if __name__ == "__main__":
    sys.exit(main())
