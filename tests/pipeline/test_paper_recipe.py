"""`recipe = "paper"` in a run's stage: the paper's values, and the run's own before them."""

from pathlib import Path

import pytest

from pipeline.catalog import load
from pipeline.core.records import ConfigError

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
