"""Estimates how much memory a training stage needs, without importing torch.

docs/concepts/memory.md derives each term and compares the sum with measured peaks.
tests/pipeline/planning/test_memory.py verifies the activations by counting.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from training.config.deepspeed_file import BUCKET_VALUES
from training.config.train import TrainConfig
from training.model.config import (
    ModelConfig,
    ModifiedResNetConfig,
    TextConfig,
    VisionConfig,
    VisionTransformerConfig,
)

Precision = Literal["float32", "autocast", "bfloat16"]

# Bytes kept for the backward pass per token, block and unit of width; for a ResNet, per value of its maps.
_VIT_BYTES: Mapping[Precision, float] = MappingProxyType({"float32": 82, "autocast": 45, "bfloat16": 41})
# Of these, per unit of the feed-forward layers' width: what QuickGELU keeps (its input, a sigmoid and the
# product), and what GELU keeps (its input and its output).
_QUICK_GELU_BYTES: Mapping[Precision, float] = MappingProxyType({"float32": 12, "autocast": 6, "bfloat16": 6})
_GELU_BYTES: Mapping[Precision, float] = MappingProxyType({"float32": 8, "autocast": 4, "bfloat16": 4})
_BERT_BYTES: Mapping[Precision, float] = MappingProxyType({"float32": 76, "autocast": 54, "bfloat16": 40})
_BERT_LAST_BYTES: Mapping[Precision, float] = MappingProxyType(  # in the last block, computed only for [CLS]
    {"float32": 23, "autocast": 22, "bfloat16": 12}
)
_RESNET_BYTES: Mapping[Precision, float] = MappingProxyType({"float32": 8, "autocast": 4, "bfloat16": 4})
_REUSE_DISTANCE = 1e9  # values; DeepSpeed's default stage3_max_reuse_distance and stage3_max_live_parameters
USABLE = 0.9  # share of a device's memory; fragments, workspaces and the driver take the rest
SECONDS_A_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Zero:
    """Where a DeepSpeed file puts a training's states."""

    stage: int = 0
    offloads_optimizer: bool = False  # moments, the float32 copy, and from stage 2 on the gradients
    offloads_weights: bool = False
    most_gathered: float = _REUSE_DISTANCE / 2  # values of weights that ZeRO-3 holds whole at once


@dataclass(frozen=True, slots=True)
class Memory:
    """The peak memory of one rank, in bytes."""

    states: float  # weights, gradients, master weights, moments, buckets, averages of weights
    activations: float
    batch: float  # images, and features with their gradients

    @property
    def total(self) -> float:
        return self.states + self.activations + self.batch


@dataclass(frozen=True, slots=True)
class Shares:
    """The distribution of a global batch over the ranks."""

    smallest: int  # samples of the rank with the fewest
    largest: int
    idle: float  # share of all ranks' time lost by waiting for the largest
    better_ranks: tuple[int, ...]  # nearby rank counts that share evenly; empty if this one does


def num_parameters(model: ModelConfig) -> tuple[int, int]:
    """Return the parameters of the image tower and of the text tower, with projections and temperature."""
    text = model.text
    embeddings = (text.vocab_size + text.max_positions + 2 + 2) * text.width
    blocks = text.layers * (12 * text.width**2 + 13 * text.width)
    ends = text.width * model.embed_dim + 1
    return _vision_parameters(model.vision, model.embed_dim), embeddings + blocks + ends


def memory(
    model: ModelConfig,
    config: TrainConfig,
    *,
    zero: Zero,
    precision: Precision,
    micro_batch: int,
    tokens: int,
) -> Memory:
    """Return the memory of rank 0, the fullest, for `micro_batch` samples with captions of `tokens`."""
    image_parameters, text_parameters = num_parameters(model)
    all_parameters = image_parameters + text_parameters
    trained = text_parameters if config.lock_image else all_parameters
    weight_bytes = 2 if precision == "bfloat16" else 4
    ranks = config.ranks
    weights = weight_bytes * all_parameters / (ranks if zero.stage >= 3 else 1)
    gathered = weight_bytes * min(all_parameters, zero.most_gathered) if zero.stage >= 3 else 0
    share = shares(config).largest
    adds_up = 4 if precision == "bfloat16" and micro_batch < share else 0  # over micro-batches, in float32
    gradients = (weight_bytes + adds_up) * trained / (ranks if zero.stage >= 2 else 1)
    optimizer = 8 * trained if zero.stage == 0 else 12 * trained / ranks
    if zero.offloads_weights:
        weights = 0
    if zero.offloads_optimizer:
        optimizer, gradients = 0, gradients if zero.stage < 2 else 0
    buckets = (2 if precision == "autocast" else 1) if zero.stage else 0  # one per type of gradients
    if ranks > 1 and zero.stage in (1, 2) and not zero.offloads_optimizer:
        buckets *= 2  # one is sent while the other fills
    bucket = buckets * weight_bytes * min(BUCKET_VALUES, trained)
    averages = 0 if config.averages is None else 4 * trained * config.averages.num_running  # by rank 0
    side_px = model.vision.image_size_px
    images = 0 if config.cached_views else 2 * 3 * side_px**2 * share  # the next batch's lie there already
    features = 4 * model.embed_dim * (4 * config.global_batch + 4 * share)
    per_sample = _image_activations(model.vision, config, precision) + _text_activations(
        model.text, config, precision, tokens
    )
    return Memory(
        states=weights + gathered + gradients + optimizer + bucket + averages,
        activations=micro_batch * per_sample,
        batch=images + features,
    )


