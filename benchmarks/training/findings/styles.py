"""Run small trainings on some styles of the pictures corpus: what the scripts next to this file share."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.training.arms import BEST, Experiment
from training.config.train import TrainConfig


def add_pictures_options(options: argparse.ArgumentParser, *, epochs: int) -> None:
    """Add the options of the scripts on styles of the pictures corpus."""
    options.add_argument("--corpus", default="corpora/pictures", help="folder that `make pictures` built")
    options.add_argument("--epochs", type=int, default=epochs, help="of the arm with the fewest images")


def styles_experiment(
    options: argparse.Namespace,
    name: str,
    *,
    train: Sequence[str],
    evaluate: Sequence[str],
    corpus: str = "",
    english_epochs: int = 0,
    tables: str = "",
    overrides: Sequence[str] = (),
) -> Experiment:
    """Return a run of small-vit on some styles of a pictures folder, one caption an image, one set a style.

    `corpus` is the folder, by default --corpus; `tables` is TOML that the run has in addition. Without
    `english_epochs` its arms start from random weights.
    """
    folder = Path(options.folder) / name
    folder.mkdir(parents=True, exist_ok=True)
    without = "" if english_epochs else 'without = ["english"]\n'
    (folder / "run.toml").write_text(f'base = "emoji_zh"\n{without}{tables}', encoding="utf-8")
    settings = [
        f"corpus.folder={json.dumps(corpus or options.corpus)}",
        f"corpus.train={json.dumps(list(train))}",
        f"corpus.evaluate={json.dumps(list(evaluate))}",
        "corpus.captions_per_picture=1",
        "model.name=small-vit",
        *([f"english.epochs={english_epochs}"] if english_epochs else []),
        *overrides,
    ]
    last = "english" if english_epochs else "vocabulary"
    return Experiment(
        options, str(folder / "run.toml"), settings, str(folder / "run"), last=last, first="stage1"
    )


def whole_training(
    experiment: Experiment, epochs: int, *, recipe: Mapping[str, Any] = BEST, **changes: Any
) -> TrainConfig:
    """Return one training of both towers from its first step on, with stage 2's settings and `recipe`'s.

    One rank of one thread, so that two calls with different seeds share a machine of two cores.
    """
    stage2 = experiment.config.stage2
    assert stage2 is not None
    own: dict[str, Any] = {
        **recipe,
        "epochs": epochs,
        "ranks": 1,
        "checkpoint_activations": False,
        "validate_every_steps": 0,
        "save_every_steps": 200,
        **changes,
    }
    return dataclasses.replace(stage2, **own)
