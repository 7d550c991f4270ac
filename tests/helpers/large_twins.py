"""Small twins of the models beyond the paper: the same head width and proportions, few layers."""

import dataclasses
from typing import Any

from training.model.config import MODELS, ModelConfig, VisionTransformerConfig


def twin(name: str) -> ModelConfig:
    """Return a model of two layers and heads, as wide as those of the model called `name`."""
    large: Any = MODELS[name].vision
    head_width = large.width // large.heads
    vision = VisionTransformerConfig(
        image_size_px=32,
        patch_size_px=8,
        layers=2,
        width=2 * head_width,
        heads=2,
        feed_forward=2 * large.feed_forward_width // large.heads,
        activation=large.activation,
    )
    return dataclasses.replace(MODELS["tiny-vit"], name=f"twin-{name}", embed_dim=48, vision=vision)


TWINS = {name: twin(name) for name in ("ViT-g-14", "ViT-bigG-14")}
