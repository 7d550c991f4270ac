"""A tiny model with a vocabulary of its own, on disk, for the tests of this folder."""

import dataclasses
from pathlib import Path

import torch

from training.model.clip import build_clip
from training.model.config import MODELS
from training.model.tokenizer import Tokenizer, learn_vocabulary
from training.model.weights import save_checkpoint


def write_tiny_model(folder: Path, seed: int = 0) -> tuple[str, str]:
    """Paths of a checkpoint with random weights and of its vocabulary."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    text = "红绿蓝色的照片一张第零一二三四五六七八九图不没有其他类猫狗车"
    tokenizer = Tokenizer(learn_vocabulary([text] * 2, 200))
    vocabulary = folder / "vocab.txt"
    tokenizer.save_vocabulary(str(vocabulary))
    config = MODELS["tiny-vit"]
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size)
    )
    weights = folder / "model.safetensors"
    save_checkpoint(str(weights), build_clip(config), config, {})
    return str(weights), str(vocabulary)
