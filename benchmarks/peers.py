"""The reference's model class, in the sizes of a configuration of ours."""

from typing import Any

from training.model import torchvision_ops
from training.model.config import ModelConfig, VisionTransformerConfig


def cn_clip_of(config: ModelConfig) -> Any:
    """cn_clip's `CLIP` in float32 with random weights from torch's generator."""
    torchvision_ops.install()  # cn_clip imports torchvision
    from cn_clip.clip.model import CLIP

    vision, text = config.vision, config.text
    is_vit = isinstance(vision, VisionTransformerConfig)
    reference = CLIP(
        embed_dim=config.embed_dim,
        image_resolution=vision.image_size_px,
        vision_layers=vision.layers if isinstance(vision, VisionTransformerConfig) else vision.blocks,
        vision_width=vision.width if is_vit else vision.width // 32,
        vision_patch_size=vision.patch_size_px if isinstance(vision, VisionTransformerConfig) else None,
        vision_head_width=vision.width // vision.heads,
        vocab_size=text.vocab_size,
        text_attention_probs_dropout_prob=text.dropout,
        text_hidden_act="gelu",
        text_hidden_dropout_prob=text.dropout,
        text_hidden_size=text.width,
        text_initializer_range=0.02,
        text_intermediate_size=4 * text.width,
        text_max_position_embeddings=text.max_positions,
        text_num_attention_heads=text.heads,
        text_num_hidden_layers=text.layers,
        text_type_vocab_size=2,
    )
    return reference.float()
