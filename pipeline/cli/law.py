"""`cnclip law`."""

import dataclasses
import json
from typing import Annotated

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE, Overrides, RunFile
from pipeline.core import store
from pipeline.core.records import ConfigError
from pipeline.core.terminal import print_lines
from pipeline.core.text_table import align

LAW = Group("Evaluate")


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
        typer.Option(metavar="NAME", help="take the settings of this training stage (default: the last one)"),
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
) -> int:
    from pipeline.catalog import load
    from pipeline.core.run import select
    from pipeline.law.grid import make_grid, measure, settings_of, with_grid
    from pipeline.law.report import conclude
    from pipeline.runner import execute
    from training.stages import TrainStageConfig

    run, config = load(run_file, overrides or [])
    trainings = [item.name for item in run.stages if isinstance(item.config, TrainStageConfig)]
    if not trainings or config.model is None:
        raise ConfigError(f"{run_file}: trains no model")
    stage = stage or trainings[-1]
    train = settings_of(run, stage)
    cells = make_grid(
        _texts(models or config.model.name),
        [int(number) for number in _numbers("--epochs", epochs)],
        [factor * train.peak_learning_rate for factor in _numbers("--rates", rates)],
    )
    asked = [_asked(text) for text in predict or ()]
    run = with_grid(run, config, stage, cells)
    execute(run, select(run, None, None, None), redo=False)
    found = conclude([measure(run, cell, evaluation) for cell in cells], asked, train)
    print(align(found.rows, [False, True, True, False]))
    print_lines(found.sentences)
    path = store.join(run.folder, "law.json")
    store.write_text(path, json.dumps(dataclasses.asdict(found.document), indent=1) + "\n")
    print_lines([f"law: {path}"])
    return EXIT_DONE


def _texts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in _texts(text)]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers with commas between") from None


def _asked(text: str) -> tuple[str, float]:
    from training.model.config import MODELS

    model, _, samples = text.partition(":")
    try:
        number = float(samples)
    except ValueError:
        number = 0.0
    if model not in MODELS or not number > 0:
        raise ConfigError(
            f"--predict {text}: expected a model and samples seen, as in ViT-B-16:3e9; models:"
            f" {', '.join(MODELS)}"
        )
    return model, number
