"""`cnclip init`: write a run's TOML that fits the data it finds."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE
from pipeline.cli.errors import UsageError, did_you_mean
from pipeline.core.records import ConfigError

if TYPE_CHECKING:
    from pipeline.tools.survey_data import Data

INIT = Group("Run")


@INIT.add(
    "init",
    "write a run's TOML that fits your data and this machine",
    "new.toml --data my/captions.csv --images my/pictures --evaluation my/valid",
    more="On a terminal, it asks for whatever the options leave out.",
)
def init(
    output: Annotated[
        str, typer.Argument(metavar="FILE.toml", help="write this file (default: my.toml)")
    ] = "my.toml",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="TABLE",
            help="read captions from a .parquet, .csv, .tsv or .jsonl file, a pattern, or a folder:"
            " Hugging Face datasets, webdataset, img2dataset, Chinese CLIP, images with a text file each",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="find images here, if the table holds paths instead of URLs"),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="measure on the sets here: NAME_imgs.tsv with NAME_texts.jsonl, or shards"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="train a model of this size; ViT-B-16 and other published sizes continue from their"
            " weights (default: small-vit)",
        ),
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="keep the run here (default: runs/ and the file's name)"),
    ] = None,
    url_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="use this column of addresses (default: found by its values)"),
    ] = None,
    caption_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="use this column of captions (default: found by its values)"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file if it exists")] = False,
) -> int:
    from pipeline.core.records import InputError
    from pipeline.tools.new_run import SMALL_MODEL, compose
    from pipeline.tools.survey_data import evaluation_sets, look_at_data, look_at_machine

    if not output.endswith(".toml"):
        raise ConfigError(f"{output}: not a .toml file; choose a name that ends in .toml")
    if os.path.lexists(output) and not force:
        raise ConfigError(f"{output}: already exists; choose another name, or overwrite it with --force")
    asks = sys.stdin.isatty() and sys.stderr.isatty()
    _require(asks, **{"--data TABLE": data, "--evaluation FOLDER": evaluation})
    columns = {"url_column": url_column, "caption_column": caption_column}
    data = data or _ask("Table with captions and image addresses, or folder of pairs")
    try:
        found = look_at_data(data, images, **columns)
    except InputError as error:
        if not (asks and images is None and "--images" in str(error)):
            raise
        found = look_at_data(data, _ask("Folder with the images"), **columns)
    _say(found)
    sets = evaluation_sets(evaluation or _ask("Folder with an evaluation set"))
    model = _model(model or (_ask("Model", SMALL_MODEL) if asks else SMALL_MODEL))
    default = f"runs/{Path(output).stem}"
    folder = folder or (_ask("Folder of the run", default) if asks else default)
    text = compose(found, sets, model, folder, look_at_machine())
    _write(output, text, force=force)
    print(f"{output}; next: cnclip plan {output}, then cnclip run {output}")
    return EXIT_DONE


def _require(asks: bool, **given: str | None) -> None:
    missing = [name for name, value in given.items() if value is None]
    if missing and not asks:
        raise UsageError(f"{', '.join(missing)}: missing, and without a terminal cnclip cannot ask; give it")


def _ask(question: str, default: str | None = None) -> str:
    answer: str = typer.prompt(question, default=default, err=True)
    return answer.strip()


def _say(data: "Data") -> None:
    counts = f"{data.num_rows:,} rows, {data.num_usable:,} of them usable"
    if data.kind is not None:
        print(f"about {counts}, as in its first file: read with kind = {data.kind!r}", file=sys.stderr)
        return
    where = "URLs" if data.images is None else f"paths below {data.images}"
    columns = f"addresses in {data.url_column!r} ({where}), captions in {data.caption_column!r}"
    print(f"{counts}: {columns}", file=sys.stderr)


def _model(name: str) -> str:
    from training.model.config import MODELS

    if name not in MODELS:
        raise ConfigError(
            f"--model {name}: no such model{did_you_mean(name, MODELS) or '; known: ' + ', '.join(MODELS)}"
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
