"""Estimates a training step on many devices: its computing, its bytes on the network, what hides behind what.

docs/scale.md derives each term and says which numbers are assumed. No import of torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.planning.memory import SECONDS_A_DAY, Precision, Zero, num_parameters, shares
from training.config.deepspeed_file import BUCKET_VALUES
from training.config.train import TrainConfig
from training.flops import image_forward, text_forward, training_flops
from training.model.config import ModelConfig, VisionTransformerConfig

# Assumed (docs/scale.md)
HOST_SECONDS_A_LAYER = 2.2e-3  # of the process that launches a layer's kernels, forward and backward
NETWORKS = {
    "one node": 350e9,
    "several": 45e9,
}  # bytes/s of collectives for a rank: NVLink, 400 Gbit/s a node
RANKS_OF_A_NODE = 8
# Measured by this repository's benchmarks (benchmarks/results/feeding.json, cached_reading.json, scale.json).
IMAGES_A_CORE = 742.0  # decoded and augmented, per second
CACHED_SAMPLES_A_CORE = 301_708.0  # read, per second
IMAGE_BYTES = 55_857.0  # of a stored image with its caption, 256 px
_TOKEN_BYTES = 90  # of a cached sample: its tokens' ids and its key
SUITS = 0.9  # of the utilisation that few ranks reach: a number of ranks with less does not suit


@dataclass(frozen=True, slots=True)
class Wire:
    """The bytes that one rank sends in a step, by ring algorithms."""

    gradients: float
    weights: float  # gathered after the optimizer's step; at ZeRO 3, while both passes compute
    features: float  # and their gradients, and log-sum-exps
    last_bucket: float  # of the gradients: nothing is left to compute while it travels
    hides_gradients: bool  # they travel while the backward pass computes
    hides_weights: bool

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.features


@dataclass(frozen=True, slots=True)
class Step:
    """The seconds of one optimizer step of the rank with the most samples."""

    device: float  # in which a device computes
    host: float  # in which a process launches kernels, at the same time
    hidden: float  # on the network while the devices compute
    exposed: float  # on the network while they wait

    @property
    def total(self) -> float:
        return max(self.device, self.host) + self.exposed


@dataclass(frozen=True, slots=True)
class Feed:
    """What one rank reads while it trains."""

    samples_a_second: float
    cores: float  # that decode and augment, or read cached features
    bytes_a_second: float


def device_flops(model: ModelConfig, config: TrainConfig, *, micro_batch: int, tokens: float) -> float:
    """Return FLOPs that a sample costs a device, those that are computed twice included.

    Micro-batches and checkpointing each add one forward pass of the trained towers. `tokens` is a caption's
    mean length.
    """
    again = int(config.checkpoint_activations) + int(micro_batch < shares(config).largest)
    forward = text_forward(model.text, tokens)
    if not config.lock_image:
        forward += image_forward(model, config.patch_mask)
    return training_flops(model, config, tokens) + again * forward


def wire(model: ModelConfig, config: TrainConfig, *, zero: Zero, precision: Precision) -> Wire:
    """Return what one rank sends in a step.

    A ring sends (R - 1) / R of the bytes to gather or to scatter them, and twice that to add them up on all
    R ranks. DeepSpeed adds up gradients on all ranks below ZeRO 3, where it scatters them; from ZeRO 1 on
    every rank gathers the weights that the others have stepped. ZeRO 3 gathers them in each pass.
    """
    ring = (config.ranks - 1) / config.ranks
    image, text = num_parameters(model)
    trained = text if config.lock_image else image + text
    words = (model.text.vocab_size + model.text.max_positions) * model.text.width
    half = precision == "bfloat16"
    # Autocast sends the gradients of matrices in bfloat16, those of embeddings in float32.
    gradients = {"float32": 4 * trained, "autocast": 2 * trained + 2 * words, "bfloat16": 2 * trained}[
        precision
    ]
    weights = (2 if half else 4) * (image + text if zero.stage == 3 else trained)
    passes = 2 + int(config.checkpoint_activations) if zero.stage == 3 else 1
    columns = 4 * config.global_batch * model.embed_dim * (1 if config.lock_image else 2)
    return Wire(
        gradients=ring * gradients * (1 if zero.stage == 3 else 2),
        weights=ring * weights * passes if zero.stage else 0.0,
        features=ring * (columns + 2 * 2 * 4 * config.global_batch),
        last_bucket=ring * 2 * gradients * min(1.0, BUCKET_VALUES / trained),
        hides_gradients=zero.stage > 0 and not zero.offloads_optimizer,
        hides_weights=zero.stage == 3,
    )


def bandwidth_of(ranks: int, given: float | None) -> float:
    """Return bytes/s of a rank's collectives: what is given, else that of one node or of several."""
    if given is not None:
        return given
    return NETWORKS["one node" if ranks <= RANKS_OF_A_NODE else "several"]


