"""Builds what `cnclip plan` prints about training: two tables, their assumptions, and notes."""

import textwrap
from collections.abc import Iterator, Sequence

from pipeline.core.records import ConfigError
from pipeline.core.text_table import align
from pipeline.planning.memory import SECONDS_A_DAY
from pipeline.planning.proportions import proportion_notes
from pipeline.planning.requirements import (
    GIB,
    Hardware,
    Need,
    Training,
    need,
    next_to_the_paper,
    paper_gpu_days,
)
from pipeline.planning.speed import HOST_SECONDS_A_LAYER, NETWORKS, RANKS_OF_A_NODE, SUITS

_HEADER = (
    *("model", "training", "batch", "epochs", "steps", "ranks", "samples/rank", "micro-batch"),
    *("GiB", "GPU-days", "days", "paper's"),
)
_STEP_HEADER = (
    *("training", "ranks", "step", "device", "host", "hidden", "exposed", "MB sent", "of peak"),
    *("suits", "samples/s", "cores", "MB/s read"),
)
_COLUMNS = 100  # of the text below the tables
_STEP_SIDES = (False, *(True,) * (len(_STEP_HEADER) - 1))


def training_table(trainings: Sequence[Training], on: Hardware, tokens: int) -> str:
    """Return two rows for each training, the assumptions, and notes on what does not fit or suit.

    `tokens` is the mean caption length with [CLS] and [SEP].

    Raises:
        ConfigError: if no caption can have that length.
    """
    longest = max((item.config.context_length for item in trainings), default=tokens)
    if not 3 <= tokens <= longest:
        raise ConfigError(
            f"--tokens {tokens}: must be from 3 ([CLS], one, [SEP]) to {longest}, the longest caption"
        )
    planned = [(item, need(item, on, tokens)) for item in trainings]
    rows = [_HEADER, *(_row(item, needed) for item, needed in planned)]
    paper = any(row[-1] for row in rows[1:])
    table = align([row if paper else row[:-1] for row in rows], (False, False, *(True,) * (9 + paper)))
    notes = [
        f"{item.model} {item.name}: {note}" for item, needed in planned for note in _notes(item, needed, on)
    ]
    if not on.has_bfloat16 and any(needed.in_bfloat16 for _, needed in planned):
        notes.insert(0, _note_on_bfloat16([item for item, needed in planned if needed.in_bfloat16], on))
    steps = align([_STEP_HEADER, *(_step_row(item, needed) for item, needed in planned)], _STEP_SIDES)
    sums = _sums_table(trainings, on, tokens)
    return "\n".join([table, "", steps, "", *sums, _reckoned(trainings, on, tokens, paper), *notes])


def _sums_table(trainings: Sequence[Training], on: Hardware, tokens: int) -> list[str]:
    """Return the lines of a table of what fast trainings and the paper's need; empty without fast ones."""
    rows = [("model", "recipe", "steps", "samples", "EFLOPs", "GPU-days", "of the paper's")]
    for pair in next_to_the_paper(trainings, on, tokens):
        rows += [
            (
                *(each.model, each.recipe, f"{each.num_steps:,}", f"{each.samples:,}"),
                *(f"{each.flops / 1e18:,.1f}", _duration(each.gpu_days, digits=1)),
                f"{each.gpu_days / pair[1].gpu_days:.0%}" if pair[1].gpu_days else "?",  # less than a step
            )
            for each in pair
        ]
    return [align(rows, (False, False, *(True,) * 5)), ""] if len(rows) > 1 else []


def _reckoned(trainings: Sequence[Training], on: Hardware, tokens: int, paper: bool) -> str:
    """Return the table's assumptions and the meaning of its columns, an item each."""
    items = [
        f"Estimates assume {on.name} ({on.memory_bytes / GIB:g} GiB, {on.usable_gib:g} GiB usable) at"
        f" {100 * on.utilisation:g}% of its 16-bit peak while it computes, {_network(on)}, and captions of"
        f" {tokens} tokens on average; one step that was measured, on an H200, had 18% (docs/scale.md).",
        "micro-batch: the training's own, or if it sets none the most samples whose activations a rank can"
        " hold at once.",
        "GiB: a rank's tensors at their fullest (pipeline/planning/memory.py); counted ones were 5% less"
        " (RN50) to 45% more (the tiny models in bfloat16), and a process needs more than its tensors:"
        " allocator and libraries.",
        "days: by the clock, on all ranks.",
        "GPU-days: that times ranks, with all that devices wait for.",
        *(
            [
                "GPU-days of a training with cached_views hold the building of its cache, K views of every"
                " image through the locked tower once; a cache that is there already saves them."
            ]
            if any(item.config.cached_views for item in trainings)
            else []
        ),
        *(["paper's: its GPU-days (A.2), on V100 or A100; they come to 5 to 19% of peak."] if paper else []),
        "step, device, host, hidden, exposed: milliseconds. A step is the longer of what the device computes"
        f" and what the host takes to launch it ({1e3 * HOST_SECONDS_A_LAYER:g} per layer), and the network's"
        " time that computing does not hide.",
        "of peak: what is left of the peak.",
        f"suits: the most ranks that come within {100 - 100 * SUITS:.0f}% of the best share of peak.",
        "samples/s, cores that decode, and MB/s read: of each rank.",
    ]
    return "\n".join(
        textwrap.fill(item, _COLUMNS, initial_indent="- ", subsequent_indent="  ", break_long_words=False)
        for item in items
    )


