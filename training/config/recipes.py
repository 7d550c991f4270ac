"""Reads how the paper trained its models from training/recipes/*.toml."""

import tomllib
from importlib import resources
from typing import Any, Literal

from pipeline.core.config import build
from pipeline.core.records import ConfigError
from training.config.train import TrainConfig
from training.model.config import MODELS, VIT_H_14, VisionTransformerConfig

STAGES: tuple[Literal["stage1", "stage2"], ...] = ("stage1", "stage2")
_PRETRAIN = "training/recipes/pretrain.toml"


def paper_recipe(model: str, stage: Literal["stage1", "stage2"]) -> TrainConfig:
    """Return the settings with which the paper pretrained a model (Table 8, A.2).

    Raises:
        ConfigError: if the paper did not pretrain it.
    """
    return build(TrainConfig, _paper_table(model, stage), _PRETRAIN)


def _paper_table(model: str, stage: Literal["stage1", "stage2"]) -> dict[str, Any]:
    recipes = _read_recipes("pretrain")
    common, stages = recipes.pop("common"), {key: recipes.pop(key) for key in STAGES}
    own: dict[str, Any] = recipes.get(model, {})
    if stage not in own:
        trained = ", ".join(key for key, table in recipes.items() if stage in table)
        larger = '; set recipe = "larger" for yours' if model in larger_models() else ""
        raise ConfigError(
            f"{_PRETRAIN}: the paper has no {stage} of {model!r}; it has that of {trained}{larger}"
        )
    of_all_stages = {key: value for key, value in own.items() if key not in stages}
    return {**common, **stages[stage], **of_all_stages, **own[stage]}


def larger_models() -> list[str]:
    """Return the names of the ViTs that are wider than the paper's largest."""
    largest = VIT_H_14.vision.width
    return [
        name
        for name, config in MODELS.items()
        if isinstance(config.vision, VisionTransformerConfig) and config.vision.width > largest
    ]


def larger_recipe(model: str, stage: Literal["stage1", "stage2"]) -> TrainConfig:
    """Return settings for a ViT that is wider than the paper's largest: that one's, and larger.toml's.

    Raises:
        ConfigError: if it is not wider.
    """
    if model not in larger_models():
        raise ConfigError(
            f'recipe = "larger": {model!r} is not larger than the paper\'s models; it is for'
            f' {", ".join(larger_models())}; for the paper\'s own, set recipe = "paper"'
        )
    table = {**_paper_table(VIT_H_14.name, stage), **_read_recipes("larger")}
    return build(TrainConfig, table, "training/recipes/larger.toml")


def fast_models() -> list[str]:
    """Return the names of the models that fast.toml has."""
    return [name for name in _read_recipes("fast") if name in MODELS]


def fast_recipe(model: str, stage: Literal["stage1", "stage2"]) -> TrainConfig:
    """Return settings that take a part of the paper's compute: its stage 2 with fast.toml's values.

    Raises:
        ConfigError: if there are none for this model, or for stage 1.
    """
    recipes = _read_recipes("fast")
    common, own = recipes.pop("common"), recipes.get(model)
    if own is None:
        raise ConfigError(f'recipe = "fast": it has no {model!r}; it has {", ".join(recipes)}')
    if stage == "stage1":
        raise ConfigError('recipe = "fast" has no stage 1: remove [stage1], or without = ["stage1"]')
    table = {**_paper_table(model, stage), **common, **own}
    table.pop("phase")
    if "phase" in own:
        table["phases"] = [{**common["phase"], **own["phase"]}]
    return build(TrainConfig, table, "training/recipes/fast.toml")


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
    recipes = _read_recipes("pretrain")
    return [stage for stage in STAGES if stage in recipes.get(model, {})]


def finetuned_data(model: str) -> list[str]:
    """Return the data sets that the paper finetuned a model on, as `finetune_recipe` takes them."""
    recipes = _read_recipes("finetune")
    return [data for data in recipes["data"] if data in recipes.get(model, {})]


def _read_recipes(name: Literal["pretrain", "finetune", "larger", "fast"]) -> dict[str, Any]:
    return tomllib.loads((resources.files("training.recipes") / f"{name}.toml").read_text("utf-8"))
