"""`recipe = "paper"` in a run's stage: the paper's values, and the run's own before them."""

import dataclasses
from pathlib import Path

import pytest

from pipeline.catalog import load
from pipeline.core.records import ConfigError
from training.config.recipes import fast_models, fast_recipe, paper_recipe
from training.model.config import MODELS

RUN = """
[run]
folder = "runs/x"
[corpus]
kind = "demo"
[model]
name = "ViT-B-16"
[stage1]
recipe = "paper"
epochs = 3
augment = { horizontal_flip = 0.0 }
[stage2]
recipe = "paper"
"""


def test_values_of_the_paper_with_own_ones_first(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    _, config = load(str(path))
    assert config.stage1 is not None
    assert config.stage2 is not None
    assert (config.stage1.epochs, config.stage1.global_batch) == (3, 32_768)
    assert config.stage1.lock_image
    assert config.stage1.augment.horizontal_flip == 0.0
    assert config.stage1.augment.auto_augment == "original"
    assert (config.stage2.epochs, config.stage2.global_batch) == (15, 16_384)
    assert config.stage2.peak_learning_rate == 2e-5


def test_unknown_recipe_and_model_without_one(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    with pytest.raises(ConfigError, match=r"stage1\.recipe: found 'own'"):
        load(str(path), ["stage1.recipe=own"])
    with pytest.raises(ConfigError, match="no stage1 of 'tiny-rn'"):
        load(str(path), ["model.name=tiny-rn"])
    with pytest.raises(ConfigError, match=r"no stage1 of 'ViT-g-14'; .*; set recipe = \"larger\" for yours"):
        load(str(path), ["model.name=ViT-g-14"])
    with pytest.raises(ConfigError, match=r"'ViT-B-16' is not larger than .* for ViT-g-14, ViT-bigG-14; "):
        load(str(path), ["stage1.recipe=larger"])


def test_the_larger_recipe_is_vit_hs_on_a_number_of_ranks_that_divides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN.replace('"paper"', '"larger"').replace("ViT-B-16", "ViT-bigG-14"))
    _, config = load(str(path))
    huge = paper_recipe("ViT-H-14", "stage2")
    assert config.stage2 == dataclasses.replace(huge, ranks=128, lanes=config.stage2.lanes)  # type: ignore[union-attr]
    assert config.stage1 is not None
    assert (config.stage1.epochs, config.stage1.ranks, config.stage1.global_batch) == (3, 128, 32_768)


def test_the_fast_recipe_has_fewer_epochs_most_of_them_on_small_images(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN.replace('recipe = "paper"\nepochs', "epochs").replace('"paper"', '"fast"'))
    _, config = load(str(path))
    paper, fast = paper_recipe("ViT-B-16", "stage2"), config.stage2
    assert fast is not None
    assert (paper.epochs, fast.epochs, fast.phases[0].epochs) == (15, 3, 12)
    assert fast.several_positives
    (phase,) = fast.phases
    assert (phase.image_size_px, phase.global_batch, phase.peak_learning_rate) == (112, 32_768, 1e-4)
    assert (fast.global_batch, fast.peak_learning_rate) == (paper.global_batch, paper.peak_learning_rate)
    with pytest.raises(ConfigError, match=r'recipe = "fast" has no stage 1: remove \[stage1\]'):
        load(str(path), ["stage1.recipe=fast"])
    with pytest.raises(ConfigError, match=r"has no 'ViT-B-32'; it has RN50, ViT-B-16, "):
        load(str(path), ["model.name=ViT-B-32"])


@pytest.mark.parametrize("model", fast_models())
def test_fast_recipes_follow_their_rule(model: str) -> None:
    paper, fast = paper_recipe(model, "stage2"), fast_recipe(model, "stage2")
    assert fast.epochs == max(1, round(paper.epochs / 5))
    side = MODELS[model].vision.image_size_px
    for phase in fast.phases:
        assert phase.epochs == round(paper.epochs * 4 / 5)
        assert phase.image_size_px is not None
        assert phase.image_size_px - side / 2 == (16 if model == "RN50" else 0)
    assert bool(fast.phases) == (model != "ViT-L-14-336")
    name = f"fast_{model.lower().replace('-', '_')}"
    _, config = load(name)
    assert config.stage1 is None
    assert config.stage2 is not None
    shipped = dataclasses.replace(fast, choose_on=config.stage2.choose_on)
    assert (config.model.name, config.stage2) == (model, shipped)  # type: ignore[union-attr]
