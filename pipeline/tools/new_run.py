"""Writes the TOML of a new run that fits its data and the machine, for `cnclip init`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pipeline.core.evaluation_sets import FEWEST_ITEMS, EvaluationSource
from pipeline.core.records import InputError
from pipeline.tools.survey_data import Data, Machine
from training.model.config import MODELS
from training.weights.hub.names import PUBLISHED

SMALL_MODEL = "small-vit"
_COMMON_MODEL = "ViT-B-16"  # of unknown models: four of the paper's five see images of its size
_KEPT = 0.5  # of the usable rows, which surely remain after downloads and filters; batches and warm-up fit it
_STEPS_FROM_RANDOM, _STEPS_FROM_WEIGHTS = 2_000, 500  # of training on a small corpus
_MOST_SET_ASIDE = 1_000  # images of a run without an evaluation set
_FEWEST_SET_ASIDE = 2 * FEWEST_ITEMS  # copies of training images are not set aside
_SET_ASIDE_ONE_IN = 10
_FEWEST_EPOCHS, _MOST_EPOCHS = 5, 60
_STEPS_AN_EPOCH = 8  # at least, so that a batch is never most of the corpus
_SMALLEST_BATCH, _FEWEST_ROWS = 4, 8  # a pair is learned by telling it from the others in its batch
_LARGEST_BATCH = 128  # of a small model and of one on the CPU, which holds it without micro-batches
_GPU_BATCH, _GPU_MICRO_BATCH = 1_024, 64
_MOST_RANKS = 4  # on the CPU; each holds its own model
_ROWS_A_PARTITION = 10_000  # suits the download
# Shorter sides that leave room for a random crop of the model's size; for other sizes, twice the size.
_SHORT_SIDES_PX: Mapping[int, int] = MappingProxyType({224: 256, 336: 384})


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Settings of the only training stage."""

    batch: int
    micro_batch: int | None
    epochs: int
    warmup_steps: int
    learning_rate: float
    ranks: int
    threads: int
    every_steps: int  # between validations and between checkpoints


