"""A tiny model with its own vocabulary, on disk."""

from pathlib import Path

import torch

from training.model.clip import build_clip
from training.model.config import MODELS
from training.model.tokenizer import SPECIAL_TOKENS, Tokenizer, learn_vocabulary
from training.weights.weights import save_checkpoint


def write_tiny_model(
    folder: Path, seed: int = 0, *, words: str | None = None, name: str = "tiny-vit"
) -> tuple[str, str]:
    """Return the paths of a checkpoint with random weights and of its vocabulary.

    `words` are the characters that it knows, after the special tokens and in this order; unset, those of the
    captions of tests, in the order in which a vocabulary is learned.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    text = "红绿蓝色的照片一张第零一二三四五六七八九图不没有其他类猫狗车"
    tokenizer = Tokenizer(learn_vocabulary([text] * 2, 200) if words is None else [*SPECIAL_TOKENS, *words])
    vocabulary = folder / "vocab.txt"
    tokenizer.save_vocabulary(str(vocabulary))
    model = build_clip(MODELS[name], vocab_size=tokenizer.vocab_size)
    weights = folder / "model.safetensors"
    save_checkpoint(str(weights), model, model.config, {})
    return str(weights), str(vocabulary)
