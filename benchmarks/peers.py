"""Make cn_clip's model, loss and data set run on any device and without a database."""

import base64
import contextlib
import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from training.model import torchvision_ops
from training.model.config import ModelConfig, VisionTransformerConfig


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
