"""Tiny models in the layouts in which their owners publish them, for a hub of tests."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.peer_models import hugging_face_model
from tests.helpers.tiny_model import write_tiny_model
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS, ModelConfig
from training.weights.weights import state_for_file

TINY = MODELS["tiny-vit"]


def chinese_clip(folder: Path, *, seed: int = 0, with_pickle: bool = True) -> ModelConfig:
    """Write what OFA-Sys's repositories hold, `tiny-vit` in size, with files that cnclip does not need."""
    write_tiny_model(folder, seed)  # for its vocabulary
    (folder / "model.safetensors").unlink()
    words = len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocab_size=words))
    model = hugging_face_model(config, seed)
    model.save_pretrained(folder)
    if with_pickle:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "README.md").write_text("A model.\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    return config


def open_clip(folder: Path, *, seed: int = 0) -> CLIP:
    """Write what LAION's repositories hold: a state dict and open_clip's configuration."""
    torch.manual_seed(seed)
    model = build_clip(TINY).eval()
    state = {name: value for name, value in state_for_file(model).items() if not name.startswith("bert.")}
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    vision = TINY.vision
    cfg = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": vision.image_size_px}
    settings = {"model_cfg": {"embed_dim": TINY.embed_dim, "vision_cfg": cfg, "quick_gelu": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return model


def chinese_bert(folder: Path, *, seed: int = 0) -> Any:
    """Write what HFL's repositories hold: BERT as a pickle, its configuration and its vocabulary."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    text = TINY.text
    sizes = BertConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        intermediate_size=4 * text.width,
        max_position_embeddings=text.max_positions,
    )
    model = BertModel(sizes).eval()
    sizes.save_pretrained(folder)
    torch.save(
        {f"bert.{name}": value for name, value in model.state_dict().items()}, folder / "pytorch_model.bin"
    )
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n猫\n", encoding="utf-8")
    return model
