"""What a model starts from: appendix A.2 of the paper.

Image tower, visual projection and temperature come from an English CLIP; the text tower from a Chinese BERT,
without its pooler; the text projection starts at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.core import store
from pipeline.core.processes import say
from pipeline.core.records import InputError
from training.model.clip import CLIP
from training.model.config import at_size
from training.weights.formats import Weights, read_weights, with_resized_positions
from training.weights.weights import (
    LOGIT_BIAS,
    Slot,
    fill,
    is_image_side,
    load_checkpoint,
    require_same_model,
    state_for_file,
    tensor_slots,
)

_SCALE = "logit_scale"


@dataclass(frozen=True, slots=True)
class Provenance:
    """What became of one tensor when a model took weights over."""

    tensor: str  # name in Chinese CLIP's layout, or in the file's if it was dropped
    outcome: Literal["taken", "interpolated", "initialised", "dropped"]
    source: str = ""  # path of the file; empty if it was initialised


def initialise(
    model: CLIP, *, image_weights: str | None = None, text_weights: str | None = None
) -> list[Provenance]:
    """Take over an image side, a text tower, or both, from files of any known format (A.2).

    `image_weights` gives image tower, visual projection and temperature (which may be missing); its position
    embedding is interpolated if the model has another resolution. `text_weights` gives BERT without pooler.
    Everything else stays as it is. Returns what became of every tensor, the model's first.

    Raises:
        InputError: for tensors of the tower that are missing, unexpected, misshapen or not finite, all of
            which it names; the model is then unchanged on that side.
    """
    slots = tensor_slots(model)
    outcomes = {name: Provenance(name, "initialised") for name in slots}
    dropped: list[Provenance] = []
    if image_weights is not None:
        weights = read_weights(image_weights)
        if not weights.has_image_tower:
            raise InputError(
                f"{image_weights}: {weights.format}: holds no image tower; give an English CLIP's file"
            )
        _require_heads(weights, "image", weights.said.image_heads, model)
        ours = {name: slot for name, slot in slots.items() if is_image_side(name)}
        state = {name: tensor for name, tensor in weights.state.items() if is_image_side(name)}
        for remark in weights.remarks:
            say(f"{image_weights}: {remark}")
        if _SCALE not in state:  # the model's own stays: ln(1 / 0.07)
            say(f"{image_weights}: holds no logit_scale: the temperature starts from 0.07, a factor of 14.3")
            del ours[_SCALE]
        fitted = with_resized_positions(state, model.config)
        _take(
            weights, ours, fitted, f"Give the weights of {model.config.name}'s image tower", outcomes, dropped
        )
        for name in state:
            if fitted[name].shape != state[name].shape:
                outcomes[name] = Provenance(name, "interpolated", image_weights)
    if text_weights is not None:
        weights = read_weights(text_weights)
        if not weights.has_text_tower:
            raise InputError(
                f"{text_weights}: {weights.format}: holds no text tower; give a Chinese BERT's folder"
            )
        _require_heads(weights, "text", weights.said.text_heads, model)
        ours = {name: slot for name, slot in slots.items() if name.startswith("bert.")}
        state = {name: tensor for name, tensor in weights.state.items() if name.startswith("bert.")}
        remedy = (
            f"Give the weights of {model.config.name}'s text tower, with the vocabulary it was trained on"
        )
        _take(weights, ours, state, remedy, outcomes, dropped)
    return [*outcomes.values(), *dropped]


def continue_from(model: CLIP, path: str) -> None:
    """Take over all weights of an earlier stage; position embeddings are interpolated to the model's images.

    A bias of the sigmoid loss is taken over if both have one.

    Raises:
        InputError: if the file is damaged or holds another model.
    """
    earlier = load_checkpoint(path)
    same_size = at_size(earlier.config, model.config.vision.image_size_px)
    require_same_model(same_size, model.config, path)
    slots, state = tensor_slots(model), with_resized_positions(state_for_file(earlier), model.config)
    if not (LOGIT_BIAS in slots and LOGIT_BIAS in state):
        slots.pop(LOGIT_BIAS, None)
        state.pop(LOGIT_BIAS, None)
    fill(slots, state, path, "Train the earlier stage again")


def _require_heads(weights: Weights, side: Literal["image", "text"], heads: int | None, model: CLIP) -> None:
    """Check that the weights have the model's number of heads in a tower, if they say one.

    Raises:
        InputError: if they have another.
    """
    tower = model.config.vision if side == "image" else model.config.text
    if heads is not None and heads != tower.heads:
        raise InputError(
            f"{weights.path}: its configuration has {heads} attention heads, but {model.config.name}'s {side}"
            f" tower has {tower.heads}: give other weights"
        )


def _take(
    weights: Weights,
    slots: Mapping[str, Slot],
    state: Mapping[str, torch.Tensor],
    remedy: str,
    outcomes: dict[str, Provenance],
    dropped: list[Provenance],
) -> None:
    fill(slots, state, weights.path, remedy)
    outcomes.update({name: Provenance(name, "taken", weights.path) for name in state})
    names = [*(name for name in weights.state if name not in state), *weights.dropped]
    dropped.extend(Provenance(name, "dropped", weights.path) for name in names)


def write_provenance(path: str, provenance: list[Provenance]) -> None:
    """Write the table of where each tensor came from: tensor, outcome and source, separated by tabs."""
    rows = [
        ("tensor", "outcome", "source"),
        *((item.tensor, item.outcome, item.source) for item in provenance),
    ]
    store.write_text(path, "".join("\t".join(row) + "\n" for row in rows))
