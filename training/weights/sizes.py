"""The sizes of a model, from the shapes of its tensors and from what a file says besides."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pipeline.core.records import InputError
from training.model.config import (
    MODELS,
    Activation,
    ModelConfig,
    ModifiedResNetConfig,
    TextConfig,
    VisionConfig,
    VisionTransformerConfig,
)
from training.weights.weights import MOST_LAYERS


@dataclass(frozen=True, slots=True)
class Said:
    """What a file, or the configuration next to it, says of its model beyond the shapes of its tensors."""

    name: str = ""  # of a registered model, perhaps with `@` and the text tower's
    image_heads: int | None = None
    text_heads: int | None = None
    image_width: int | None = None  # that `image_heads` belong to
    text_width: int | None = None
    activation: Activation | None = None  # of the image tower
    image_size_px: int | None = None  # of a ResNet: its tensors show cells of 32 pixels only

    @property
    def model(self) -> ModelConfig | None:
        """The registered model of that name."""
        return MODELS.get(self.name.partition("@")[0])


_NOTHING_SAID = Said()
# Image towers that OpenAI and OpenCLIP publish, at any patch size: (layers, width) → heads.
_PUBLISHED_HEADS = {(12, 384): 6, (12, 512): 8, (12, 768): 12, (12, 896): 14, (24, 1024): 16, (32, 1280): 16}


def infer_config(state: Mapping[str, torch.Tensor], origin: str, said: Said = _NOTHING_SAID) -> ModelConfig:
    """Return the sizes of a state in Chinese CLIP's names: of one of MODELS, if it fits at any resolution.

    Shapes do not show the number of heads: it is what `said` has, or that of the known tower of this size.

    Raises:
        InputError: if sizes are unknown, or nothing gives the heads of a size that is not known.
    """
    vision, text = infer_vision(state, origin, said), infer_text(state, origin, said)
    projection = state.get("text_projection")
    if vision is None or text is None or projection is None or projection.ndim != 2:
        raise InputError(
            f"{origin}: its sizes are unknown, because {_what_is_lacking(state)}; give a whole model"
        )
    found = ModelConfig(name="custom", embed_dim=int(projection.shape[1]), vision=vision, text=text)
    same = [
        known
        for known in MODELS.values()
        if replace(known.vision, image_size_px=vision.image_size_px) == vision
        and _sizes(known.text) == _sizes(text)
        and known.embed_dim == found.embed_dim
    ]
    # The model that the file names, the one of this resolution, or the first.
    same.sort(key=lambda known: (known is not said.model, known.vision != vision))
    return replace(found, name=same[0].name, text=_with_vocabulary(same[0].text, text)) if same else found


def _sizes(text: TextConfig) -> tuple[int, int, int, int]:
    return text.layers, text.width, text.heads, text.max_positions


def _with_vocabulary(known: TextConfig, text: TextConfig) -> TextConfig:
    return replace(known, vocab_size=text.vocab_size)


def _heads(side: str, width: int, known: set[int], named: int | None, said: int | None, origin: str) -> int:
    """Return a tower's heads: by the file, by the model that it names, or by all known ones of its size."""
    heads = said if said is not None else named
    if heads is None and len(known) != 1:
        counts = " or ".join(map(str, sorted(known)))
        why = f"known models of this size have {counts}" if known else "no known model has its size"
        raise InputError(
            f"{origin}: the number of attention heads of its {side} tower is unknown: shapes do not show it,"
            f" and {why}; give a Hugging Face folder with its config.json, or a checkpoint of this project"
        )
    heads = heads if heads is not None else next(iter(known))
    if heads < 1 or width % heads:
        raise InputError(f"{origin}: {heads} attention heads do not divide the {side} tower's width {width}")
    return heads


def _check_width(side: str, width: int, said: int | None, origin: str) -> None:
    if said not in (None, width):
        raise InputError(
            f"{origin}: its {side} tower has width {width}, but the configuration next to it is of one of"
            f" width {said}; give the config.json that belongs to these weights"
        )


def matching_towers(state: Mapping[str, torch.Tensor]) -> dict[Literal["image", "text"], list[str]]:
    """Return the names of the models whose image tower, and whose text tower, has the state's sizes."""
    vision, text = _vision_shapes(state), _text_shapes(state)
    return {
        "image": [name for name, known in MODELS.items() if vision and _fits(known.vision, vision)],
        "text": [
            name
            for name, known in MODELS.items()
            if text is not None and (known.text.layers, known.text.width) == (text.layers, text.width)
        ],
    }


