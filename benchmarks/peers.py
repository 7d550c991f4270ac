"""Make cn_clip's model, loss and data set run on any device and without a database; and open_clip's model."""

import base64
import contextlib
import functools
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from training.model import torchvision_ops
from training.model.config import ModelConfig, VisionTransformerConfig
from training.model.text import build_text_tower

Peer = Literal["cn_clip", "open_clip"]


def cn_clip_of(config: ModelConfig) -> Any:
    """Return cn_clip's `CLIP` in float32 with random weights from torch's generator."""
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


def cn_clip_loss(model: Callable[..., Any], image: Tensor, text: Tensor, *, group: Any = None) -> Tensor:
    """Return cn_clip's `get_loss` of a batch: of one rank, or with `group` in place of torch.distributed."""
    torchvision_ops.install()  # cn_clip imports torchvision
    from cn_clip.training import train

    options = SimpleNamespace(
        accum_freq=1,
        aggregate=group is not None,
        gather_with_grad=False,
        distillation=False,
        mask_ratio=0,
        rank=0,
        local_device_rank=0,
        report_training_batch_acc=False,
    )
    with mock.patch.object(train, "dist", group or train.dist), cuda_is(image.device):
        loss: Tensor
        loss, _ = train.get_loss(model, image, text, F.cross_entropy, F.cross_entropy, options)
    return loss


@contextlib.contextmanager
def cuda_is(device: torch.device) -> Iterator[None]:
    """Let `.cuda()`, which cn_clip calls on everything, move tensors to `device`."""
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor.to(device)):
        yield


def cn_clip_transform(size_px: int) -> Any:
    """Return CN-CLIP's `_build_transform` for training (cn_clip/training/data.py)."""
    torchvision_ops.install()  # cn_clip imports torchvision
    from cn_clip.training.data import LMDBDataset

    data_set = LMDBDataset.__new__(LMDBDataset)  # its constructor opens a database
    data_set.split, data_set.use_augment = "train", True
    data_set.env_pairs = data_set.env_imgs = mock.Mock()  # which its destructor closes
    return data_set._build_transform(size_px)


def open_as_cn_clip(text: str) -> Image.Image:
    """Open an image as `LMDBDataset.__getitem__` does."""
    return Image.open(io.BytesIO(base64.urlsafe_b64decode(text)))


def open_clip_of(config: ModelConfig) -> Any:
    """Return open_clip's `CustomTextCLIP` in float32 with random weights.

    Its text tower is its `HFTextEncoder` around transformers' BERT of the same size, which computes on
    padding, too: the feature is the hidden state at [CLS], projected without a bias, as in Chinese CLIP.
    """
    torchvision_ops.install()  # open_clip imports torchvision
    import open_clip

    vision = config.vision
    is_vit = isinstance(vision, VisionTransformerConfig)
    with torch.device("meta"):
        bert = build_text_tower(config.text).config
    with tempfile.TemporaryDirectory() as folder:
        bert.save_pretrained(folder)
        return open_clip.CustomTextCLIP(
            config.embed_dim,
            open_clip.CLIPVisionCfg(
                layers=vision.layers if isinstance(vision, VisionTransformerConfig) else vision.blocks,
                width=vision.width if is_vit else vision.width // 32,
                head_width=vision.width // vision.heads,
                mlp_ratio=(
                    vision.feed_forward_width / vision.width
                    if isinstance(vision, VisionTransformerConfig)
                    else 4.0
                ),
                patch_size=vision.patch_size_px if isinstance(vision, VisionTransformerConfig) else 0,
                image_size=vision.image_size_px,
            ),
            open_clip.CLIPTextCfg(
                hf_model_name=folder,
                hf_model_pretrained=False,
                hf_proj_type="linear",
                hf_pooler_type="cls_last_hidden_state_pooler",
            ),
            quick_gelu=isinstance(vision, VisionTransformerConfig) and vision.activation == "quick_gelu",
        )


def open_clip_loss(model: Callable[..., Any], image: Tensor, text: Tensor) -> Tensor:
    """Return open_clip's `ClipLoss` of a batch of one rank."""
    loss: Tensor = _clip_loss()(*model(image, text))
    return loss


@functools.cache
def _clip_loss() -> Any:
    """Return it as open_clip's `--local-loss --gather-with-grad` makes it."""
    from open_clip import ClipLoss

    return ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)


def named_as_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a Chinese CLIP file under open_clip's names; the image tower's are the same."""
    named = {
        f"text.transformer.{name.removeprefix('bert.')}" if name.startswith("bert.") else name: tensor
        for name, tensor in state.items()
    }
    named["text.proj.weight"] = named.pop("text_projection").T
    return named


def named_as_chinese_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `named_as_open_clip` was given; cn_clip's names stay as they are."""
    return {
        "text_projection" if name == "text.proj.weight" else name.replace("text.transformer.", "bert.", 1): (
            tensor.T if name == "text.proj.weight" else tensor
        )
        for name, tensor in state.items()
    }
