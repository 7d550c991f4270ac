"""Reads how the paper trained its models from training/recipes/*.toml."""

import tomllib
from importlib import resources
from typing import Any, Literal

from pipeline.core.config import build
from pipeline.core.records import ConfigError
from training.config.train import TrainConfig


def paper_recipe(model: str, stage: Literal["stage1", "stage2"]) -> TrainConfig:
    """Return the settings with which the paper pretrained a model (Table 8, A.2).

    Raises:
        ConfigError: if the paper did not pretrain it.
    """
    name = "training/recipes/pretrain.toml"
    recipes = _read_recipes("pretrain")
    common, stages = recipes.pop("common"), {key: recipes.pop(key) for key in ("stage1", "stage2")}
    own: dict[str, Any] = recipes.get(model, {})
    if stage not in own:
        trained = ", ".join(key for key, table in recipes.items() if stage in table)
        raise ConfigError(f"{name}: the paper has no {stage} of {model!r}; it has that of {trained}")
    of_all_stages = {key: value for key, value in own.items() if key not in stages}
    return build(TrainConfig, {**common, **stages[stage], **of_all_stages, **own[stage]}, name)


def finetune_recipe(model: str, data: str) -> TrainConfig:
    """Return the settings with which the paper finetuned a model on a data set (Table 9, A.3, A.4).

    `data` is `muge`, `flickr30k-cn`, `coco-cn` or `icr`.

    Raises:
        ConfigError: if the paper did not finetune it on this data.
    """
    name = "training/recipes/finetune.toml"
    recipes, pretraining = _read_recipes("finetune"), _read_recipes("pretrain")
    common, data_sets = recipes.pop("common"), recipes.pop("data")
    own: dict[str, Any] = recipes.get(model, {})
    if data not in own:
        known = [
            f"{key} on {found}" for key, table in recipes.items() for found in table if found in data_sets
        ]
        raise ConfigError(
            f"{name}: the paper has no finetuning of {model!r} on {data!r}; it has {', '.join(known)}"
        )
    backbone = {key: value for key, value in pretraining[model].items() if key.startswith("adam_")}
    of_all_data = {key: value for key, value in own.items() if key not in data_sets}
    tables = (pretraining["common"], backbone, common, data_sets[data], of_all_data, own[data])
    return build(TrainConfig, {key: value for table in tables for key, value in table.items()}, name)


def pretrained_stages(model: str) -> list[Literal["stage1", "stage2"]]:
    """Return the stages in which the paper pretrained a model; empty for other models."""
    stages: tuple[Literal["stage1", "stage2"], ...] = ("stage1", "stage2")
    recipes = _read_recipes("pretrain")
    return [stage for stage in stages if stage in recipes.get(model, {})]


def finetuned_data(model: str) -> list[str]:
    """Return the data sets that the paper finetuned a model on, as `finetune_recipe` takes them."""
    recipes = _read_recipes("finetune")
    return [data for data in recipes["data"] if data in recipes.get(model, {})]


def _read_recipes(name: Literal["pretrain", "finetune"]) -> dict[str, Any]:
    return tomllib.loads((resources.files("training.recipes") / f"{name}.toml").read_text("utf-8"))