def infer_vision(
    state: Mapping[str, torch.Tensor], origin: str, said: Said = _NOTHING_SAID
) -> VisionConfig | None:
    """Return the sizes of the image tower; None if it or the tensors that show them are missing.

    Raises:
        InputError: if its number of heads is unknown, or it is of another size than said.
    """
    shapes = _vision_shapes(state)
    if shapes is None:
        return None
    named = said.model.vision if said.model is not None and _fits(said.model.vision, shapes) else None
    if isinstance(shapes, ModifiedResNetConfig):
        # The grid of 32-pixel cells is all that shows of a resolution.
        side = shapes.image_size_px // 32
        if said.image_size_px is not None:
            if said.image_size_px // 32 != side:
                raise InputError(
                    f"{origin}: its image tower has positions of {side} × {side} cells of 32 pixels, but the"
                    f" configuration next to it is of one for {said.image_size_px} pixels; give the"
                    " config.json that belongs to these weights"
                )
            return replace(shapes, image_size_px=said.image_size_px)
        known = [named] if named else [one.vision for one in MODELS.values() if _fits(one.vision, shapes)]
        sizes = [one.image_size_px for one in known if one.image_size_px // 32 == side]
        return replace(shapes, image_size_px=sizes[0] if sizes else shapes.image_size_px)
    _check_width("image", shapes.width, said.image_width, origin)
    heads = {one.vision.heads for one in MODELS.values() if _fits(one.vision, shapes)}
    if not heads and (shapes.layers, shapes.width) in _PUBLISHED_HEADS:
        heads = {_PUBLISHED_HEADS[shapes.layers, shapes.width]}
    named_heads = named.heads if named is not None else None
    found = _heads("image", shapes.width, heads, named_heads, said.image_heads, origin)
    return replace(shapes, heads=found, activation=_activation(shapes, said))


def _activation(shapes: VisionTransformerConfig, said: Said) -> Activation:
    """Return what a file says of a ViT's activation, else that of the known towers of its size."""
    if said.activation is not None:
        return said.activation
    known = (one.vision for one in MODELS.values() if _fits(one.vision, shapes))
    found = {one.activation for one in known if isinstance(one, VisionTransformerConfig)}
    return "gelu" if found == {"gelu"} else "quick_gelu"


def infer_text(
    state: Mapping[str, torch.Tensor], origin: str, said: Said = _NOTHING_SAID
) -> TextConfig | None:
    """Return the sizes of the text tower, or None without one.

    Raises:
        InputError: if its number of heads is unknown.
    """
    shapes = _text_shapes(state)
    if shapes is None:
        return None

    def fits(known: ModelConfig | None) -> bool:
        return known is not None and (known.text.layers, known.text.width) == (shapes.layers, shapes.width)

    _check_width("text", shapes.width, said.text_width, origin)
    named = said.model.text.heads if said.model is not None and fits(said.model) else None
    heads = {known.text.heads for known in MODELS.values() if fits(known)}
    return replace(shapes, heads=_heads("text", shapes.width, heads, named, said.text_heads, origin))


def _vision_shapes(state: Mapping[str, torch.Tensor]) -> VisionConfig | None:
    """Return what shapes show of the image tower.

    A ViT's heads are 0, a ResNet's resolution a multiple of 32.
    """
    conv = state.get("visual.conv1.weight")
    if conv is None or conv.ndim != 4:
        return None
    positions = state.get("visual.positional_embedding", state.get("visual.attnpool.positional_embedding"))
    if positions is None or positions.ndim != 2 or len(positions) < 2:
        return None
    side = math.isqrt(positions.shape[0] - 1)
    if "visual.positional_embedding" in state:
        width, patch = int(conv.shape[0]), int(conv.shape[-1])
        layers = _count(state, r"visual\.transformer\.resblocks\.(\d{1,4})\.")
        between = state.get("visual.transformer.resblocks.0.mlp.c_fc.weight")
        feed_forward = 4 * width if between is None or between.ndim != 2 else int(between.shape[0])
        return VisionTransformerConfig(
            image_size_px=side * patch,
            patch_size_px=patch,
            layers=layers,
            width=width,
            heads=0,
            feed_forward=None if feed_forward == 4 * width else feed_forward,
        )
    one, two, three, four = (_count(state, rf"visual\.layer{stage}\.(\d{{1,4}})\.") for stage in (1, 2, 3, 4))
    width = int(positions.shape[1])
    return ModifiedResNetConfig(image_size_px=side * 32, blocks=(one, two, three, four), width=width)


def _text_shapes(state: Mapping[str, torch.Tensor]) -> TextConfig | None:
    """Return what shapes show of the text tower; its heads are 0."""
    words = state.get("bert.embeddings.word_embeddings.weight")
    positions = state.get("bert.embeddings.position_embeddings.weight")
    if words is None or positions is None or words.ndim != 2 or positions.ndim != 2:
        return None
    return TextConfig(
        layers=_count(state, r"bert\.encoder\.layer\.(\d{1,4})\."),
        width=int(words.shape[1]),
        heads=0,
        vocab_size=int(words.shape[0]),
        max_positions=int(positions.shape[0]),
    )


def _fits(known: VisionConfig, shapes: VisionConfig) -> bool:
    """Return whether a known tower has these shapes at some resolution."""
    other = replace(known, image_size_px=shapes.image_size_px)
    if isinstance(other, VisionTransformerConfig) and isinstance(shapes, VisionTransformerConfig):
        other = replace(other, heads=0, activation=shapes.activation)  # which no shape shows
    return other == shapes


def _count(names: Mapping[str, object], pattern: str) -> int:
    """Return one more than the highest number that the pattern finds in the names."""
    numbers = (int(match[1]) for name in names if (match := re.match(pattern, name)))
    return min(MOST_LAYERS, 1 + max(numbers, default=-1))


def _what_is_lacking(state: Mapping[str, torch.Tensor]) -> str:
    needed = ["text_projection", "visual.conv1.weight", "bert.embeddings.word_embeddings.weight"]
    needed += ["bert.embeddings.position_embeddings.weight"]
    lacking = [name for name in needed if name not in state]
    if not any(name.endswith("positional_embedding") for name in state):
        lacking.append("visual.positional_embedding")
    return f"it lacks {', '.join(lacking)}" if lacking else "tensors have unusual shapes"
