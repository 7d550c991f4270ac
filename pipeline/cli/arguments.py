"""Arguments that several commands share, and the exit statuses."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

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
        help="the run's file, its folder once it was started, or a shipped recipe such as demo",
        autocompletion=_recipes_and_files,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="override a setting of the run, as in --set stage1.epochs=2; may be repeated",
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
        metavar="RUN-or-CHECKPOINT",
        help="a run's TOML (its last trained stage), or weights: a path, ViT-B-16 or a hub's owner/name",
        autocompletion=_recipes_and_files,
    ),
]
Vocabulary = Annotated[
    str | None,
    typer.Option(
        "--vocab",
        metavar="PATH-or-ID",
        help="read a vocab.txt, its folder or a model id (default: the run's, or found automatically)",
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
        help="decode images upright (respecting EXIF, 16 bits and transparency) or like CN-CLIP's code",
    ),
]


def checkpoint(
    model: str,
    overrides: Sequence[str] | None,
    vocabulary: str | None,
    context_length: int | None,
    decode: Literal["upright", "reference"] | None = None,
) -> "ModelSource":
    """Return the weights that a command's arguments name."""
    from eval.features.encoder import find_checkpoint

    found = find_checkpoint(model, vocabulary, context_length, overrides or ())
    if found.run_folder is not None and not overrides and not os.path.isdir(model):
        from pipeline.last_start import say_differences

        say_differences(model)
    return found if decode is None else replace(found, decode=decode)


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
        help="a .npy file, a folder of them, or clip-retrieval's folder with img_emb/ and text_emb/",
    ),
]
Side = Annotated[
    Literal["image", "text"],
    typer.Option(metavar="image|text", help="use this side of clip-retrieval's folder"),
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
    typer.Option("--device", metavar="cpu|gpu", help="run FAISS there; gpu needs faiss-gpu-cu12 (make gpu)"),
]
IndexMemory = Annotated[
    float, typer.Option("--memory", metavar="GIB", help="let the index use GIB of memory in total")
]
IndexRecall = Annotated[
    float,
    typer.Option("--recall", metavar="R", help="reach recall R against exact search, 0 to 1"),
]
