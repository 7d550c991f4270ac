"""Sizes: the five literals against the paper's tables."""

import subprocess
import sys

import pytest
import torch

from training.model.clip import build_clip
from training.model.config import MODELS, ModelConfig, VisionTransformerConfig

# Table 1: all, image, text, in millions. Image is the tower with its projection, text is BERT without its
# pooler and with the text projection: counted so, all fifteen numbers agree.
TABLE_1 = {
    "RN50": (77, 38, 39),
    "ViT-B-16": (188, 86, 102),
    "ViT-L-14": (406, 304, 102),
    "ViT-L-14-336": (407, 304, 102),
    "ViT-H-14": (958, 632, 326),
}
# The same, exactly: what the paper rounds.
EXACT = {
    "RN50": 76_989_537,
    "ViT-B-16": 188_262_913,
    "ViT-L-14": 406_233_089,
    "ViT-L-14-336": 406_560_769,
    "ViT-H-14": 957_598_209,
}


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", TABLE_1)
def test_parameter_counts_are_those_of_table_1(name: str) -> None:
    with torch.device("meta"):
        model = build_clip(MODELS[name])
    image, text = _count(model.visual), _count(model.bert) + model.text_projection.numel()
    assert _count(model) == image + text + 1 == EXACT[name]  # and the temperature
    assert tuple(round(count / 1e6) for count in (image + text + 1, image, text)) == TABLE_1[name]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_widths_divide_into_heads(config: ModelConfig) -> None:
    assert config.text.width % config.text.heads == 0
    if isinstance(config.vision, VisionTransformerConfig):
        head_width = config.vision.width // config.vision.heads
        other = {"ViT-H-14": 80, "ViT-g-14": 88, "ViT-bigG-14": 104, "tiny-vit": 32}
        assert head_width == other.get(config.name, 64)
        assert config.vision.image_size_px % config.vision.patch_size_px == 0
    else:
        assert config.vision.width == 64 * config.vision.heads


def test_sizes_can_be_listed_without_torch() -> None:
    code = "import sys, training.model.config; print({'torch', 'timm', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
