"""Floating-point operations of a training step, and what devices can do: for planning and for utilisation.

A multiply and an add count as two. The count covers matrix products and convolutions, which are all but a
few percent: per token and block 8 · width² for the projections, 4 · width · feed_forward_width for the
feed-forward (24 · width² together where that is 4 × as wide), and 4 · tokens · width for the two products of
attention (Kaplan et al. 2020, Table 1, with attention). A backward pass costs twice a forward pass.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from training.config.train import TrainConfig
from training.model.config import (
    ModelConfig,
    ModifiedResNetConfig,
    TextConfig,
    VisionTransformerConfig,
)

# Dense peak of a device in its 16-bit format with tensor cores, FLOP/s, by words of its name; the most
# particular name first. From NVIDIA's data sheets.
PEAK_FLOPS: Mapping[str, float] = MappingProxyType(
    {
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H100": 989e12,
        "H200": 989e12,
        "A100": 312e12,
        "V100": 125e12,
        "L40S": 362e12,
        "A10": 125e12,
        "T4": 65e12,
    }
)
MEMORY_GIB: Mapping[str, float] = MappingProxyType(
    {
        "H100 PCIe": 80,
        "H100 NVL": 94,
        "H100": 80,
        "H200": 141,
        "A100": 80,
        "V100": 32,
        "L40S": 48,
        "A10": 24,
        "T4": 16,
    }
)
MUON_ITERATIONS = 5  # Newton-Schulz iterations of each matrix in a step (Jordan et al. 2024)

WITHOUT_BFLOAT16 = ("V100", "T4")  # their tensor cores only know float16


def find_device(name: str) -> str | None:
    """Return the key of PEAK_FLOPS in a device's name ("NVIDIA H100 80GB HBM3" → "H100"), or None.

    Whole words: an A10G is no A10, nor an A1000 an A100.
    """
    words = _words(name)
    return next((key for key in PEAK_FLOPS if set(key.lower().split()) <= set(words)), None)


def device_gib(name: str) -> float:
    """Return a known device's memory, from its name ("A100-SXM4-40GB") or its data sheet."""
    said = re.search(r"\b([1-9]\d*) ?gb\b", " ".join(_words(name)))
    found = find_device(name)
    assert found is not None
    return float(said[1]) if said else MEMORY_GIB[found]


def _words(name: str) -> list[str]:
    return re.split(r"[\s_-]+", name.strip().lower())


def matmul_flops(size: int = 1024) -> float:
    """Return FLOP/s of float32 matrix products on this machine's CPU with torch's threads: the best of a few.

    By processor time, so that other work on the machine does not make its peak look low.
    """
    import time

    import torch

    left, right = torch.rand(size, size), torch.rand(size, size)
    best_seconds = float("inf")
    for _ in range(4):
        started = time.process_time()
        torch.mm(left, right)
        best_seconds = min(best_seconds, (time.process_time() - started) / torch.get_num_threads())
    return 2 * size**3 / best_seconds


def image_forward(model: ModelConfig, patch_mask: float = 0.0) -> float:
    """Return the FLOPs of one image in the image tower; a ViT leaves out `patch_mask` of the patches."""
    config = model.vision
    if isinstance(config, VisionTransformerConfig):
        patches = config.num_patches  # all are embedded, masked or not
        patch_values = 3 * config.patch_size_px**2
        tokens = config.num_kept(patch_mask) + 1
        blocks = config.layers * _block(tokens, config.width, config.feed_forward_width)
        return 2 * patches * patch_values * config.width + blocks + 2 * config.width * model.embed_dim
    return _modified_resnet(config, model.embed_dim)


def text_forward(config: TextConfig, tokens: float) -> float:
    """Return FLOPs of one caption of `tokens` tokens through a text tower.

    The last block is computed only for [CLS]; keys and values are still made of every token there.
    """
    last = 4 * tokens * config.width**2 + 20 * config.width**2 + 4 * tokens * config.width
    return (config.layers - 1) * _block(tokens, config.width, 4 * config.width) + last


def training_flops(model: ModelConfig, config: TrainConfig, tokens: float) -> float:
    """Return FLOPs that one sample needs in a training step; `tokens` is a caption's mean length.

    What is computed twice to save memory (checkpointing, micro-batches) is not counted: it is overhead, not
    work. Nor is a teacher, nor what is learned from statements. A locked tower has no backward pass, and none
    at all if its features are cached.
    """
    flops = 3 * text_forward(model.text, tokens)
    if config.optimizer == "muon":
        flops += muon_step(model, locks_image=config.lock_image) / config.global_batch
    if config.cached_views:
        return flops
    return flops + image_forward(model, config.patch_mask) * (1 if config.lock_image else 3)


def muon_step(model: ModelConfig, *, locks_image: bool) -> float:
    """Return the FLOPs of Muon's own matrix products in a step (`training.engine.muon`)."""
    width = model.text.width
    shapes = [(width, width)] * 4 * model.text.layers + [(width, 4 * width)] * 2 * model.text.layers
    shapes.append((width, model.embed_dim))
    if not locks_image:
        shapes += _image_matrices(model)
    total = 0.0
    for shape in shapes:
        short, long = min(shape), max(shape)
        total += MUON_ITERATIONS * (4 * short**2 * long + 2 * short**3)
    return total


def _image_matrices(model: ModelConfig) -> list[tuple[int, int]]:
    config = model.vision
    if isinstance(config, VisionTransformerConfig):
        width, wide = config.width, config.feed_forward_width
        block = [(3 * width, width), (width, width), (wide, width), (width, wide)]
        return block * config.layers + [(model.embed_dim, width)]
    return [(config.width, config.width)] * 3 + [(model.embed_dim, config.width)]  # attention pooling


def _block(tokens: float, width: int, feed_forward: int) -> float:
    """Return FLOPs of a transformer block over `tokens` tokens."""
    return tokens * (8 * width**2 + 4 * width * feed_forward + 4 * tokens * width)


def _modified_resnet(config: ModifiedResNetConfig, embed_dim: int) -> float:
    """Return FLOPs of OpenAI CLIP's ResNet: a stem of three convolutions, strides, attention pooling."""
    stem = config.width // 32
    side = config.image_size_px // 2
    total = 2 * side**2 * 9 * (3 * stem // 2 + (stem // 2) ** 2 + stem // 2 * stem)
    side //= 2
    incoming = stem
    for stage, blocks in enumerate(config.blocks):
        planes = stem * 2**stage
        for block in range(blocks):
            strided = stage > 0 and block == 0
            outside = side // 2 if strided else side  # pooled after the second convolution
            total += 2 * side**2 * (incoming * planes + 9 * planes**2)
            total += 2 * outside**2 * planes * 4 * planes
            if block == 0:  # the shortcut is pooled too; what is left over at the edge stays
                total += 2 * (-(-side // 2) if strided else side) ** 2 * incoming * 4 * planes
            side, incoming = outside, 4 * planes
    positions = (-(-config.image_size_px // 32)) ** 2 + 1
    # timm makes queries, keys, values and the output of every position, and keeps the first.
    return total + 2 * positions * incoming * (3 * incoming + embed_dim) + 4 * positions**2 * incoming
