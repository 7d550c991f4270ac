"""Computes what a training needs on given devices for `cnclip plan`: steps, micro-batch, memory and days."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from pipeline.core.records import ConfigError
from pipeline.core.run import Run, read_manifest
from pipeline.planning.memory import (
    USABLE,
    Memory,
    Precision,
    Shares,
    Zero,
    largest_micro_batch,
    memory,
    precision_of,
    shares,
    zero_of,
)
from pipeline.planning.speed import (
    Feed,
    Step,
    Wire,
    bandwidth_of,
    cache_days,
    feed,
    gpu_days,
    step,
    suitable_ranks,
    utilisation,
    wire,
)
from training.config.deepspeed_file import computes_in_bfloat16, read_deepspeed_file
from training.config.recipes import (
    STAGES,
    finetune_recipe,
    finetuned_data,
    larger_models,
    larger_recipe,
    paper_recipe,
    pretrained_stages,
)
from training.config.train import TrainConfig, sized
from training.flops import PEAK_FLOPS, WITHOUT_BFLOAT16, device_gib, find_device
from training.model.config import MODELS, ModelConfig
from training.stages import TrainStageConfig

RECIPES = ("pretrain", "finetune", "larger")
PAPER_PAIRS = 200_000_000  # section 2.2
# Cards × days in the paper (A.2): V100 except for ViT-L-14-336 and ViT-H-14 (A100).
_PAPER_GPU_DAYS: Mapping[tuple[str, str], float] = MappingProxyType(
    {
        ("RN50", "stage1"): 64 * 1.6,
        ("RN50", "stage2"): 64 * 5.8,
        ("ViT-B-16", "stage1"): 128 * 4.5,
        ("ViT-B-16", "stage2"): 128 * 3.0,
        ("ViT-L-14", "stage1"): 128 * 11.5,
        ("ViT-L-14", "stage2"): 128 * 8.0,
        ("ViT-L-14-336", "stage2"): 128 * 0.7,
        ("ViT-H-14", "stage1"): 184 * 3.8,
        ("ViT-H-14", "stage2"): 184 * 2.2,
    }
)
# What determines the computation, in addition to the samples.
_WORK = ("epochs", "global_batch", "lock_image", "image_size_px", "context_length", "patch_mask")
# Training pairs of the tasks if their owners publish them; for others --samples must give the number.
TASK_PAIRS = {"muge": 250_314, "flickr30k-cn": 148_915}
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The hardware assumptions of a plan."""

    name: str
    flops_per_second: float  # of one device: its peak times `utilisation`
    memory_bytes: float
    utilisation: float  # of its peak, while it computes
    has_bfloat16: bool  # in its tensor cores
    bandwidth: float | None = None  # bytes/s of a rank's collectives; unset: by the number of ranks

    @property
    def peak_flops(self) -> float:
        """Return FLOP/s at full utilisation."""
        return self.flops_per_second / self.utilisation

    @property
    def usable_gib(self) -> float:
        """Return the memory that a plan uses; fragments, workspaces and the driver take the rest."""
        return USABLE * self.memory_bytes / GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One training in a plan."""

    model: str  # key of training.model.config.MODELS
    name: str  # stage1, stage2, or the data set of a finetuning
    config: TrainConfig
    num_samples: int | None  # None: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """The requirements of a training on given hardware."""

    shares: Shares
    micro_batch: int  # the run's; if unset, the largest that fits; 0 if none fits
    fitting: int  # the largest that fits; 0 if none fits
    memory_gib: float  # of a rank with that micro-batch, or with one sample
    share_gib: float  # of a rank that holds its whole share at once
    sample_gib: float  # of a rank that holds one sample at once
    in_bfloat16: bool  # whether matrix products run in bfloat16
    num_steps: int | None  # None: unknown number of samples
    gpu_days: float | None  # including the computation of cached features
    step: Step
    wire: Wire
    feed: Feed
    utilisation: float  # of the peak, with everything that devices wait for
    suitable_ranks: int  # the most that still use the devices well


def hardware(
    name: str, utilisation: float, memory_gib: float | None, network_gb: float | None = None
) -> Hardware:
    """Return a known device.

    Raises:
        ConfigError: if the device is unknown or a number is impossible.
    """
    found = find_device(name)
    if found is None:
        raise ConfigError(f"--hardware {name}: unknown device; known: {', '.join(PEAK_FLOPS)}")
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation {utilisation}: must be greater than 0 and at most 1")
    if memory_gib is not None and not (math.isfinite(memory_gib) and memory_gib > 0):
        raise ConfigError(f"--memory {memory_gib}: must be greater than 0 GiB")
    if network_gb is not None and not (math.isfinite(network_gb) and network_gb > 0):
        raise ConfigError(f"--network {network_gb}: must be greater than 0 GB/s")
    return Hardware(
        name=found,
        flops_per_second=PEAK_FLOPS[found] * utilisation,
        memory_bytes=(memory_gib or device_gib(name)) * GIB,
        utilisation=utilisation,
        has_bfloat16=found not in WITHOUT_BFLOAT16,
        bandwidth=None if network_gb is None else network_gb * 1e9,
    )


def trainings_of_recipe(recipe: str, num_samples: int | None) -> list[Training]:
    """Return every model and stage of pretrain.toml or larger.toml, or model and data set of finetune.toml.

    `num_samples` does not apply to sets with a published number of pairs, on which Table 9 bases its epochs.
    """
    if recipe == "finetune":
        return [
            Training(
                model=model,
                name=data,
                config=finetune_recipe(model, data),
                num_samples=TASK_PAIRS.get(data, num_samples),
            )
            for model in MODELS
            for data in finetuned_data(model)
        ]
    pairs = num_samples or PAPER_PAIRS
    if recipe == "larger":
        return [
            Training(model=model, name=stage, config=larger_recipe(model, stage), num_samples=pairs)
            for model in larger_models()
            for stage in STAGES
        ]
    return [
        Training(model=model, name=stage, config=paper_recipe(model, stage), num_samples=pairs)
        for model in MODELS
        for stage in pretrained_stages(model)
    ]


def trainings_of_run(run: Run, num_samples: int | None) -> list[Training]:
    """Return the training stages of a run, with the samples of its shards if these are finished."""
    manifest = read_manifest(run, "shards")
    known = num_samples or (manifest.num_kept if manifest is not None else None)
    return [
        Training(model=stage.config.model, name=stage.name, config=stage.config.train, num_samples=known)
        for stage in run.stages
        if isinstance(stage.config, TrainStageConfig)
    ]


def paper_gpu_days(item: Training) -> float | None:
    """Return the paper's GPU-days for this training; None if its settings are not the paper's."""
    for stage in pretrained_stages(item.model):
        if stage == item.name and item.num_samples == PAPER_PAIRS:
            recipe = paper_recipe(item.model, stage)
            differs = any(getattr(recipe, name) != getattr(item.config, name) for name in _WORK)
            return None if differs else _PAPER_GPU_DAYS[item.model, stage]
    return None


def need(item: Training, on: Hardware, tokens: int) -> Need:
    """Return the requirements of one training; `tokens` is the mean caption length with [CLS] and [SEP]."""
    config, split = item.config, shares(item.config)
    model = sized(MODELS[item.model], config)
    settings = read_deepspeed_file(config.deepspeed)
    plan = _Plan(
        model, config, zero_of(settings), precision_of(settings), on, min(tokens, config.context_length)
    )
    micro_batch, found = plan.micro_batch, plan.step
    num_steps = days = None
    if item.num_samples is not None:
        num_steps = config.epochs * item.num_samples // config.global_batch
        days = gpu_days(config, found, num_steps) + cache_days(
            model, config, num_samples=item.num_samples, flops_per_second=on.flops_per_second
        )
    return Need(
        shares=split,
        micro_batch=micro_batch,
        fitting=plan.fitting,
        memory_gib=plan.gib(max(1, micro_batch)),
        share_gib=plan.gib(split.largest),
        sample_gib=plan.gib(1),
        in_bfloat16=computes_in_bfloat16(settings),
        num_steps=num_steps,
        gpu_days=days,
        step=found,
        wire=wire(model, config, zero=plan.zero, precision=plan.precision),
        feed=feed(model, config, found),
        utilisation=plan.utilisation,
        suitable_ranks=suitable_ranks(config, lambda ranks: plan.on_ranks(ranks).utilisation),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """One training on a number of ranks."""

    model: ModelConfig
    config: TrainConfig
    zero: Zero
    precision: Precision
    on: Hardware
    tokens: int  # of a caption on average

    def on_ranks(self, ranks: int) -> "_Plan":
        return replace(self, config=replace(self.config, ranks=ranks))

    def gib(self, micro_batch: int) -> float:
        return self._memory(micro_batch=micro_batch).total / GIB

    def _memory(self, micro_batch: int) -> Memory:
        return memory(
            self.model,
            self.config,
            zero=self.zero,
            precision=self.precision,
            micro_batch=micro_batch,
            tokens=self.config.context_length,  # the longest captions determine the peak
        )

    @property
    def fitting(self) -> int:
        return largest_micro_batch(self._memory, shares(self.config).largest, self.on.memory_bytes)

    @property
    def micro_batch(self) -> int:
        return min(self.config.micro_batch or self.fitting, shares(self.config).largest)

    @property
    def step(self) -> Step:
        return step(
            self.model,
            self.config,
            zero=self.zero,
            precision=self.precision,
            micro_batch=self.micro_batch,
            flops_per_second=self.on.flops_per_second,
            bandwidth=bandwidth_of(self.config.ranks, self.on.bandwidth),
            tokens=self.tokens,
        )

    @property
    def utilisation(self) -> float:
        return utilisation(
            self.model, self.config, self.step, peak_flops=self.on.peak_flops, tokens=self.tokens
        )
