"""`cnclip law`: the grid as stages of a run, what it measures of a finished one, and what it concludes."""

import json
from pathlib import Path

import pytest

from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core.records import ConfigError, InputError
from pipeline.law.fit import Point
from pipeline.law.grid import Cell, make_grid, measure, settings_of, with_grid
from pipeline.law.report import conclude, table_of
from training.flops import training_flops
from training.model.config import MODELS

RUN = """
[run]
folder = "{folder}"
[corpus]
kind = "demo"
[model]
name = "tiny-vit"
[english]
epochs = 1
[stage1]
lock_image = true
epochs = 2
[stage2]
epochs = 3
global_batch = 64
peak_learning_rate = 1e-3
choose = "best"
patience = 2
averages.ema = 0.9
[[stage2.phases]]
epochs = 1
image_size_px = 16
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path / "run"))
    return str(tmp_path / "run.toml")


def test_cells_are_stages_that_start_from_nothing(path: str) -> None:
    run, config = load(path)
    cells = make_grid(["tiny-vit", "small-vit"], [2, 1], [1e-3])
    assert [(cell.model, cell.epochs) for cell in cells[:2]] == [("tiny-vit", 1), ("tiny-vit", 2)]
    grid = with_grid(run, config, settings_of(run, "stage2"), cells)
    names = [stage.name for stage in grid.stages]
    assert names[-5:] == ["vocabulary", *(cell.name for cell in cells)]
    assert names[-1] == "law_small-vit_2_epochs_0.001"
    last = grid.stages[-1].config
    assert (last.model, last.train.epochs, last.train.global_batch) == ("small-vit", 2, 64)
    assert (last.train.choose, last.train.patience, last.train.validate_every_steps) == ("last", 0, 0)
    assert last.train.averages is None
    assert (last.start_stage, last.image_stage, last.image_weights) == (None, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "ViT-X"], "--models ViT-X: unknown; known: RN50"),
        (["--epochs", "0,1,2"], "--epochs 0: must be greater than 0"),
        (["--epochs", "1;2"], "--epochs 1;2: expected whole numbers with commas between"),
        (["--epochs", "1,1.5,2"], "--epochs 1,1.5,2: expected whole numbers"),
        (
            ["--epochs", "1,2"],
            "--models and --epochs give 2 trainings that differ in compute, but a law needs 3",
        ),
        (["--models", ","], "--models and --epochs give 0 trainings"),
        (["--rates", "1,inf"], "--rates 1,inf: expected numbers with commas between"),
        (["--stage", "english"], "--stage english is not scored: name a stage that trains both towers"),
        (["--stage", "stage1"], "--stage stage1 locks the image tower"),
        (["--stage", "dedup"], "--stage dedup: not a training stage"),
        (["--predict", "ViT-B-16"], "--predict ViT-B-16: expected a model and samples seen"),
        (["--predict", "ViT-B-16:inf"], "--predict ViT-B-16:inf: expected a model and samples seen"),
        (["--set", "stage2.lock_image=true"], "--stage stage2 locks the image tower"),
    ],
)
def test_what_cannot_be_is_refused(
    path: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["law", path, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_finished_cell_is_measured(path: str) -> None:
    run, _ = load(path)
    cell = Cell("tiny-vit", 1, 1e-3)
    folder = Path(run.folder) / cell.name
    folder.mkdir(parents=True)
    validations = [("a", 0, 1.0), ("b", 0, 3.0), ("a", 9, 10.0), ("b", 9, 30.0)]
    lines = [
        {"step": step, "evaluation": name, "recall": {"mean_recall": recall}}
        for name, step, recall in validations
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"step": 1, "loss": 2.0}])))
    steps = [
        {"step": 1, "teraflops": 9.0, "seconds": 9.0},
        *({"step": n, "teraflops": 2.0, "seconds": 3.0} for n in (1, 2)),
    ]
    steps.append({"step": 2, "validation_seconds": 1.0})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, steps)))
    assert measure(run, cell, None) == Point(12e12, 80.0, cell.name)
    assert measure(run, cell, "b").error == 70.0
    with pytest.raises(InputError, match="--on c: no such evaluation set; the run has a, b"):
        measure(run, cell, "c")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    with pytest.raises(InputError, match="not scored on any evaluation set"):
        measure(run, cell, None)


def test_the_last_stage_that_trains_both_towers_lends_its_settings(path: str) -> None:
    run, _ = load(path)
    assert settings_of(run, None) is run.stage("stage2").config
    locked, _ = load(path, ["finetune.epochs=1", "finetune.lock_image=true"])
    assert settings_of(locked, None) is locked.stage("stage2").config


def test_a_grid_predicts_its_largest_training_and_larger_ones(path: str) -> None:
    _, config = load(path)
    assert config.stage2 is not None
    grid = [Point(flops, 90 * (flops / 1e12) ** -0.1, f"law_{flops:g}") for flops in (1e12, 3e12, 1e13, 3e13)]
    worse = Point(2e13, 95.0, "law_worse")
    found = conclude([*grid, worse], [("ViT-B-16", 1e6)], config.stage2)
    marked = {name: mark for name, _, _, mark in table_of([*grid, worse])[1:]}
    assert marked == {"1e+12": "*", "3e+12": "*", "1e+13": "*", "worse": "", "3e+13": "*"}
    assert any("the largest, 3e+13, lies in the interval" in text for text in found.sentences)
    flops = 1e6 * training_flops(MODELS["ViT-B-16"], config.stage2, 22)
    predicted = found.document.predictions["ViT-B-16, 1e+06 samples"]
    assert predicted.error == pytest.approx(90 * (flops / 1e12) ** -0.1, rel=1e-6)
    assert "times the largest: only a line drawn on" in found.sentences[-1]
    (alone,) = conclude(grid[:3], [], config.stage2).document.predictions.values()
    assert alone.flops == 4e13
    with pytest.raises(ConfigError, match="no such stage"):
        load(path)[0].stage("stage3")