def choose_training(model: str, num_usable: int, machine: Machine) -> Training:
    """Return settings for a model on a corpus with this number of rows."""
    surely = max(1, int(num_usable * _KEPT))
    is_given = model in PUBLISHED
    largest = _GPU_BATCH if is_given and machine.gpus else _LARGEST_BATCH
    of_corpus = max(_SMALLEST_BATCH, surely // _STEPS_AN_EPOCH)
    batch = 2 ** min(int(math.log2(largest)), int(math.log2(of_corpus)))
    devices = machine.gpus or min(machine.cores, _MOST_RANKS)
    ranks = min(batch, 2 ** int(math.log2(devices)))
    wanted = _STEPS_FROM_WEIGHTS if is_given else _STEPS_FROM_RANDOM
    epochs = min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, math.ceil(wanted * batch / num_usable)))
    steps = epochs * surely // batch
    share = batch // ranks
    return Training(
        batch=batch,
        micro_batch=_GPU_MICRO_BATCH if is_given and machine.gpus and share > _GPU_MICRO_BATCH else None,
        epochs=epochs,
        warmup_steps=max(1, min(100, steps // 10)),
        learning_rate=2e-5 if is_given else 1e-3,
        ranks=ranks,
        threads=max(1, machine.cores // ranks),
        every_steps=max(10, min(1_000, steps // 5)),
    )


def num_set_aside(data: Data) -> int:
    """Return how many rows a run without an evaluation set keeps for validation: a tenth, or what it needs.

    Raises:
        InputError: if the rows are too few to set some aside.
    """
    most, fewest = (
        math.ceil(number * data.captions_per_image) for number in (_MOST_SET_ASIDE, _FEWEST_SET_ASIDE)
    )
    count = max(fewest, min(most, data.num_usable // _SET_ASIDE_ONE_IN))
    if count > data.num_usable * _KEPT / 2:
        raise InputError(
            f"{data.path}: {data.num_usable} usable rows are too few to set some aside for validation, which"
            f" takes {math.ceil(2 * fewest / _KEPT):,}; name an evaluation set with --evaluation, or leave"
            " the model out with --model none"
        )
    return count


def compose(
    data: Data, evaluations: Sequence[EvaluationSource], model: str | None, folder: str, machine: Machine
) -> str:
    """Return the text of a run's TOML, with a comment on each choice; without a model, of a corpus only.

    Raises:
        InputError: if the rows are too few to train on.
    """
    if data.num_usable < _FEWEST_ROWS and model is not None:
        raise InputError(
            f"{data.path}: {data.num_usable} usable rows of {data.num_rows} are too few to train on; give at"
            f" least {_FEWEST_ROWS}"
        )
    what = "an address" if data.kind is None else "an image"
    lines = [
        "# Written by `cnclip init`. docs/reference/configuration.md lists every setting and its default.",
        f"# Data: {data.num_rows:,} rows, {data.num_usable:,} of them with {what} and a caption of"
        f" {data.fewest_characters} to {data.most_characters} characters.",
        f"# Machine: {_machine(machine)}.",
        "",
        "[run]",
        f"folder = {_text(folder)}",
        _line("processes", machine.cores, "tasks at once while the corpus is built"),
        "",
        *_corpus(data),
    ]
    for item in evaluations:
        lines += ["", _commented("[[evaluation]]", "never trained on; copies of its images leave the corpus")]
        lines += [f"name = {_text(item.name)}", f"folder = {_text(item.folder)}"]
    tables = [_filters(data)]
    num_usable = data.num_usable
    if model is not None and not evaluations:
        count = num_set_aside(data)
        num_usable -= count
        rows = _line("count", count, "rows for validation, and none of their copies stays for training")
        tables.append(["", "[split]", rows])
    tables.append(_packing(data, model))
    if model is not None:
        train = choose_training(model, num_usable, machine)
        tables += [_model(model), _training(train, machine, model)]
    return "\n".join([*lines, *(line for table in tables for line in table)]) + "\n"


def _corpus(data: Data) -> list[str]:
    settings = [f"{key} = {_text(value)}" for key, value in data.settings.items()]
    name = _line("name", '"data"', "in the funnel and in every sample")
    if data.kind is not None:
        kind = _line("kind", _text(data.kind), "how the images lie on disk")
        place = f"path = {_text(data.path)}"
        return ["[corpus]", 'kind = "sources"', "", "[[corpus.sources]]", kind, place, name, *settings]
    lines = ["[corpus]", 'kind = "tables"', "", "[[corpus.tables]]", f"path = {_text(data.path)}", name]
    if not data.are_known:
        lines += [f"url_column = {_text(data.url_column)}", f"caption_column = {_text(data.caption_column)}"]
    if data.images is not None:
        lines.append(_line("picture_folder", _text(data.images), "the addresses are paths below it"))
    return [*lines, *settings]


def _filters(data: Data) -> list[str]:
    fewest, most = data.default_characters
    lines = []
    if data.fewest_characters < fewest:
        comment = f"the paper's {fewest} would drop many of these captions"
        lines.append(_line("min_characters", data.fewest_characters, comment))
    if data.most_characters > most:
        comment = f"the paper's {most} would drop many of these captions"
        lines.append(_line("max_characters", data.most_characters, comment))
    if lines:
        lines = ["", "[filter_text]", *lines]
    side = data.shortest_side_px
    if side is not None and side < data.default_side_px:
        comment = f"some images are smaller than the default of {data.default_side_px}"
        lines += ["", "[filter_image]", _line("min_side_px", side, comment)]
    return lines


def _packing(data: Data, model: str | None) -> list[str]:
    side_px = MODELS[model or _COMMON_MODEL].vision.image_size_px
    short_side = _SHORT_SIDES_PX.get(side_px, 2 * side_px)
    sees = f"the model sees {side_px} pixels" if model else f"most models see {side_px} pixels"
    partitions = max(1, math.ceil(data.num_usable / _ROWS_A_PARTITION))
    samples = max(50, data.num_usable // 8 // 50 * 50)
    lines = [
        "",
        "[dedup]",
        _line("partitions", partitions, f"of about {_ROWS_A_PARTITION:,} rows"),
        "",
        "[download]",
        _line("short_side_px", short_side, f"larger images are reduced; {sees}"),
    ]
    if samples < _ROWS_A_PARTITION:  # otherwise the partitions are shards of that size, without a copy
        comment = "an epoch shuffles whole shards and samples within them"
        lines += ["", "[shards]", _line("samples_per_shard", samples, comment)]
    return lines


def _model(model: str) -> list[str]:
    lines = ["", "[model]", f"name = {_text(model)}"]
    if model not in PUBLISHED:
        return [*lines, "# Its weights start at random, and its vocabulary is learned from the captions."]
    return [
        *lines,
        'vocabulary = "bert-base-chinese"',
        _line("start_weights", _text(model), "Chinese CLIP as published; `cnclip run` downloads it once"),
    ]


def _training(train: Training, machine: Machine, model: str) -> list[str]:
    rate = f"{train.learning_rate:g}".replace("e-0", "e-")
    every = "steps between validations"
    lines = [
        "",
        _commented("[stage2]", "both towers are trained"),
        _line("epochs", train.epochs, "passes over the pairs"),
        _line("global_batch", train.batch, "pairs a step; the filters must leave at least as many"),
        _line("peak_learning_rate", rate, "after the warm-up; then a cosine to 0"),
        _line("warmup_steps", train.warmup_steps, "a tenth of the steps, or fewer"),
        "weight_decay = 0.1",
        _line("ranks", train.ranks, f"training processes, on {_machine(machine)}"),
        _line("threads_per_rank", train.threads, "cores for each of them"),
    ]
    if train.micro_batch is not None:
        lines.append(
            _line("micro_batch", train.micro_batch, "samples at once on a GPU; see cnclip plan --hardware")
        )
    if model in PUBLISHED:
        lines.append(_line("checkpoint_activations", "true", "less memory, more time"))
    return [
        *lines,
        _line("validate_every_steps", train.every_steps, every),
        _line("save_every_steps", train.every_steps, "steps between checkpoints"),
        "",
        _commented("[stage2.augment]", "captions may speak of left, right and colours"),
        "horizontal_flip = 0.0",
        'auto_augment = "none"',
    ]


def _machine(machine: Machine) -> str:
    cores = f"{machine.cores} CPU core{'s' if machine.cores > 1 else ''}"
    if not machine.gpus:
        return f"{cores}, no GPU"
    return f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''}, {cores}"


def _line(key: str, value: object, comment: str) -> str:
    return _commented(f"{key} = {value}", comment)


def _commented(text: str, comment: str) -> str:
    return f"{text:<30} # {comment}"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # a basic string of TOML is one of JSON
