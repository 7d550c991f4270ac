"""`cnclip law`."""

import dataclasses
import json
import math
from typing import Annotated, TypeVar

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE, Overrides, RunFile
from pipeline.core import store
from pipeline.core.records import ConfigError
from pipeline.core.terminal import print_lines
from pipeline.core.text_table import align

LAW = Group("Evaluate")
Number = TypeVar("Number", int, float)


@LAW.add(
    "law",
    "train a grid of small models, fit error over compute, and predict larger trainings",
    "pictures --models tiny-vit,small-vit --epochs 1,2,4",
)
def law(
    run_file: RunFile,
    overrides: Overrides = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="train these models from nothing (default: the run's)"),
    ] = None,
    epochs: Annotated[
        str, typer.Option(metavar="N,…", help="train each for so many passes over the corpus")
    ] = "1,2,4,8",
    rates: Annotated[
        str,
        typer.Option(metavar="F,…", help="train each at the peak learning rate times these numbers"),
    ] = "1",
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="take the settings of this training stage (default: the last that trains both towers)",
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--on", metavar="SET", help="measure on this evaluation set (default: the mean over all)"
        ),
    ] = None,
    predict: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL:SAMPLES",
            help="predict this training, as in ViT-B-16:3e9 samples seen; may be repeated (default: four"
            " times the largest compute)",
        ),
    ] = None,
    redo: Annotated[bool, typer.Option("--redo", help="redo stale stages")] = False,
) -> int:
    from pipeline.catalog import load
    from pipeline.core.run import select
    from pipeline.law.grid import make_grid, measure, settings_of, with_grid
    from pipeline.law.report import LEGEND, conclude, table_of
    from pipeline.runner import execute

    run, config = load(run_file, overrides or [])
    own = settings_of(run, stage)
    cells = make_grid(
        _texts(own.model if models is None else models),
        _numbers("--epochs", epochs, int),
        [factor * own.train.peak_learning_rate for factor in _numbers("--rates", rates, float)],
    )
    asked = [_asked(text) for text in predict or ()]
    run = with_grid(run, config, own, cells)
    execute(run, select(run, None, None, None), redo=redo)
    points = [measure(run, cell, evaluation) for cell in cells]
    print(align(table_of(points), [False, True, True, False]))
    print_lines([LEGEND])
    found = conclude(points, asked, own.train)
    print_lines(found.sentences)
    path = store.join(run.folder, "law.json")
    store.write_text(path, json.dumps(dataclasses.asdict(found.document), indent=1) + "\n")
    print_lines([f"law: {path}"])
    return EXIT_DONE


def _texts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        found = [kind(part) for part in _texts(text)]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        numbers = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option} {text}: expected {numbers} with commas between")
    return found


def _asked(text: str) -> tuple[str, float]:
    from training.model.config import MODELS

    model, _, samples = text.partition(":")
    try:
        number = float(samples)
    except ValueError:
        number = 0.0
    if model not in MODELS or not 0 < number < math.inf:
        raise ConfigError(
            f"--predict {text}: expected a model and samples seen, as in ViT-B-16:3e9; models:"
            f" {', '.join(MODELS)}"
        )
    return model, number
