"""`recipe = "paper"` in a run's stage: the paper's values, and the run's own before them."""

import dataclasses
from pathlib import Path

import pytest

from pipeline.catalog import load
from pipeline.core.records import ConfigError
from training.config.recipes import paper_recipe

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
