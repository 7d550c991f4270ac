"""`cnclip init`: write a run's TOML that fits the data it finds."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE
from pipeline.cli.errors import UsageError, did_you_mean
from pipeline.core.records import ConfigError, InputError
from pipeline.core.terminal import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.core.evaluation_sets import EvaluationSource
    from pipeline.tools.survey_data import Data

INIT = Group("Run")
Answer = TypeVar("Answer")
NO_MODEL = "none"


@INIT.add(
    "init",
    "write a run's TOML that fits your data and this machine",
    "new.toml --data my/captions.csv --images my/pictures --evaluation my/valid",
    more="On a terminal it asks for whatever the options leave out. Without an evaluation set the run sets"
    " some rows of your data aside and measures the model on them.",
)
def init(
    ctx: typer.Context,
    output: Annotated[
        str, typer.Argument(metavar="FILE.toml", help="write this file (default: my.toml)")
    ] = "my.toml",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="TABLE",
            help="read captions from a .parquet, .csv, .tsv or .jsonl file, a pattern, or a folder: Hugging"
            " Face datasets, webdataset, img2dataset, Chinese-CLIP, or images with a text file each",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="look for images here if the table holds paths instead of URLs"),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="measure the model on the sets in this folder: NAME_imgs.tsv with NAME_texts.jsonl, or"
            " shards (default: set rows of the data aside)",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="train a model of this size; published ones such as ViT-B-16 start from their weights; none"
            " builds only the corpus (default: small-vit)",
        ),
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="keep the run in this folder (default: runs/NAME for NAME.toml)"),
    ] = None,
    url_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="read image addresses from this column (default: found by its values)"
        ),
    ] = None,
    caption_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="read captions from this column (default: found by its values)"),
    ] = None,
    list_captions: Annotated[
        Literal["each", "first", "random"] | None,
        typer.Option(
            metavar="each|first|random",
            help="if captions are lists: make a row of each, keep the first, or keep all in one row, of which"
            " training draws one at random (default: each)",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file if it exists")] = False,
) -> int:
    from pipeline.tools.new_run import SMALL_MODEL, compose, num_set_aside
    from pipeline.tools.survey_data import evaluation_sets, look_at_data, look_at_machine

    if not output.endswith(".toml"):
        raise ConfigError(f"{output}: not a .toml file; choose a name that ends in .toml")
    if os.path.lexists(output) and not force:
        raise ConfigError(f"{output}: already exists; choose another name, or overwrite it with --force")
    asks = sys.stdin.isatty() and sys.stderr.isatty()
    if data is None and not asks:
        raise UsageError("--data TABLE: missing; give it, because cnclip cannot ask without a terminal", ctx)

    def look(path: str, images: str | None = images) -> "Data":
        try:
            return look_at_data(
                path,
                images,
                url_column=url_column,
                caption_column=caption_column,
                list_captions=list_captions,
            )
        except InputError as error:
            if not (asks and images is None and "--images" in str(error)):
                raise
            return _asked("Folder with the images", lambda folder: look(path, folder))

    def sets_in(folder: str) -> "list[EvaluationSource]":
        return evaluation_sets(folder) if folder else []

    found = (
        look(data) if data else _asked("Table with captions and image addresses, or folder of pairs", look)
    )
    _say(found)
    if evaluation is None and asks:
        sets = _asked("Folder with an evaluation set (Enter: set rows of your data aside)", sets_in, "")
    else:
        sets = sets_in(evaluation or "")
    name = _asked("Model, or none for the corpus only", _model, SMALL_MODEL) if asks and not model else None
    name = name or _model(model or SMALL_MODEL)
    default = f"runs/{Path(output).stem}"
    folder = folder or (_asked("Folder of the run", str, default) if asks else default)
    if name != NO_MODEL and not sets:
        print(f"sets {num_set_aside(found):,} rows aside to measure the model on: [split]", file=sys.stderr)
    text = compose(found, sets, None if name == NO_MODEL else name, folder, look_at_machine())
    _write(output, text, force=force)
    print(f"{output}; next: cnclip plan {output}, then cnclip run {output}")
    return EXIT_DONE


def _asked(question: str, use: "Callable[[str], Answer]", default: str | None = None) -> "Answer":
    """Return what an answer leads to; ask again after one that leads to an error."""
    while True:
        answer: str = typer.prompt(
            question, default=default or "", show_default=bool(default), err=True
        ).strip()
        if not answer and default is None:
            print("no answer: type a path, or press Ctrl-C to quit", file=sys.stderr)
            continue
        try:
            return use(answer)
        except (InputError, ConfigError) as error:
            print(one_line(str(error)), file=sys.stderr)


def _say(data: "Data") -> None:
    counts = f"{data.num_rows:,} rows, {data.num_usable:,} of them usable"
    if how := data.settings.get("list_captions"):
        images = round(data.num_rows / data.captions_per_image)
        what = {"each": "a row for each", "first": "a row with the first", "random": "a row that keeps all"}
        counts += f" (lists of captions of about {images:,} images, {what[how]}; --list-captions chooses)"
    if data.kind is not None:
        print(f"about {counts}, judging by the first file: read with kind = {data.kind!r}", file=sys.stderr)
        return
    where = "URLs" if data.images is None else f"paths below {data.images}"
    columns = f"addresses in {data.url_column!r} ({where}), captions in {data.caption_column!r}"
    print(f"{counts}: {columns}", file=sys.stderr)


def _model(name: str) -> str:
    from training.model.config import MODELS

    known = (*MODELS, NO_MODEL)
    if name not in known:
        raise ConfigError(
            f"--model {name}: no such model{did_you_mean(name, known) or '; known: ' + ', '.join(known)}"
        )
    return name


def _write(path: str, text: str, *, force: bool) -> None:
    """Write the whole file; without `force`, never replace one, even one that has just appeared."""
    from pipeline.catalog import resolve
    from pipeline.core import store
    from pipeline.core.config import read_toml

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if force:
        store.write_text(path, text)
    else:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    resolve(read_toml(path), path)  # check the file like any other run's
