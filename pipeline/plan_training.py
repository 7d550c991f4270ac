"""What `cnclip plan` says of training: steps, micro-batches, memory and days on given devices."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.align import align
from pipeline.records import ConfigError
from pipeline.runner import Run, read_manifest
from training.config import (
    TrainConfig,
    finetune_recipe,
    finetuned_data,
    paper_recipe,
    pretrained_stages,
)
from training.deepspeed_file import read_deepspeed_file
from training.flops import MEMORY_GIB, PEAK_FLOPS, find_device
from training.model.config import MODELS
from training.sizing import (
    PAPER_GPU_DAYS,
    gpu_days,
    largest_micro_batch,
    memory,
    precision_of,
    shares,
    zero_of,
)
from training.stage import TrainStageConfig

RECIPES = ("pretrain", "finetune")
PAPER_PAIRS = 200_000_000  # section 2.2
# Training pairs of the tasks, where their owners print them; of the others --samples has to say it.
_TASK_PAIRS = {"muge": 250_314, "flickr30k-cn": 148_915}
_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a plan reckons with."""

    name: str
    flops_per_second: float  # of one device: its peak times `utilisation`
    memory_bytes: float
    utilisation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One training to be planned."""

    model: str  # key of training.model.config.MODELS
    name: str  # stage1, stage2, or what it is finetuned on
    config: TrainConfig
    num_samples: int | None  # None: not known yet


def hardware(name: str, utilisation: float, memory_gib: float | None) -> Hardware:
    """A device whose data sheet is known; ConfigError for another one, and for what no device does."""
    found = find_device(name)
    if found is None:
        raise ConfigError(f"--hardware {name}: no data sheet of it here; known: {', '.join(PEAK_FLOPS)}")
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation {utilisation}: must be above 0 and at most 1")
    if memory_gib is not None and not (math.isfinite(memory_gib) and memory_gib > 0):
        raise ConfigError(f"--memory {memory_gib}: must be above 0 GiB")
    return Hardware(
        name=found,
        flops_per_second=PEAK_FLOPS[found] * utilisation,
        memory_bytes=(memory_gib or MEMORY_GIB[found]) * _GIB,
        utilisation=utilisation,
    )


def trainings_of_recipe(recipe: str, num_samples: int | None) -> list[Training]:
    """Every model and stage of pretrain.toml, or every model and data set of finetune.toml."""
    if recipe == "finetune":
        return [
            Training(
                model=model,
                name=data,
                config=finetune_recipe(model, data),
                num_samples=num_samples or _TASK_PAIRS.get(data),
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
    """The training stages of a run; the number of samples is that of its shards once they are there."""
    manifest = read_manifest(run, "shards")
    known = num_samples or (manifest.num_kept if manifest is not None else None)
    return [
        Training(model=stage.config.model, name=stage.name, config=stage.config.train, num_samples=known)
        for stage in run.stages
        if isinstance(stage.config, TrainStageConfig)
    ]


def training_table(trainings: Sequence[Training], on: Hardware, tokens: int) -> str:
    """One row a training, what was reckoned with, and a line for each whose ranks do not divide its batch.

    `tokens` is a caption's mean length with [CLS] and [SEP]; ConfigError where no caption can have it.
    """
    longest = max((item.config.context_length for item in trainings), default=tokens)
    if not 3 <= tokens <= longest:
        raise ConfigError(
            f"--tokens {tokens}: must be from 3 ([CLS], one, [SEP]) to {longest}, the longest caption"
        )
    header = "model training batch epochs steps ranks samples/rank micro-batch GiB GPU-days days paper's"
    rows, notes = [tuple(header.split())], []
    for item in trainings:
        row, note = _row(item, on, tokens)
        rows.append(row)
        notes += note
    paper = any(row[-1] for row in rows[1:])
    table = align([row if paper else row[:-1] for row in rows], (False, False, *(True,) * (9 + paper)))
    reckoned = (
        f"Reckoned with {on.name} ({on.memory_bytes / _GIB:g} GiB) at {100 * on.utilisation:g} % of its"
        f" 16-bit peak and captions of {tokens} tokens on average. micro-batch: the most samples whose"
        " activations a rank can hold at once. GiB: a rank's tensors at their fullest (training/sizing.py);"
        " counted ones were 5 % less (RN50) to 45 % more (the tiny models in bfloat16), and a process needs"
        " more than its tensors: allocator and libraries. days: by the clock, on all ranks."
        + (" paper's: its GPU-days (A.2), on V100 or A100; they come to 5 to 19 % of peak." if paper else "")
    )
    return "\n".join([table, "", reckoned, *notes])


def _row(item: Training, on: Hardware, tokens: int) -> tuple[tuple[str, ...], list[str]]:
    """A training's line of the table, and what has to be said about it."""
    config, model, split = item.config, MODELS[item.model], shares(item.config)
    settings = read_deepspeed_file(config.deepspeed)
    needs = functools.partial(
        memory,
        model,
        config,
        zero=zero_of(settings),
        precision=precision_of(settings),
        tokens=config.context_length,  # the longest captions decide
    )
    fits = largest_micro_batch(needs, split.largest, on.memory_bytes)
    micro_batch = min(config.micro_batch or fits, split.largest)
    gib = needs(micro_batch=max(1, micro_batch)).total / _GIB
    steps = days = wall = "?"
    if item.num_samples is not None:
        num_steps = config.epochs * item.num_samples // config.global_batch
        needed_days = gpu_days(
            model,
            config,
            num_steps=num_steps,
            micro_batch=micro_batch,
            flops_per_second=on.flops_per_second,
            tokens=min(tokens, config.context_length),
        )
        steps, days = f"{num_steps:,}", f"{needed_days:,.1f}"
        wall = f"{needed_days / config.ranks / (1 - split.idle):,.2f}"
    even = split.smallest == split.largest
    share = f"{split.largest:,}" if even else f"{split.smallest:,}-{split.largest:,}"
    paper = PAPER_GPU_DAYS.get((item.model, item.name))
    row = (
        *(item.model, item.name, f"{config.global_batch:,}", str(config.epochs), steps, str(config.ranks)),
        *(share, f"{micro_batch:,}" if micro_batch else "none fits", f"{gib:,.1f}", days, wall),
        f"{paper:,.0f}" if paper else "",
    )
    notes = []
    if split.better_ranks:
        better = " or ".join(str(ranks) for ranks in split.better_ranks)
        divides = "divides" if config.global_batch % config.ranks == 0 else "does not divide"
        notes.append(
            f"{item.model} {item.name}: {config.ranks} {divides} {config.global_batch:,}; ranks own whole"
            f" lanes ({config.lanes}) and hold {share} samples: {100 * split.idle:.1f} % of the time is lost"
            f" in waiting; {better} ranks share evenly"
        )
    if item.num_samples is None:
        notes.append(f"{item.model} {item.name}: how many pairs it has is not known here; give --samples")
    elif config.global_batch > item.num_samples:
        notes.append(
            f"{item.model} {item.name}: a batch of {config.global_batch:,} is more than the"
            f" {item.num_samples:,} pairs; lower global_batch (and lanes, which divides it)"
        )
    if not micro_batch:
        notes.append(
            f"{item.model} {item.name}: one sample needs {gib:,.1f} GiB, more than {on.name} has to give; set"
            " checkpoint_activations, a higher ZeRO stage, or take a larger device"
        )
    return row, notes
