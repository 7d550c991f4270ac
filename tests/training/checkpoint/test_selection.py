"""The best step, and when it is no longer worth it: as a rule on numbers, and in training."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.evaluation_sets import EvaluationFacts, EvaluationSource
from pipeline.core.records import ConfigError, Manifest
from pipeline.core.stage import Context
from tests.helpers.evaluation_files import small_evaluation
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import make_job, small_models
from training.checkpoint.selection import (
    Selection,
    Validation,
    check_sets,
    has_no_gain_left,
    read_validations,
    select,
)
from training.config.job import TrainJob
from training.config.recipes import paper_recipe
from training.config.train import TrainConfig
from training.stages import TrainStageConfig, plan
from training.weights.weights import load_checkpoint


def validations(*scores: float) -> list[Validation]:
    return [Validation(step, score) for step, score in enumerate(scores, start=1)]


def test_the_best_is_the_highest_and_the_earliest_of_equal_ones() -> None:
    assert select([], 0.0) == Selection(None, 0)
    assert select(validations(3.0, 5.0, 4.0, 5.0), 0.0).best == Validation(2, 5.0)


def test_a_gain_counts_from_the_last_salient_one() -> None:
    # three times 0.4 is salient together; the best is the highest even where its gain was not
    assert select(validations(10.0, 10.4, 10.8, 11.2), 1.0) == Selection(Validation(4, 11.2), 0)
    assert select(validations(10.0, 10.4, 10.8, 10.2), 1.0) == Selection(Validation(3, 10.8), 3)
    assert select(validations(10.0, 11.0), 1.0).steps_without_gain == 1  # "more than", not "as much as"
    assert (
        select([Validation(7, 3.0), Validation(20, 2.0), Validation(95, 3.0)], 0.0).steps_without_gain == 88
    )


def paper_curve(model: str, stage: Literal["stage1", "stage2"], points: float) -> tuple[TrainConfig, int]:
    """A paper recipe and the epoch it ends in where mean recall rises by so many points, ever more slowly."""
    config, num_samples = paper_recipe(model, stage), 200_000_000
    last = config.epochs * num_samples // config.global_batch
    found: list[Validation] = []
    for step in range(1_000, last, 1_000):
        found.append(Validation(step, 60 + points * (1 - math.exp(-3 * step / last))))
        if has_no_gain_left(select(found, config.salient_gain), config, num_samples):
            return config, math.ceil(step * config.global_batch / num_samples)
    return config, config.epochs


@pytest.mark.parametrize(
    ("model", "stage"),
    [("RN50", "stage2"), ("ViT-B-16", "stage1"), ("ViT-L-14", "stage2"), ("ViT-H-14", "stage1")],
)
def test_patience_is_in_epochs_however_often_recall_is_measured(
    model: str, stage: Literal["stage1", "stage2"]
) -> None:
    config, ended = paper_curve(model, stage, 10.0)
    assert ended == config.epochs
    assert paper_curve(model, stage, 0.0)[1] == config.patience + 1


def test_the_mean_over_the_deciding_sets_without_the_start() -> None:
    lines = [
        json.dumps({"step": step, "evaluation": name, "recall": {"mean_recall": score}})
        for step, name, score in (
            (0, "a", 99.0),
            (5, "a", 10.0),
            (5, "b", 30.0),
            (10, "a", 12.0),
            (10, "b", 20.0),
        )
    ]
    lines.insert(1, json.dumps({"step": 1, "loss": 1.0}))
    assert read_validations(lines, ()) == [Validation(5, 20.0), Validation(10, 16.0)]
    assert read_validations(lines, ("a",)) == [Validation(5, 10.0), Validation(10, 12.0)]


def test_muge_counts_by_its_three_numbers_in_lines_of_earlier_releases_too() -> None:
    t2i, i2t = {"r1": 10.0, "r5": 20.0, "r10": 30.0}, {"r1": 70.0, "r5": 80.0, "r10": 90.0}
    of_six = {"t2i": t2i, "i2t": i2t, "mean_recall": 50.0}
    of_three = {"t2i": t2i, "i2t": None, "mean_recall": 20.0}
    lines = [
        json.dumps({"step": step, "evaluation": name, "recall": recall})
        for step, name, recall in (
            (5, "muge-valid", of_six),
            (10, "muge-valid", of_three),
            (15, "coco-cn-valid", of_six),
        )
    ]
    assert read_validations(lines, ()) == [Validation(5, 20.0), Validation(10, 20.0), Validation(15, 50.0)]


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({}, False),
        ({"choose": "best"}, True),
        ({"choose": "best", "choose_on": ("muge-valid",)}, True),
        ({"choose": "best", "choose_on": ("other",)}, False),
        ({"patience": 3}, True),
    ],
)
def test_a_stage_that_muge_decided_by_six_numbers_is_stale(
    tmp_path: Path, changes: dict[str, Any], stale: bool
) -> None:
    given = [
        EvaluationSource(name=name, folder=small_evaluation(tmp_path / name, name))
        for name in ("muge-valid", "other")
    ]
    parents = {
        "corpus": Manifest(
            "corpus", 1, "", "", {}, (), 0, 0, {}, {"0": EvaluationFacts.of({}, given).to_json()}
        ),
        "shards": Manifest("shards", 1, "", "", {}, (), 0, 0, {}),
    }
    config = TrainStageConfig(train=TrainConfig(epochs=1, **changes), model="tiny-vit", vocabulary="v.txt")
    (task,) = plan(config, Context(str(tmp_path), "stage2", 0, parents))
    by_files_alone = {f"evaluation {item.name}" for item in given}
    assert (set(task.inputs) != by_files_alone) == stale


def test_sets_that_are_not_there_are_refused() -> None:
    config = TrainConfig(epochs=1, choose="best", choose_on=("valid",))
    with pytest.raises(
        ConfigError, match=r"\[stage1\] choose_on: no evaluation set 'valid'; the run has test"
    ):
        check_sets(config, ("test",), "stage1")
    with pytest.raises(ConfigError, match=r'choose = "best" needs an evaluation set, and the run has none'):
        check_sets(dataclasses.replace(config, choose_on=()), (), "stage1")
    check_sets(config, ("valid", "test"), "stage1")


SCORES = {4: 10.0, 8: 30.0, 12: 20.0, 16: 25.0, 20: 31.0}  # by step


def train_with_scores(job: TrainJob, scores: dict[int, float]) -> list[int]:
    """Train with these for recall; returns the steps that were validated."""
    from training.model.config import MODELS
    from training.pretrain import pretrain

    MODELS.update(small_models())
    asked: list[int] = []
    metrics = Path(job.folder) / "metrics.jsonl"

    def recall(clip: Any) -> dict[str, dict[str, Any]]:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        steps = [json.loads(line)["step"] for line in lines if "loss" in line]
        asked.append(max(steps, default=0))
        return {"toy": {"mean_recall": scores.get(asked[-1], 0.0)}}

    from training.metrics import MetricsLog

    def flushing(self: MetricsLog, *arguments: Any, **named: Any) -> None:
        step(self, *arguments, **named)
        self.flush()

    step = MetricsLog.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "step", flushing)
        pretrain(job, recall)
    return asked


def job_that_chooses(folder: Path, run: str, **changes: Any) -> TrainJob:
    settings: dict[str, Any] = {"choose": "best", "epochs": 7, "save_every_steps": 3, "keep_checkpoints": 1}
    job = make_job(folder, run, **{**settings, **changes})
    return dataclasses.replace(job, evaluations={"toy": "nowhere"})


def test_the_stage_ends_with_the_weights_of_its_best_validation(tmp_path: Path) -> None:
    job = job_that_chooses(tmp_path, "best")
    (asked,) = run_ranks(train_with_scores, 1, job, {**SCORES, 20: 29.0})
    assert asked == [0, 4, 8, 12, 16, 20, 21]  # 7 · 49 // 16 = 21 steps; the last is validated too
    assert checkpoints_of(job) == [3, 8, 18]  # that of the warm-up, the best, and the newest one
    chosen = load_file(Path(job.folder) / "checkpoints" / "step_000000008" / "weights.safetensors")
    ended = load_checkpoint(job.output_model).state_dict()
    assert all(torch.equal(ended[name], chosen[name]) for name in chosen)
    last = job_that_chooses(tmp_path, "last", choose="last")
    run_ranks(train_with_scores, 1, last, SCORES)
    at_the_end = load_checkpoint(last.output_model).state_dict()
    assert not torch.equal(at_the_end["text_projection"], ended["text_projection"])


def test_it_ends_when_it_no_longer_gains_also_after_a_stop(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"patience": 2, "salient_gain": 1.0}
    whole = job_that_chooses(tmp_path, "whole", **changes)
    (asked,) = run_ranks(train_with_scores, 1, whole, SCORES)
    assert asked == [0, 4, 8, 12, 16]  # 20 and 25 do not gain on 30
    # A run that has only the checkpoint of step 8 left decides the same, and asks for the rest alone.
    again = job_that_chooses(tmp_path, "again", **changes)
    (Path(whole.folder) / "checkpoints").rename(Path(again.folder) / "checkpoints")
    newest = Path(again.folder) / "checkpoints" / "step_000000015"
    (newest / "weights.safetensors").write_bytes(b"")
    (asked,) = run_ranks(train_with_scores, 1, again, SCORES)
    assert asked == [12, 16]
    assert Path(again.output_model).read_bytes() == Path(whole.output_model).read_bytes()


def checkpoints_of(job: TrainJob) -> list[int]:
    """Steps of the checkpoints on disk."""
    names = (path.name for path in (Path(job.folder) / "checkpoints").iterdir())
    return sorted(int(name.removeprefix("step_")) for name in names)


def damage(job: TrainJob, step: int) -> None:
    (Path(job.folder) / "checkpoints" / f"step_{step:09d}" / "weights.safetensors").write_bytes(b"")


def notices(job: TrainJob) -> str:
    lines = (Path(job.folder) / "log.jsonl").read_text().splitlines()
    return "\n".join(fields["notice"] for line in lines if "notice" in (fields := json.loads(line)))


def ends_with(job: TrainJob, step: int) -> bool:
    """The stage's weights are those of one of its checkpoints."""
    kept = load_file(Path(job.folder) / "checkpoints" / f"step_{step:09d}" / "weights.safetensors")
    ended = load_checkpoint(job.output_model).state_dict()
    return all(torch.equal(ended[name], kept[name]) for name in kept)