def largest_micro_batch(needs: Callable[..., Memory], share: int, memory_bytes: float) -> int:
    """Return the most samples whose activations fit: the whole share, or a power of two; 0 if none fit.

    `needs` returns the Memory of a `micro_batch`.
    """
    sizes = [share, *(2**power for power in range(share.bit_length(), -1, -1) if 2**power < share)]
    return next((size for size in sizes if needs(micro_batch=size).total <= USABLE * memory_bytes), 0)


def shares(config: TrainConfig) -> Shares:
    """Return the samples of each rank, which are whole lanes, so that counts may differ by one lane."""
    a_lane = config.global_batch // config.num_lanes
    smallest = config.num_lanes // config.ranks * a_lane
    largest = -(-config.num_lanes // config.ranks) * a_lane
    idle = 1 - config.global_batch / config.ranks / largest
    if config.global_batch % config.ranks == 0 and smallest == largest:
        return Shares(smallest, largest, 0.0, ())
    even = [ranks for ranks in range(1, config.num_lanes + 1) if config.num_lanes % ranks == 0]
    below = [ranks for ranks in even if ranks < config.ranks]
    above = [ranks for ranks in even if ranks > config.ranks]
    return Shares(smallest, largest, idle, (*below[-1:], *above[:1]))


def zero_of(settings: Mapping[str, Any]) -> Zero:
    """Return where the content of a DeepSpeed file puts the states."""
    found = settings.get("zero_optimization", {})
    stage = int(found.get("stage", 0))
    gathered = min(
        found.get("stage3_max_reuse_distance", _REUSE_DISTANCE) / 2,
        found.get("stage3_max_live_parameters", _REUSE_DISTANCE),
    )

    def offloads(what: str, from_stage: int) -> bool:
        device = (found.get(f"offload_{what}") or {}).get("device", "none")
        return stage >= from_stage and device != "none"

    return Zero(stage, offloads("optimizer", 1), offloads("param", 3), gathered)


def precision_of(settings: Mapping[str, Any]) -> Precision:
    """Return the precision of a DeepSpeed file's content; float16 needs the same memory as bfloat16."""
    if any(settings.get(key, {}).get("enabled") for key in ("bf16", "fp16")):
        return "bfloat16"
    return "autocast" if settings.get("torch_autocast", {}).get("enabled") else "float32"


def _image_activations(config: VisionConfig, train: TrainConfig, precision: Precision) -> float:
    """Return the bytes that the image tower keeps per sample."""
    if train.cached_views:
        return 0
    if isinstance(config, VisionTransformerConfig):
        tokens = config.num_kept(train.patch_mask) + 1
        values, block_bytes = tokens * config.width, _vit_block_bytes(config, precision)
        return _transformer(config.layers, values, block_bytes, train.lock_image, train)
    whole = _RESNET_BYTES[precision] * _resnet_values(config)
    return whole / 8 if train.lock_image else whole  # the widest maps, in the stem, are an eighth


def _vit_block_bytes(config: VisionTransformerConfig, precision: Precision) -> float:
    """Return the bytes that a ViT's block keeps per token and unit of width."""
    quick = _QUICK_GELU_BYTES[precision]
    own = quick if config.activation == "quick_gelu" else _GELU_BYTES[precision]
    return _VIT_BYTES[precision] - 4 * quick + own * config.feed_forward_width / config.width


def _text_activations(config: TextConfig, train: TrainConfig, precision: Precision, tokens: int) -> float:
    values = tokens * config.width
    whole = _transformer(config.layers - 1, values, _BERT_BYTES[precision], False, train)
    return whole + _BERT_LAST_BYTES[precision] * values


def _transformer(layers: int, values: int, block_bytes: float, locked: bool, train: TrainConfig) -> float:
    if locked:
        return block_bytes * values
    if train.checkpoint_activations:
        return (4 * layers + block_bytes) * values  # each block's input in float32
    return layers * block_bytes * values


def _vision_parameters(config: VisionConfig, embed_dim: int) -> int:
    if isinstance(config, VisionTransformerConfig):
        width, patches = config.width, (config.image_size_px // config.patch_size_px) ** 2
        ends = (3 * config.patch_size_px**2 + 1 + patches + 1 + 4 + embed_dim) * width
        between = config.feed_forward_width
        return ends + config.layers * (4 * width**2 + 2 * width * between + 9 * width + between)
    stem = config.width // 32
    half = stem // 2
    total = 9 * (3 * half + half * half + half * stem) + 2 * (half + half + stem)
    incoming = stem
    for stage, blocks in enumerate(config.blocks):
        planes = stem * 2**stage
        for block in range(blocks):
            total += incoming * planes + 9 * planes**2 + 4 * planes**2 + 2 * (planes + planes + 4 * planes)
            if block == 0:
                total += incoming * 4 * planes + 8 * planes
            incoming = 4 * planes
    positions = (config.image_size_px // 32) ** 2 + 1
    return total + positions * incoming + 3 * (incoming**2 + incoming) + incoming * embed_dim + embed_dim


def _resnet_values(config: ModifiedResNetConfig) -> int:
    """Return the number of values in all feature maps of one image."""
    stem, side = config.width // 32, config.image_size_px // 2
    total = side**2 * 2 * stem
    side //= 2
    total += side**2 * stem
    for stage, blocks in enumerate(config.blocks):
        planes = stem * 2**stage
        for block in range(blocks):
            first, strided = block == 0, block == 0 and stage > 0
            outside = side // 2 if strided else side
            total += side**2 * 2 * planes + outside**2 * (4 + strided + 4 * first) * planes
            side = outside
    return total
