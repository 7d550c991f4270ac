"""Averages of weights: what they are, that a resumed run has the same, and what a stage leaves of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.core.records import ConfigError
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import CONFIG, build_config, make_job, small_models, train_rank
from training.checkpoint.selection import check_sets
from training.config.averages import AveragesConfig
from training.config.job import TrainJob
from training.config.train import check_fits
from training.engine.averages import RunningAverages
from training.model.clip import CLIP, build_clip
from training.weights.weights import load_checkpoint

AVERAGES = {"ema": 0.9, "last_steps": 3, "interpolate": [0.5]}


def train_and_note(job: TrainJob) -> list[dict[str, npt.NDArray[Any]]]:
    """Train a rank; the weights after each step."""
    found, update = list[dict[str, npt.NDArray[Any]]](), RunningAverages.update

    def noted(self: RunningAverages, clip: Any, step: int) -> None:
        found.append({name: value.numpy().copy() for name, value in clip.state_dict().items()})
        update(self, clip, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningAverages, "update", noted)
        train_rank(job, dropout=0.0)
    return found


def train_without_dropout(job: TrainJob) -> None:
    train_rank(job, dropout=0.0)


def files_of(job: TrainJob) -> dict[str, dict[str, Tensor]]:
    assert job.config.averages is not None
    return {
        name: load_checkpoint(str(Path(job.folder) / f"model_{name}.safetensors")).state_dict()
        for name in job.config.averages.names
    }


@pytest.mark.parametrize("model", [pytest.param("small-vit", marks=pytest.mark.slow), "small-rn"])
def test_averages_are_those_of_the_weights_after_each_step(tmp_path: Path, model: str) -> None:
    """Two ranks: rank 0 keeps them. Running statistics are averaged too; counters are the last ones."""
    changes = build_config({"averages": {**AVERAGES, "use": "last"}, "epochs": 2})
    first = make_job(tmp_path, "first", model=model, epochs=1, ranks=2)
    run_ranks(train_without_dropout, 2, first)
    job = dataclasses.replace(
        make_job(tmp_path, "run", model=model, ranks=2),
        config=dataclasses.replace(changes, ranks=2),
        start_checkpoint=first.output_model,
    )
    noted, _ = run_ranks(train_and_note, 2, job)
    after = [{name: torch.from_numpy(value) for name, value in weights.items()} for weights in noted]
    assert len(after) == 6
    start, files = load_checkpoint(first.output_model).state_dict(), files_of(job)
    for name, plain in files["plain"].items():
        if not plain.is_floating_point():
            assert files["ema"][name] == files["last"][name] == plain
            continue
        ema = after[0][name]
        for step, weights in enumerate(after[1:], start=2):
            decay = min(0.9, (1 + step) / (10 + step))
            ema = decay * ema + (1 - decay) * weights[name]
        torch.testing.assert_close(files["ema"][name], ema, atol=1e-6, rtol=1e-6)
        last = torch.stack([weights[name] for weights in after[-3:]]).mean(0)
        torch.testing.assert_close(files["last"][name], last, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(plain, after[-1][name], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            files["interpolated_0.5"][name], (start[name] + plain) / 2, atol=1e-6, rtol=1e-6
        )
    ours = load_file(job.output_model)
    for name, tensor in load_file(str(Path(job.folder) / "model_last.safetensors")).items():
        assert torch.equal(ours[name], tensor), name
    document = json.loads((Path(job.folder) / "averages.json").read_text())
    assert document["used"] == "last"
    assert set(document["mean_recall"]) == {"plain", "ema", "last", "interpolated_0.5"}
    assert len({round(mean, 9) for mean in document["mean_recall"].values()}) == 4


def test_a_resumed_run_has_the_averages_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    jobs = [
        dataclasses.replace(
            make_job(tmp_path, run), config=build_config({"averages": AVERAGES, "save_every_steps": 4})
        )
        for run in ("whole", "stopped")
    ]
    for job in jobs:
        run_ranks(train_rank, 1, job)
    for path in Path(jobs[1].folder).glob("*.safetensors"):
        path.unlink()
    (Path(jobs[1].folder) / "finished.json").unlink()
    steps = [path.name for path in (Path(jobs[1].folder) / "checkpoints").glob("step*")]
    assert sorted(steps) == ["step_000000002", "step_000000004"]
    run_ranks(train_rank, 1, jobs[1])  # from step 4
    for name in ("plain", "ema", "last", "interpolated_0.5"):
        ours, theirs = (Path(job.folder) / f"model_{name}.safetensors" for job in jobs)
        assert ours.read_bytes() == theirs.read_bytes(), name


def averages_of_steps(config: AveragesConfig, total_steps: int, steps: range, clip: CLIP) -> RunningAverages:
    """Averages of weights that are all equal to the number of the step."""
    averages = RunningAverages(config, total_steps)
    for step in steps:
        with torch.no_grad():
            for parameter in clip.parameters():
                if parameter.requires_grad:
                    parameter.fill_(step)
        averages.update(clip, step)
    return averages


def test_a_stage_of_fewer_steps_averages_all_of_them_and_leaves_locked_weights_out() -> None:
    clip = build_clip(small_models()["small-vit"], vocab_size=20)
    clip.lock_image_tower()
    averages = averages_of_steps(AveragesConfig(last_steps=9), 4, range(1, 5), clip)
    plain = {name: torch.full_like(value, -1.0) for name, value in clip.state_dict().items()}
    last = averages.weights(plain)["last"]
    assert set(last) == set(plain)
    for name, value in last.items():
        assert torch.all(value == (-1.0 if name.startswith("visual.") else 2.5)), name


@pytest.mark.parametrize(("total_steps", "mean"), [(6, 5.0), (7, 6.5), (9, 8.0)])
def test_with_more_epochs_the_even_average_begins_later(total_steps: int, mean: float) -> None:
    """A checkpoint of step 5 of 6 has the mean of two steps; a longer run takes only later ones."""
    clip, config = build_clip(small_models()["small-vit"], vocab_size=20), AveragesConfig(last_steps=3)
    before = averages_of_steps(config, 6, range(1, 6), clip).state()
    resumed = averages_of_steps(config, total_steps, range(0), clip)
    resumed.restore(before, 5, clip)
    for step in range(6, total_steps + 1):
        with torch.no_grad():
            clip.logit_scale.fill_(step)
        resumed.update(clip, step)
    last = resumed.weights(clip.state_dict())["last"]["logit_scale"]
    assert last.item() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolate": [0.5, 0.25, 0.5]}, r"interpolate = \[0\.5, 0\.25, 0\.5\]: give each share once"),
        ({"use": "best"}, "averages: nothing to average; give ema, last_steps or interpolate"),
        ({"ema": 0.9, "use": "last"}, 'use = "last", but last_steps is not set'),
        ({"ema": 1.0}, r"averages\.ema: must be less than 1"),
        ({"interpolate": [0.5, 1.5]}, r"averages\.interpolate\.1: must be less than 1"),
    ],
)
def test_what_averages_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"averages": settings})


def test_a_stage_that_may_end_early_has_no_last_steps() -> None:
    with pytest.raises(ConfigError, match=r"averages\.last_steps = 3, but patience = 2: a stage that may"):
        build_config({"averages": AVERAGES, "patience": 2})


def test_the_best_average_needs_an_evaluation_set() -> None:
    config = build_config({"averages": {"ema": 0.9, "use": "best"}})
    with pytest.raises(ConfigError, match=r'\[english\] averages\.use = "best" needs an evaluation set'):
        check_sets(config, [], "english")


def test_zero_3_has_no_whole_weights_to_average() -> None:
    config = dataclasses.replace(CONFIG, averages=AveragesConfig(ema=0.9), deepspeed="zero3")
    with pytest.raises(ConfigError, match=r"\[stage2\.averages\] with zero3, which is ZeRO 3"):
        check_fits(config, small_models()["small-vit"], "stage2")
