"""Computes what a training needs on given devices for `cnclip plan`: steps, micro-batch, memory and days."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pipeline.core.records import ConfigError
from pipeline.core.run import Run, read_manifest
from pipeline.planning.memory import (
    USABLE,
    Shares,
    cache_days,
    gpu_days,
    largest_micro_batch,
    memory,
    precision_of,
    shares,
    zero_of,
)
from training.config.deepspeed_file import computes_in_bfloat16, read_deepspeed_file
from training.config.recipes import finetune_recipe, finetuned_data, paper_recipe, pretrained_stages
from training.config.train import TrainConfig, sized
from training.flops import PEAK_FLOPS, WITHOUT_BFLOAT16, device_gib, find_device
from training.model.config import MODELS
from training.stages import TrainStageConfig

RECIPES = ("pretrain", "finetune")
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
_WORK = ("epochs", "global_batch", "lock_image", "image_size_px", "context_length", "patch_mask", "phases")
# determines the computation, in addition to the samples
# Training pairs of the tasks if their owners publish them; for others --samples must give the number.
TASK_PAIRS = {"muge": 250_314, "flickr30k-cn": 148_915}
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The hardware assumptions of a plan."""

    name: str
    flops_per_second: float  # of one device: its peak times `utilisation`
    memory_bytes: float
    utilisation: float
    has_bfloat16: bool  # in its tensor cores

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


def hardware(name: str, utilisation: float, memory_gib: float | None) -> Hardware:
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
    return Hardware(
        name=found,
        flops_per_second=PEAK_FLOPS[found] * utilisation,
        memory_bytes=(memory_gib or device_gib(name)) * GIB,
        utilisation=utilisation,
        has_bfloat16=found not in WITHOUT_BFLOAT16,
    )


def trainings_of_recipe(recipe: str, num_samples: int | None) -> list[Training]:
    """Return every model and stage of pretrain.toml, or every model and data set of finetune.toml.

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
    needs = functools.partial(
        memory,
        model,
        config,
        zero=zero_of(settings),
        precision=precision_of(settings),
        tokens=config.context_length,  # the longest captions determine the peak
    )

    def gib(micro_batch: int) -> float:
        return needs(micro_batch=micro_batch).total / GIB

    fitting = largest_micro_batch(needs, split.largest, on.memory_bytes)
    micro_batch = min(config.micro_batch or fitting, split.largest)
    num_steps = days = None
    if item.num_samples is not None:
        num_steps = config.epochs * item.num_samples // config.global_batch
        days = gpu_days(
            model,
            config,
            num_steps=num_steps,
            micro_batch=micro_batch,
            flops_per_second=on.flops_per_second,
            tokens=min(tokens, config.context_length),
        ) + cache_days(model, config, num_samples=item.num_samples, flops_per_second=on.flops_per_second)
    return Need(
        shares=split,
        micro_batch=micro_batch,
        fitting=fitting,
        memory_gib=gib(max(1, micro_batch)),
        share_gib=gib(split.largest),
        sample_gib=gib(1),
        in_bfloat16=computes_in_bfloat16(settings),
        num_steps=num_steps,
        gpu_days=days,
    )
