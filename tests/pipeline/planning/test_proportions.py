"""`plan` and `run` print notes on settings that do not suit the size of the corpus."""

import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core.run import read_manifest
from pipeline.planning.proportions import proportion_notes
from training.config.train import DistilConfig, TrainConfig
from training.stages import TrainStageConfig, title_of

RUN = "old_run/run.toml"  # of a finished run; see tests/pipeline/test_finished_run.py


def notes(*, samples: int = 3000, starts_at_random: bool = False, **settings: Any) -> list[str]:
    given = {"epochs": 10, "global_batch": 128, "warmup_steps": 20, "peak_learning_rate": 1e-3, **settings}
    return list(proportion_notes(TrainConfig(**given), samples, starts_at_random=starts_at_random))


def test_settings_that_fit_need_no_note() -> None:
    assert notes() == notes(starts_at_random=True) == []


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"samples": 100}, "global_batch = 128 is more than the 100 pairs, so it cannot train"),
        ({"warmup_steps": 500}, "warmup_steps = 500 is longer than the stage (234 steps)"),
        ({"epochs": 1, "samples": 500, "warmup_steps": 1}, "3 steps in all (epochs = 1, global_batch = 128,"),
        ({"peak_learning_rate": 0.1}, "peak_learning_rate = 0.1 is above 0.005"),
        (
            {"peak_learning_rate": 1e-6, "starts_at_random": True},
            "peak_learning_rate = 1e-06 is low for 234 steps from random weights",
        ),
        (
            {"epochs": 1000},
            "epochs = 1,000 show each of only 3,000 pairs 1,000 times (23,437 steps), long after a model"
            " knows so few by heart; lower epochs, to 86 for example, or set patience = 5",
        ),
    ],
)
def test_a_setting_out_of_proportion_has_a_note(settings: dict[str, Any], start: str) -> None:
    (note,) = notes(**settings)
    assert note.startswith(start)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 128},  # twice the paper's most
        {"epochs": 1000, "samples": 100, "global_batch": 64},  # 1,562 steps: few pairs need many passes
        {"epochs": 1000, "samples": 20_000},
        {"epochs": 1000, "patience": 5},
    ],
)
def test_many_epochs_that_may_help_need_no_note(settings: dict[str, Any]) -> None:
    assert notes(**settings) == []


def test_the_epochs_that_a_note_proposes_need_no_note() -> None:
    for samples in (129, 1000, 3000, 18_340):
        (note,) = notes(samples=samples, epochs=100_000)
        proposed = int(note.partition("lower epochs, to ")[2].partition(" for")[0].replace(",", ""))
        assert notes(samples=samples, epochs=proposed) == []


def test_weights_that_are_given_may_learn_slowly() -> None:
    assert notes(peak_learning_rate=1e-6) == []


@pytest.mark.parametrize(
    ("name", "settings", "title"),
    [
        ("stage1", {"lock_image": True}, "image tower locked, text tower trained"),
        ("stage1", {}, "both towers trained"),
        ("stage2", {"lock_image": True}, "image tower locked, text tower trained"),
        ("stage2", {"patch_mask": 0.5}, "both towers trained; 50% of the patches left out"),
        (
            "stage2",
            {"distil": DistilConfig(teacher="ViT-L-14")},
            "both towers trained; learning from ViT-L-14",
        ),
        ("finetune", {}, "both towers trained on a task's own pairs"),
        ("english", {}, "image tower from English captions, as the paper starts from OpenAI's CLIP"),
    ],
)
def test_the_title_says_what_the_settings_do(name: str, settings: dict[str, Any], title: str) -> None:
    train = TrainConfig(epochs=1, **settings)
    assert title_of(name, TrainStageConfig(train=train, model="ViT-B-16")) == title


@pytest.fixture
def num_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The pairs in the shards of a finished run, which lies in the working directory."""
    with tarfile.open(Path(__file__).parents[1] / "data" / "finished_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(load(RUN)[0], "shards")
    assert manifest is not None
    return manifest.num_kept


def test_plan_notes_what_does_not_fit_the_shards(num_pairs: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--set=stage2.warmup_steps=5000", "--set=finetune.global_batch=4096", "--set=finetune.lanes=1")
    assert main(["plan", RUN, *words]) == 0
    said = capsys.readouterr().out
    assert "\nnote: stage2: warmup_steps = 5,000 is longer than the stage" in said
    assert f"\nnote: finetune: global_batch = 4,096 is more than the {num_pairs} pairs" in said
    assert main(["plan", RUN, *words, "--hardware", "A100"]) == 0
    assert capsys.readouterr().out.count("warmup_steps = 5,000 is longer") == 1


def test_run_refuses_a_batch_before_an_earlier_stage_trains(
    num_pairs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--set=stage1.warmup_steps=4000", "--set=finetune.global_batch=4096", "--set=finetune.lanes=1")
    assert main(["run", RUN, "--from", "stage1", "--redo", *words]) == 2
    assert (
        f"[finetune] global_batch = 4096, but the corpus has {num_pairs} samples" in capsys.readouterr().err
    )
    assert Path("old_run/run/stage1/manifest.json").exists()
