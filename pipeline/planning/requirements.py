"""Computes what a training needs on given devices for `cnclip plan`: steps, micro-batch, memory and days."""

import math
from collections.abc import Mapping, Sequence
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
from training.config.phases import with_phases
from training.config.recipes import (
    STAGES,
    fast_models,
    fast_recipe,
    finetune_recipe,
    finetuned_data,
    larger_models,
    larger_recipe,
    paper_recipe,
    pretrained_stages,
)
from training.config.train import TrainConfig, sized
from training.flops import PEAK_FLOPS, WITHOUT_BFLOAT16, device_gib, find_device, training_flops
from training.model.config import MODELS, ModelConfig
from training.stages import TrainStageConfig

RECIPES = ("pretrain", "finetune", "larger", "fast")
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
class Sum:
    """What all trainings of a model by one recipe need together."""

    model: str
    recipe: str  # fast or paper
    num_steps: int
    samples: int  # seen, an epoch's each time
    flops: float  # without what is computed twice
    gpu_days: float


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
    flops: float | None  # of all steps, without what is computed twice
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
        raise ConfigError(
            f"--hardware {name}: unknown device; known: {', '.join(PEAK_FLOPS)}, also with their memory, as"
            " in A100-40GB"
        )
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
    """Return every model and stage of a recipe, or of finetune.toml every model and data set.

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
    if recipe == "fast":
        return [item for model in fast_models() for item in _fast_trainings(model, pairs)]
    return [item for model in MODELS for item in _paper_trainings(model, pairs)]


def _fast_trainings(model: str, num_samples: int) -> list[Training]:
    return [
        Training(model=model, name=name, config=config, num_samples=num_samples)
        for name, config in with_phases("stage2", fast_recipe(model, "stage2"))
    ]


def _paper_trainings(model: str, num_samples: int) -> list[Training]:
    return [
        Training(model=model, name=stage, config=paper_recipe(model, stage), num_samples=num_samples)
        for stage in pretrained_stages(model)
    ]


def is_fast(trainings: Sequence[Training]) -> bool:
    """Return whether trainings of one model are those of `recipe = "fast"`, on any number of ranks."""
    model = trainings[0].model if trainings else ""
    if model not in fast_models():
        return False
    recipe = _fast_trainings(model, PAPER_PAIRS)
    return [item.name for item in trainings] == [item.name for item in recipe] and not any(
        _differs(item.config, its.config) for item, its in zip(trainings, recipe, strict=True)
    )


def next_to_the_paper(trainings: Sequence[Training], on: Hardware, tokens: int) -> list[tuple[Sum, Sum]]:
    """Return what each model costs by the fast recipe, and by the paper's; other trainings have no pair."""
    found = []
    for model in dict.fromkeys(item.model for item in trainings):
        own = [item for item in trainings if item.model == model]
        pairs = own[0].num_samples
        if pairs is not None and is_fast(own):
            paper = _paper_trainings(model, pairs)
            found.append((_sum("fast", own, on, tokens), _sum("paper", paper, on, tokens)))
    return found


def _sum(recipe: str, trainings: Sequence[Training], on: Hardware, tokens: int) -> Sum:
    needs = [need(item, on, tokens) for item in trainings]
    return Sum(
        model=trainings[0].model,
        recipe=recipe,
        num_steps=sum(found.num_steps or 0 for found in needs),
        samples=sum(item.config.epochs * (item.num_samples or 0) for item in trainings),
        flops=sum(found.flops or 0.0 for found in needs),
        gpu_days=sum(found.gpu_days or 0.0 for found in needs),
    )


def trainings_of_run(run: Run, num_samples: int | None) -> list[Training]:
    """Return the training stages of a run, with the samples of its shards if these are finished.

    Those of `recipe = "fast"` then have the paper's number of pairs, with whose cost theirs is compared.
    """
    manifest = read_manifest(run, "shards")
    known = num_samples or (manifest.num_kept if manifest is not None else None)
    found = [
        Training(model=stage.config.model, name=stage.name, config=stage.config.train, num_samples=known)
        for stage in run.stages
        if isinstance(stage.config, TrainStageConfig)
    ]
    if known is None and is_fast(found):
        return [replace(item, num_samples=PAPER_PAIRS) for item in found]
    return found


def paper_gpu_days(item: Training) -> float | None:
    """Return the paper's GPU-days for this training; None if its settings are not the paper's."""
    for stage in pretrained_stages(item.model):
        if stage == item.name and item.num_samples == PAPER_PAIRS:
            recipe = paper_recipe(item.model, stage)
            return None if _differs(recipe, item.config) else _PAPER_GPU_DAYS[item.model, stage]
    return None


def _differs(a: TrainConfig, b: TrainConfig) -> bool:
    return any(getattr(a, name) != getattr(b, name) for name in _WORK)


def need(item: Training, on: Hardware, tokens: int) -> Need:
    """Return the requirements of one training; `tokens` is the mean caption length with [CLS] and [SEP]."""
    config, split = item.config, shares(item.config)
    model = sized(MODELS[item.model], config)
    settings = read_deepspeed_file(config.deepspeed)
    plan = _Plan(
        model, config, zero_of(settings), precision_of(settings), on, min(tokens, config.context_length)
    )
    micro_batch, found = plan.micro_batch, plan.step
    num_steps = flops = days = None
    if item.num_samples is not None:
        num_steps = config.epochs * item.num_samples // config.global_batch
        flops = num_steps * config.global_batch * training_flops(model, config, plan.tokens)
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
        flops=flops,
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