def test_where_the_newest_is_the_best_and_damaged_the_one_before_is_enough(tmp_path: Path) -> None:
    scores = {4: 10.0, 8: 20.0, 12: 25.0, 16: 28.0, 20: 31.0}
    job = job_that_chooses(tmp_path, "run", keep_checkpoints=2)
    run_ranks(train_with_scores, 1, job, scores)
    model, metrics = Path(job.output_model), Path(job.folder) / "metrics.jsonl"
    expected = model.read_bytes(), metrics.read_bytes()
    assert checkpoints_of(job) == [3, 16, 18, 20]  # 16 is what step 18 may come back to
    lost: set[int]
    for lost in (set(), {16}):
        damage(job, 20)
        for step in lost:
            shutil.rmtree(Path(job.folder) / "checkpoints" / f"step_{step:09d}")
        (asked,) = run_ranks(train_with_scores, 1, job, scores)
        assert asked == [20, 21]
        assert (model.read_bytes(), metrics.read_bytes()) == expected
        assert checkpoints_of(job) == sorted({3, 16, 18, 20} - lost)
    said = notices(job)
    assert "step_000000020: damaged (weights.safetensors has changed bytes): using" in said
    assert "step 16 has the best mean recall so far (28.00), but its weights are gone" in said


def test_a_damaged_best_costs_no_step_and_the_others_are_chosen_among(tmp_path: Path) -> None:
    job = job_that_chooses(tmp_path, "run")
    scores = {**SCORES, 20: 29.0}
    run_ranks(train_with_scores, 1, job, scores)
    assert checkpoints_of(job) == [3, 8, 18]
    damage(job, 8)
    (asked,) = run_ranks(train_with_scores, 1, job, scores)
    assert asked == [20, 21]
    assert checkpoints_of(job) == [3, 20]
    assert ends_with(job, 20)
    said = notices(job)
    assert "step_000000008: damaged (weights.safetensors has changed bytes)" in said
    assert "[stage2] step 8 has the best mean recall so far (30.00), but its weights are gone" in said
    assert "chosen among the validations to come" in said


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_now_wants_its_best_goes_on_and_takes_the_best_that_is_left(
    tmp_path: Path, ranks: int
) -> None:
    scores = {4: 30.0, 8: 20.0, 12: 19.0, 16: 18.0, 20: 17.0}
    job = job_that_chooses(
        tmp_path, "run", choose="last", keep_checkpoints=2, save_every_steps=4, ranks=ranks
    )
    run_ranks(train_with_scores, ranks, job, scores)
    assert checkpoints_of(job) == [2, 16, 20]
    best = dataclasses.replace(job, config=dataclasses.replace(job.config, choose="best"))
    (asked, *_) = run_ranks(train_with_scores, ranks, best, scores)
    assert asked == [21]
    assert ends_with(best, 16)
    assert "step 4 has the best mean recall so far (30.00)" in notices(job)
    assert "the best is chosen among step 16 (18.00) and the validations to come" in notices(job)
