"""Read only the image tower of an English CLIP, from any file that `training.weights.formats` reads."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.core.records import InputError
from training.model.config import Activation, ModelConfig, TextConfig, VisionTransformerConfig
from training.weights.formats import Weights, read_weights
from training.weights.sizes import infer_vision
from training.weights.weights import build_empty, fill, tensor_slots

_PROJECTIONS = ("visual.proj", "visual.attnpool.c_proj.weight")
_NO_TEXT = TextConfig(layers=1, width=64, heads=1, vocab_size=1, max_positions=1)


@dataclass(frozen=True, slots=True)
class ImageTower:
    """A tower in evaluation mode on the CPU."""

    module: nn.Module
    image_size_px: int
    embed_dim: int

    def encode(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return unit-norm feature_BD in float32 of normalised images."""
        return F.normalize(self.module(image_BCHW).float(), dim=-1)


def load_image_tower(path: str, *, activation: Activation = "quick_gelu") -> ImageTower:
    """Return the image tower of OpenAI CLIP's, OpenCLIP's or Chinese CLIP's weights, of any size.

    OpenAI trained with QuickGELU; OpenCLIP's own models (ViT-B-16-plus-240 of LAION-400M) with GELU.

    Raises:
        InputError: if the path holds no image tower, one of unknown sizes, or one of another activation.
    """
    weights = read_weights(path)
    vision, embed_dim = infer_vision(weights.state, path, weights.said), _embed_dim(weights)
    if vision is None or embed_dim is None:
        raise InputError(f"{path}: {weights.format}: holds no image tower; give an English CLIP's weights")
    if weights.said.activation not in (None, activation):
        raise InputError(
            f"{path}: its configuration says that its image tower has {weights.said.activation}, not"
            f" {activation}: set image_activation to it"
        )
    if isinstance(vision, VisionTransformerConfig):
        if vision.activation == "gelu" != activation:
            raise InputError(
                f"{path}: the only known image tower of its size has gelu, not {activation}: set"
                " image_activation to it"
            )
        vision = replace(vision, activation=activation)
    model = build_empty(ModelConfig(name="image tower", embed_dim=embed_dim, vision=vision, text=_NO_TEXT))
    slots = {name: slot for name, slot in tensor_slots(model).items() if name.startswith("visual.")}
    state = {name: tensor for name, tensor in weights.state.items() if name.startswith("visual.")}
    fill(slots, state, path, "Give an English CLIP's weights")
    return ImageTower(cast(nn.Module, model.visual).eval(), vision.image_size_px, embed_dim)


def _embed_dim(weights: Weights) -> int | None:
    """Return the width of the shared space: columns of a ViT's projection, rows of a ResNet's."""
    for name, axis in zip(_PROJECTIONS, (1, 0), strict=True):
        tensor = weights.state.get(name)
        if tensor is not None and tensor.ndim == 2:
            return int(tensor.shape[axis])
    return None
