"""Models made by the peers' own packages, with random weights that float16 can hold."""

import contextlib
import io
from typing import Any

import torch

from benchmarks.peers import cn_clip_of as build
from training.model.config import ModelConfig, VisionTransformerConfig

# cn_clip's names of the released structures
STRUCTURES = {
    "RN50": "RN50@RBT3-chinese",
    "ViT-B-32": "ViT-B-32@RoBERTa-wwm-ext-base-chinese",
    "ViT-B-16": "ViT-B-16@RoBERTa-wwm-ext-base-chinese",
    "ViT-L-14": "ViT-L-14@RoBERTa-wwm-ext-base-chinese",
    "ViT-L-14-336": "ViT-L-14-336@RoBERTa-wwm-ext-base-chinese",
    "ViT-H-14": "ViT-H-14@RoBERTa-wwm-ext-large-chinese",
}


def cn_clip_model(name: str, seed: int) -> Any:
    """Return cn_clip's class at full size, in float32, its weights rounded to what float16 holds."""
    from cn_clip.clip.utils import create_model  # type: ignore[import-untyped]

    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its configuration
        reference = create_model(STRUCTURES[name])
    return _lively(reference.float()).eval()


def _lively(model: Any) -> Any:
    """Move biases and norms away from zero and one, open residual branches, round all to float16."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if name.endswith("bn3.weight"):
                parameter.add_(1)
            parameter.copy_(parameter.half().float())
    return model


def hugging_face_model(config: ModelConfig, seed: int) -> Any:
    """Return transformers' ChineseCLIPModel of the same sizes."""
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    vision, text = config.vision, config.text
    assert isinstance(vision, VisionTransformerConfig)
    torch.manual_seed(seed)
    settings = ChineseCLIPConfig(
        projection_dim=config.embed_dim,
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.max_positions,
        },
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": 4 * vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size_px,
            "patch_size": vision.patch_size_px,
            "projection_dim": config.embed_dim,
        },
    )
    return _lively(ChineseCLIPModel(settings)).eval()


def cn_clip_of(config: ModelConfig, seed: int) -> Any:
    """Return cn_clip's class in any size, with weights that float16 holds."""
    torch.manual_seed(seed)
    return _lively(build(config)).eval()
