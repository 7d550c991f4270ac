import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core.config import digest
from pipeline.core.records import ConfigError
from tests.helpers.train_jobs import CONFIG, build_config, make_job
from training.config.job import TrainJob
from training.config.recipes import paper_recipe
from training.config.train import TrainConfig, count_steps
from training.model.config import MODELS


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", ranks=2)
    assert TrainJob.from_json(job.to_json(), "job.json") == job


def test_a_job_with_a_misspelt_key_names_the_right_one(tmp_path: Path) -> None:
    fields = json.loads(make_job(tmp_path, "run").to_json())
    fields["config"]["global_bach"] = fields["config"].pop("global_batch")
    with pytest.raises(
        ConfigError, match=r"job.json: config.global_bach: unknown key; did you mean .*global_batch"
    ):
        TrainJob.from_json(json.dumps(fields), "job.json")


def test_table_8_is_also_what_a_run_gets_that_says_nothing() -> None:
    paper = paper_recipe("ViT-B-16", "stage1")
    ours = ("deepspeed", "choose", "validate_every_epoch", "salient_gain", "patience")  # the recipe's own
    changed = {name: getattr(paper, name) for name in (*ours, "ranks", "lock_image")}
    assert paper == dataclasses.replace(TrainConfig(epochs=44), **changed)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("model", ["RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"])
def test_every_recipe_can_train_and_names_a_model_that_is(
    model: str, stage: Literal["stage1", "stage2"]
) -> None:
    assert model in MODELS
    if (model, stage) == ("ViT-L-14-336", "stage1"):
        with pytest.raises(
            ConfigError, match=r"the paper has no stage1 of 'ViT-L-14-336'; it has that of RN50,"
        ):
            paper_recipe(model, stage)
    else:
        config = paper_recipe(model, stage)
        assert count_steps(config, 200_000_000, stage) > config.warmup_steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, r"run.toml: epochs: must be greater than 0, found 0"),
        ({"warmup_steps": -1}, r"warmup_steps: must be at least 0, found -1"),
        ({"lanes": 3}, r"global_batch = 16 is not a multiple of lanes = 3"),
        ({"ranks": 5}, r"ranks = 5 is more than lanes = 4"),
        ({"adam_beta2": 1.0}, r"adam_beta2: must be less than 1, found 1.0"),
        ({"adam_eps": 0.0}, r"adam_eps: must be greater than 0, found 0.0"),
        ({"max_gradient_norm": 0.0}, r"max_gradient_norm: must be greater than 0, found 0.0"),
        ({"max_temperature": 0.5}, r"max_temperature: must be at least 1, found 0.5"),
        ({"context_length": 2}, r"context_length: must be at least 3, found 2"),
        ({"validate_every_steps": -1}, r"validate_every_steps: must be at least 0, found -1"),
        ({"augment": {"crop_area": [90, 100]}}, r"augment.crop_area.0: must be at most 1, found 90"),
        ({"augment": {"crop_area": [0.9, 0.1]}}, r"augment: crop_area = \[0.9, 0.1\]: the smaller one"),
        ({"augment": {"zoom": [0.0, 1.0]}}, r"augment.zoom.0: must be greater than 0, found 0.0"),
        ({"augment": {"horizontal_flip": 3.0}}, r"augment.horizontal_flip: must be at most 1"),
        ({"augment": {"hue": -0.1}}, r"augment.hue: must be at least 0, found -0.1"),
    ],
)
def test_values_that_cannot_train_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(change)


@pytest.mark.parametrize(
    ("global_batch", "lanes"),
    [(32_768, 512), (2048, 512), (128, 128), (96, 96), (1000, 500), (1009, 1), (1, 1)],
)
def test_lanes_follow_the_batch_unless_they_are_named(global_batch: int, lanes: int) -> None:
    assert TrainConfig(epochs=1, global_batch=global_batch).num_lanes == lanes
    assert TrainConfig(epochs=1, global_batch=global_batch, lanes=1).num_lanes == 1


def test_lanes_that_follow_the_batch_depend_on_no_ranks() -> None:
    assert {TrainConfig(epochs=1, global_batch=128, ranks=ranks).lanes for ranks in (1, 2, 128)} == {128}
    with pytest.raises(
        ValueError, match=r"ranks = 3 is more than 2, the largest divisor of global_batch = 2"
    ):
        TrainConfig(epochs=1, global_batch=2, ranks=3)


def test_lanes_that_are_not_named_have_the_digest_of_those_that_are() -> None:
    unset, named = TrainConfig(epochs=1), TrainConfig(epochs=1, lanes=512)
    assert digest(unset) == digest(named)


def test_a_batch_of_ones_own_goes_with_the_papers_recipe(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('base = "paper_corpus"\n[stage1]\nglobal_batch = 1280\n', "utf-8")
    _, config = load(str(path))
    assert [stage.lanes for stage in (config.stage1, config.stage2) if stage] == [320, 512]


def test_weights_that_are_not_there_are_said_before_the_corpus_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = f"--set=run.folder={tmp_path / 'run'}", f"--set=model.text_weights={tmp_path}/none.pt"
    assert main(["run", "demo", *settings]) == 1
    assert "/none.pt: no such file or folder; correct [model] text_weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    small = [f"--set=corpus.{key}" for key in ("num_clean=20", "num_evaluation=12", "dirt=0.01")]
    assert main(["run", "demo", *settings, *small, "--to", "corpus"]) == 0  # a corpus alone needs none


def test_two_sources_of_the_image_tower_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.image_weights and \[english\] both give the image tower"):
        load("demo", ["model.image_weights=clip.pt"])


def test_captions_longer_than_a_model_takes_are_refused_with_the_run() -> None:
    with pytest.raises(ConfigError, match=r"\[stage1\] context_length = 100, but tiny-rn has 64 positions"):
        load("demo", ["stage1.context_length=100"])


def test_the_last_incomplete_batch_carries_over() -> None:
    assert count_steps(dataclasses.replace(CONFIG, epochs=1), 47, "stage1") == 2
    assert count_steps(dataclasses.replace(CONFIG, epochs=3), 47, "stage1") == 8


def test_a_corpus_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[stage1\] global_batch = 16, but the corpus has 15 samples"):
        count_steps(CONFIG, 15, "stage1")
    with pytest.raises(ConfigError, match=r"ranks = 4, but the corpus has 3 samples"):
        count_steps(dataclasses.replace(CONFIG, ranks=4), 3, "stage1")
