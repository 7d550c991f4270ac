"""The model sizes: the paper's five (Tables 1, 6 and 7) as literals, ViT-B/32, two larger, and small ones.

A model is one literal here: parameters, FLOPs, memory, weights and recipes follow from its sizes.

Facts that the tables do not print, from the released weights:
- every ViT of the paper uses QuickGELU, ViT-H/14 included (LAION trained its weights with GELU; Chinese CLIP
  runs them with QuickGELU, and so does this project);
- ViT-H/14 has 16 heads of width 80, the paper's other ViTs heads of width 64;
- the released RoBERTa-wwm-large has 16 heads, although Table 6 prints 24: 16 is used here.
"""

from dataclasses import dataclass, replace
from typing import Literal

RESNET_CELL_PX = 32  # of an image becomes one cell of a ResNet's last map

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTransformerConfig:
    """A ViT image tower as in OpenAI CLIP (Table 6)."""

    kind: Literal["vit"] = "vit"
    image_size_px: int  # side of the square input, pixels (Table 1)
    patch_size_px: int  # side of one patch, pixels
    layers: int  # transformer blocks
    width: int  # hidden width
    heads: int  # attention heads
    feed_forward: int | None = None  # width of the feed-forward layers; unset: 4 × `width`, as in the paper
    activation: Activation = "quick_gelu"  # of the feed-forward layers; the paper's models have QuickGELU

    @property
    def feed_forward_width(self) -> int:
        """Width of the feed-forward layers."""
        return 4 * self.width if self.feed_forward is None else self.feed_forward

    @property
    def num_patches(self) -> int:
        """Patches of an image, without the class token."""
        return (self.image_size_px // self.patch_size_px) ** 2

    def num_kept(self, patch_mask: float) -> int:
        """Return how many patches are left if the share `patch_mask` is not computed; at least one."""
        return max(1, round(self.num_patches * (1 - patch_mask)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModifiedResNetConfig:
    """A ResNet image tower as in OpenAI CLIP: anti-aliased strides, attention pooling (Table 7)."""

    kind: Literal["modified_resnet"] = "modified_resnet"
    image_size_px: int  # side of the square input, pixels (Table 1)
    blocks: tuple[int, int, int, int]  # bottleneck blocks of the four stages
    width: int  # channels of the last stage, as Table 7 counts: 32 × the stem's; a multiple of 64

    @property
    def heads(self) -> int:
        """Heads of the attention pooling, 64 wide."""
        return self.width // 64


VisionConfig = VisionTransformerConfig | ModifiedResNetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """A BERT text tower (Tables 6 and 7)."""

    layers: int  # transformer blocks
    width: int  # hidden width; the feed-forward layers are 4 × as wide
    heads: int  # attention heads
    vocab_size: int = 21128  # word pieces of Chinese BERT (A.1)
    max_positions: int = 512  # learned positions; captions use the first 52
    dropout: float = 0.1  # probability, on hidden states and attention, as BERT was trained
    init_std: float = 0.02  # of weights that come from no file; BERT's own


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Both towers and the width of the space they share."""

    name: str
    embed_dim: int  # width of the shared space (Tables 6 and 7)
    vision: VisionConfig
    text: TextConfig


def at_size(model: ModelConfig, image_size_px: int) -> ModelConfig:
    """Return a model for images of another size, under the same name.

    Raises:
        ValueError: if the size is no multiple of a patch, or of a ResNet's cell of 32 pixels.
    """
    vision = model.vision
    if image_size_px == vision.image_size_px:  # a small ResNet's own size may be no multiple
        return model
    cell = vision.patch_size_px if isinstance(vision, VisionTransformerConfig) else RESNET_CELL_PX
    if image_size_px < cell or image_size_px % cell:
        raise ValueError(
            f"an image size of {image_size_px} is not a multiple of {cell} pixels: choose a multiple"
        )
    return replace(model, vision=replace(vision, image_size_px=image_size_px))


RBT3 = TextConfig(layers=3, width=768, heads=12)
ROBERTA_WWM_BASE = TextConfig(layers=12, width=768, heads=12)
ROBERTA_WWM_LARGE = TextConfig(layers=24, width=1024, heads=16)

RN50 = ModelConfig(
    name="RN50",
    embed_dim=1024,
    vision=ModifiedResNetConfig(image_size_px=224, blocks=(3, 4, 6, 3), width=2048),
    text=RBT3,
)
VIT_B_16 = ModelConfig(
    name="ViT-B-16",
    embed_dim=512,
    vision=VisionTransformerConfig(image_size_px=224, patch_size_px=16, layers=12, width=768, heads=12),
    text=ROBERTA_WWM_BASE,
)
# Not in the paper: its released code has this size too.
VIT_B_32 = ModelConfig(
    name="ViT-B-32",
    embed_dim=512,
    vision=VisionTransformerConfig(image_size_px=224, patch_size_px=32, layers=12, width=768, heads=12),
    text=ROBERTA_WWM_BASE,
)
VIT_L_14 = ModelConfig(
    name="ViT-L-14",
    embed_dim=768,
    vision=VisionTransformerConfig(image_size_px=224, patch_size_px=14, layers=24, width=1024, heads=16),
    text=ROBERTA_WWM_BASE,
)
VIT_L_14_336 = ModelConfig(
    name="ViT-L-14-336",
    embed_dim=768,
    vision=VisionTransformerConfig(image_size_px=336, patch_size_px=14, layers=24, width=1024, heads=16),
    text=ROBERTA_WWM_BASE,
)
VIT_H_14 = ModelConfig(
    name="ViT-H-14",
    embed_dim=1024,
    vision=VisionTransformerConfig(image_size_px=224, patch_size_px=14, layers=32, width=1280, heads=16),
    text=ROBERTA_WWM_LARGE,
)
# Beyond the paper: OpenCLIP's two largest image towers (Cherti et al. 2023; sizes from its configurations)
# with the GELU that they were trained with, and the paper's largest text tower.
VIT_G_14 = ModelConfig(
    name="ViT-g-14",
    embed_dim=1024,
    vision=VisionTransformerConfig(
        image_size_px=224,
        patch_size_px=14,
        layers=40,
        width=1408,
        heads=16,
        feed_forward=6144,
        activation="gelu",
    ),
    text=ROBERTA_WWM_LARGE,
)
VIT_BIGG_14 = ModelConfig(
    name="ViT-bigG-14",
    embed_dim=1280,
    vision=VisionTransformerConfig(
        image_size_px=224,
        patch_size_px=14,
        layers=48,
        width=1664,
        heads=16,
        feed_forward=8192,
        activation="gelu",
    ),
    text=ROBERTA_WWM_LARGE,
)

# Trained from scratch on a laptop: the demo and the emoji run. Without dropout, since their corpora are a few
# thousand images and the augmentation already regularises.
TINY_RN = ModelConfig(
    name="tiny-rn",
    embed_dim=128,
    vision=ModifiedResNetConfig(image_size_px=48, blocks=(1, 1, 1, 1), width=1024),
    # From scratch at BERT's 0.02 so narrow a tower hardly moves words to [CLS]: 1 / √width instead.
    text=TextConfig(
        layers=2, width=128, heads=4, vocab_size=3000, max_positions=64, dropout=0.0, init_std=0.09
    ),
)
# The same for a ViT, which transformers' own ChineseCLIPModel can hold: a ResNet needs code of ours there.
SMALL_VIT = ModelConfig(
    name="small-vit",
    embed_dim=128,
    vision=VisionTransformerConfig(image_size_px=48, patch_size_px=8, layers=4, width=128, heads=2),
    text=TINY_RN.text,
)
# As small as a ViT can be and still have every part: for tests.
TINY_VIT = ModelConfig(
    name="tiny-vit",
    embed_dim=32,
    vision=VisionTransformerConfig(image_size_px=32, patch_size_px=8, layers=2, width=64, heads=2),
    text=TextConfig(layers=2, width=64, heads=2, vocab_size=1000, max_positions=64),
)

MODELS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        *(RN50, VIT_B_32, VIT_B_16, VIT_L_14, VIT_L_14_336, VIT_H_14, VIT_G_14, VIT_BIGG_14),
        *(TINY_RN, SMALL_VIT, TINY_VIT),
    )
}