def step(
    model: ModelConfig,
    config: TrainConfig,
    *,
    zero: Zero,
    precision: Precision,
    micro_batch: int,
    flops_per_second: float,
    bandwidth: float,
    tokens: float,
) -> Step:
    """Return the seconds of a step.

    The host launches while the device computes, so that the slower of both counts; two thirds of a step are
    backward, behind which gradients hide. Every rank takes as long as the one with the most samples.
    """
    share = shares(config).largest
    device = share * device_flops(model, config, micro_batch=micro_batch, tokens=tokens) / flops_per_second
    parts = -(-share // max(1, micro_batch))
    launches = _layers(model, config) * (1.0 if parts == 1 else parts * 4 / 3)
    host = HOST_SECONDS_A_LAYER * launches
    busy = max(device, host)
    sent = wire(model, config, zero=zero, precision=precision)
    hidden = 0.0
    if sent.hides_gradients:
        hidden += min(2 / 3 * busy, max(0.0, sent.gradients - sent.last_bucket) / bandwidth)
    if sent.hides_weights:
        hidden += min(busy - hidden, sent.weights / bandwidth)
    return Step(device, host, hidden, sent.total / bandwidth - hidden)


def _layers(model: ModelConfig, config: TrainConfig) -> float:
    """Return layers that the host launches forward and backward; forward only is a third of one."""
    vision = model.vision
    image = vision.layers if isinstance(vision, VisionTransformerConfig) else sum(vision.blocks)
    return model.text.layers + (0 if config.cached_views else image / 3 if config.lock_image else image)


def utilisation(
    model: ModelConfig, config: TrainConfig, found: Step, *, peak_flops: float, tokens: float
) -> float:
    """Return the share of all ranks' peak that a step uses for what has to be computed once."""
    useful = config.global_batch * training_flops(model, config, tokens)
    return useful / (config.ranks * found.total * peak_flops)


def gpu_days(config: TrainConfig, found: Step, num_steps: int) -> float:
    """Return the device days of all ranks together."""
    return found.total * config.ranks * num_steps / SECONDS_A_DAY


def cache_days(
    model: ModelConfig, config: TrainConfig, *, num_samples: int, flops_per_second: float
) -> float:
    """Return the device days for computing `cached_views` features of every image."""
    flops = config.cached_views * num_samples * image_forward(model)
    return flops / flops_per_second / SECONDS_A_DAY


def feed(model: ModelConfig, config: TrainConfig, found: Step) -> Feed:
    """Return what a rank reads: stored images, or with `cached_views` features in float16 and tokens."""
    rate = shares(config).largest / found.total
    if config.cached_views:
        return Feed(rate, rate / CACHED_SAMPLES_A_CORE, rate * (2 * model.embed_dim + 4 + _TOKEN_BYTES))
    return Feed(rate, rate / IMAGES_A_CORE, rate * IMAGE_BYTES)


def suitable_ranks(config: TrainConfig, used_at: Callable[[int], float]) -> int:
    """Return the most ranks that share the lanes evenly and use their devices well (SUITS).

    `used_at` returns the utilisation on a number of ranks.
    """
    even = [ranks for ranks in range(1, config.num_lanes + 1) if config.num_lanes % ranks == 0]
    used = {ranks: used_at(ranks) for ranks in even}
    enough = SUITS * max(used.values())
    return max(ranks for ranks in even if used[ranks] >= enough)
