"""Arguments that several commands share, and the exit statuses."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.core.records import ConfigError

if TYPE_CHECKING:
    from eval.features.encoder import ModelSource

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def _recipes_and_files(incomplete: str) -> list[str]:
    """Complete a run: shipped recipes, and matching folders and TOML files."""
    from importlib.resources import files

    shipped = [
        item.name.removesuffix(".toml")
        for item in files("pipeline.recipes").iterdir()
        if item.name.endswith(".toml")
    ]
    folder = os.path.dirname(incomplete)
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        entries = []
    found = [
        os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.endswith(".toml") or entry.is_dir()
    ]
    return [name for name in (*sorted(shipped), *found) if name.startswith(incomplete)]


# A run, as `pipeline.catalog.load` takes it.
RunFile = Annotated[
    str,
    typer.Argument(
        metavar="RUN.toml",
        help="a run's TOML file, the folder of a started run, or a shipped recipe such as demo",
        autocompletion=_recipes_and_files,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="override a setting, as in --set stage1.epochs=2; may be repeated",
    ),
]

# Stages, as `pipeline.core.run.select` takes them.
OneStage = Annotated[str | None, typer.Option("--stage", metavar="NAME", help="act on this stage only")]
FirstStage = Annotated[str | None, typer.Option("--from", metavar="NAME", help="start at this stage")]
LastStage = Annotated[str | None, typer.Option("--to", metavar="NAME", help="stop after this stage")]

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document instead")]

# A model, as `checkpoint` takes it.
Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN-or-WEIGHTS",
        help="a run (its last trained stage), or weights: a path, a name such as ViT-B-16, or a hub id",
        autocompletion=_recipes_and_files,
    ),
]
Vocabulary = Annotated[
    str | None,
    typer.Option(
        "--vocab",
        metavar="PATH-or-ID",
        help="use this vocab.txt, folder with one, or hub id (default: the run's, or found automatically)",
    ),
]
ContextLength = Annotated[
    int | None,
    typer.Option(
        "--context",
        "--context-length",
        metavar="N",
        help="truncate texts to N tokens, including [CLS] and [SEP] (default: the run's, or 52)",
    ),
]
Decode = Annotated[
    Literal["upright", "reference"],
    typer.Option(
        metavar="upright|reference",
        help="rotate by EXIF, scale 16 bits and fill transparency (upright), or decode as"
        " CN-CLIP's code does",
    ),
]

Precision = Annotated[
    Literal["float32", "bf16"],
    typer.Option(
        metavar="float32|bf16",
        help="multiply matrices in this precision; bf16 is for GPUs (features: 3 digits)",
    ),
]


def index_bytes(memory_gib: float) -> float:
    """Return the --memory of an index in bytes.

    Raises:
        ConfigError: if it is not a number above 0.
    """
    if not 0 < memory_gib < math.inf:
        raise ConfigError(f"--memory {memory_gib}: must be greater than 0 GiB")
    return memory_gib * 2**30


def checkpoint(
    model: str,
    overrides: Sequence[str] | None,
    vocabulary: str | None,
    context_length: int | None,
    decode: Literal["upright", "reference"] | None = None,
    precision: Literal["float32", "bf16"] = "float32",
) -> "ModelSource":
    """Return the weights that a command's arguments name."""
    from eval.features.encoder import find_checkpoint

    found = find_checkpoint(model, vocabulary, context_length, overrides or ())
    if found.run_folder is not None and not overrides and not os.path.isdir(model):
        from pipeline.last_start import say_differences

        say_differences(model)
    return replace(found, decode=decode or found.decode, precision=precision)


def corpus_folder(corpus: str) -> str:
    """Return the folder of a corpus from a folder or from its run's TOML."""
    if not corpus.endswith(".toml"):
        return corpus
    from pipeline.catalog import load

    run, _ = load(corpus)  # only for its folder
    return run.folder


# The input and size of an index.
EmbeddingsPath = Annotated[
    str,
    typer.Argument(
        metavar="EMBEDDINGS",
        help="a file (.npy, .fbin, .u8bin, .i8bin, .fvecs, .bvecs, .ivecs, .hdf5, or .parquet:COLUMN), a"
        " folder of .npy files, or a clip-retrieval folder with img_emb/ and text_emb/",
    ),
]
Side = Annotated[
    Literal["image", "text"],
    typer.Option(metavar="image|text", help="use this side of a clip-retrieval folder"),
]
Where = Annotated[
    str | None,
    typer.Option(
        metavar="SQL",
        help="only rows whose metadata fulfil a condition, such as \"source = 'laion' AND width > 300\"",
    ),
]
VectorMetric = Annotated[
    Literal["cosine", "ip", "l2"] | None,
    typer.Option(
        "--metric",
        metavar="cosine|ip|l2",
        help="compare by cosine of rows brought to unit length, inner product, or L2 distance (default:"
        " cosine of unit-norm rows, or what an HDF5 file names)",
    ),
]
TrainRows = Annotated[
    int | None,
    typer.Option(
        "--train-rows",
        metavar="N",
        help="train FAISS on N evenly spaced rows (default: 262,144, or 39 for each list if that is more)",
    ),
]
Centre = Annotated[
    bool,
    typer.Option(
        "--centre", help="subtract the rows' mean before coding them; scores and exact ranks stay the same"
    ),
]
Neighbours = Annotated[int, typer.Option("--k", metavar="K", help="search for K neighbours")]
FaissDevice = Annotated[
    Literal["cpu", "gpu"],
    typer.Option(
        "--device", metavar="cpu|gpu", help="run FAISS on this device; gpu needs faiss-gpu-cu12 (make gpu)"
    ),
]
SearchDevice = Annotated[
    Literal["cpu", "gpu", "gpu-shards"],
    typer.Option(
        "--device",
        metavar="cpu|gpu|gpu-shards",
        help="run FAISS on this device; with gpu each GPU holds the index, with gpu-shards a share of it",
    ),
]
IndexMemory = Annotated[
    float, typer.Option("--memory", metavar="GIB", help="let the whole index use this much memory")
]
IndexRecall = Annotated[
    float,
    typer.Option("--recall", metavar="R", help="aim for this recall compared with exact search, 0 to 1"),
]
