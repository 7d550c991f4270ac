"""Make both sides of a training step: our model and a peer's with the same weights, and a batch for them."""

import os
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.peers import Peer, cn_clip_of, named_as_open_clip, open_clip_of
from training.config.train import TrainConfig
from training.data.loader import Batch
from training.engine.engine import train_step
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS
from training.ranks.launcher import free_port
from training.weights.weights import state_for_file

Kind = Literal["live", "cached", "stage2"]
KINDS: tuple[Kind, ...] = ("live", "cached", "stage2")

CONTEXT_LENGTH = 52
LENGTHS = (11, 14, 16, 18, 20, 22, 25, 32)  # characters, 19.75 in the mean
MEAN_TOKENS = sum(LENGTHS) / len(LENGTHS) + 2


def be_the_only_rank() -> None:
    """Set the environment of a run with a single rank."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def take_step(engine: Any, batch: Batch, rate: float, config: TrainConfig) -> float:
    """Take one training step in the engine and return its loss; a step that is skipped is an error."""
    result = train_step(engine, batch, rate, config.max_temperature, 0)
    assert not result.is_skipped.item()
    return result.loss.item()


def config_of(kind: Kind, batch_size: int) -> TrainConfig:
    """Return the settings of a step: stage 1 (live, or on cached features) or stage 2."""
    return TrainConfig(
        epochs=1,
        global_batch=batch_size,
        lanes=1,
        weight_decay=0.0,
        lock_image=kind != "stage2",
        cached_views=int(kind == "cached"),
    )


def without_dropout(model: str, kind: Kind) -> CLIP:
    """Return our model with seeded weights, in training mode."""
    torch.manual_seed(0)
    config = MODELS[model]
    clip = build_clip(replace(config, text=replace(config.text, dropout=0.0)))
    if kind != "stage2":
        clip.lock_image_tower()
    return clip.train()


def models_of(model: str, kind: Kind, peer_name: Peer = "cn_clip") -> tuple[CLIP, Any]:
    """Return our model and a peer's with the same weights, in training mode."""
    clip = without_dropout(model, kind)
    state = state_for_file(clip)
    if peer_name == "open_clip":
        peer, state = open_clip_of(clip.config), named_as_open_clip(state)
    else:
        peer = cn_clip_of(clip.config)
    found = peer.load_state_dict(state, strict=False)
    lacking = [key for key in found.missing_keys if "pooler" not in key and "position_ids" not in key]
    assert not lacking, lacking
    assert not found.unexpected_keys, found.unexpected_keys
    if kind != "stage2":
        for parameter_name, parameter in peer.named_parameters():
            if parameter_name.startswith("visual."):
                parameter.requires_grad = False  # as their `--freeze-vision` and `--lock-image`
    return clip, peer.train()


def make_batch(model: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return uint8 images of noise, and token ids of captions padded to 52."""
    side = MODELS[model].vision.image_size_px
    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.randint(0, 256, (batch_size, 3, side, side), generator=generator, dtype=torch.uint8)
    return image_BCHW, make_tokens(batch_size, MODELS[model].text.vocab_size)


def make_tokens(batch_size: int, vocab_size: int) -> Tensor:
    """Return random token ids of captions of LENGTHS, padded to 52."""
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.zeros(batch_size, CONTEXT_LENGTH, dtype=torch.int64)
    for row in range(batch_size):
        num_tokens = LENGTHS[row % len(LENGTHS)] + 2
        tokens_BL[row, :num_tokens] = torch.randint(5, vocab_size, (num_tokens,), generator=generator)
    return tokens_BL