def _network(on: Hardware) -> str:
    """Return the bandwidth of collectives in words."""
    if on.bandwidth is not None:
        return f"collectives at {on.bandwidth / 1e9:g} GB/s per rank"
    one, several = (NETWORKS[key] / 1e9 for key in ("one node", "several"))
    return f"collectives at {one:g} GB/s per rank up to {RANKS_OF_A_NODE} ranks and {several:g} beyond"


def _note_on_bfloat16(trainings: Sequence[Training], on: Hardware) -> str:
    names = ", ".join(f"{item.model} {item.name}" for item in trainings)
    return (
        f"{on.name} has no tensor cores for bfloat16, which these trainings use; its peak is for float16,"
        f' which a ViT uses with deepspeed = "zero1_fp16" (ResNets do not support float16): {names}'
    )


def _row(item: Training, needed: Need) -> tuple[str, ...]:
    config = item.config
    steps = days = wall = "?"
    if needed.num_steps is not None and needed.gpu_days is not None:
        steps, days = f"{needed.num_steps:,}", _duration(needed.gpu_days, digits=1)
        wall = _duration(needed.gpu_days / config.ranks, digits=2)
    paper = paper_gpu_days(item)
    return (
        *(item.model, item.name, f"{config.global_batch:,}", str(config.epochs), steps, str(config.ranks)),
        *(_share(needed), f"{needed.micro_batch:,}" if needed.micro_batch else "none fits"),
        *(f"{needed.memory_gib:,.1f}", days, wall, f"{paper:,.0f}" if paper is not None else ""),
    )


def _step_row(item: Training, needed: Need) -> tuple[str, ...]:
    took, fed = needed.step, needed.feed
    parts = (took.total, took.device, took.host, took.hidden, took.exposed)
    return (
        *(f"{item.name} of {item.model}", str(item.config.ranks)),
        *(f"{1e3 * seconds:,.1f}" for seconds in parts),
        *(f"{needed.wire.total / 1e6:,.0f}", f"{100 * needed.utilisation:.0f}%", str(needed.suitable_ranks)),
        *(f"{fed.samples_a_second:,.0f}", f"{fed.cores:.1f}", f"{fed.bytes_a_second / 1e6:,.0f}"),
    )


def _duration(days: float, digits: int) -> str:
    """Return days, or hours, minutes or seconds if days would round to 0."""
    if round(days, digits) > 0 or days == 0:
        return f"{days:,.{digits}f}"
    units = (("h", 24 * days), ("min", 24 * 60 * days), ("s", SECONDS_A_DAY * days))
    unit, value = next((found for found in units if found[1] >= 1), units[-1])
    return f"{value:.1f}{unit}"


def _share(needed: Need) -> str:
    split = needed.shares
    if split.smallest == split.largest:
        return f"{split.largest:,}"
    return f"{split.smallest:,}-{split.largest:,}"


def _notes(item: Training, needed: Need, on: Hardware) -> Iterator[str]:
    """Yield the warnings on one training."""
    config, split = item.config, needed.shares
    if split.better_ranks:
        better = " or ".join(str(ranks) for ranks in split.better_ranks)
        divides = "divides" if config.global_batch % config.ranks == 0 else "does not divide"
        yield (
            f"{config.ranks} {divides} {config.global_batch:,}; ranks own whole lanes"
            f" ({config.num_lanes}) and hold {_share(needed)}"
            f" samples, so {100 * split.idle:.1f}% of the time is spent waiting;"
            f" {better} ranks share evenly"
        )
    if item.num_samples is None:
        yield "unknown number of pairs; give --samples"
    else:
        yield from proportion_notes(config, item.num_samples)
    yield from _notes_on_memory(item, needed, on)
    if config.ranks > needed.suitable_ranks and needed.utilisation < on.utilisation / 2:
        yield (
            f"{config.ranks} ranks of {_share(needed)} samples reach {100 * needed.utilisation:.0f}% of peak"
            f" instead of {100 * on.utilisation:g}%; at most {needed.suitable_ranks} ranks suit this batch"
        )


def _notes_on_memory(item: Training, needed: Need, on: Hardware) -> Iterator[str]:
    own = item.config.micro_batch
    if not needed.fitting:
        yield (
            f"one sample needs {needed.sample_gib:,.2f} of {on.usable_gib:,.2f} GiB; set"
            f" checkpoint_activations or a higher ZeRO stage, or use a larger device than {on.name}"
        )
    elif own is not None and needed.memory_gib > on.usable_gib:
        yield (
            f"micro_batch = {own} needs {needed.memory_gib:,.2f} of {on.usable_gib:,.2f} GiB;"
            f" micro_batch = {needed.fitting} fits"
        )
    elif own is None and needed.fitting < needed.shares.largest:
        yield (
            f"without micro_batch a rank holds its {needed.shares.largest:,} samples at once, which needs"
            f" {needed.share_gib:,.2f} of {on.usable_gib:,.2f} GiB; set micro_batch = {needed.fitting}"
        )
