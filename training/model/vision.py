"""Image towers: timm's modules shaped like OpenAI CLIP's, ending in the projection to the shared space."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from training.model.compiled import call
from training.model.compiled import compiled as get_compiled
from training.model.config import ModifiedResNetConfig, VisionConfig, VisionTransformerConfig


def build_image_tower(config: VisionConfig, embed_dim: int) -> "ImageTransformer | ModifiedResNet":
    """Build a module from image_BCHW (float, normalised) to feature_BD (not yet unit-norm), D = embed_dim.

    Initialised at random: timm's scheme for the towers, OpenAI CLIP's for the projections (normal, std =
    1/√inputs).
    """
    if isinstance(config, VisionTransformerConfig):
        return _vision_transformer(config, embed_dim)
    return _modified_resnet(config, embed_dim)


def _vision_transformer(config: VisionTransformerConfig, embed_dim: int) -> "ImageTransformer":
    """Build timm's `vit_*_clip_quickgelu_*`, or `vit_*_clip_*` with GELU; the projection has no bias."""
    tower = ImageTransformer(
        img_size=config.image_size_px,
        patch_size=config.patch_size_px,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=(config.feed_forward_width + 0.5) / config.width,  # timm rounds the product down
        num_classes=embed_dim,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer=config.activation,
    )
    projection = nn.Linear(config.width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=config.width**-0.5)
    tower.head = projection
    return tower


def _modified_resnet(config: ModifiedResNetConfig, embed_dim: int) -> "ModifiedResNet":
    """Build timm's `resnet50_clip` in any width and depth."""
    stem_width = config.width // 32
    stages = tuple(
        ByoBlockCfg(type="bottle", d=blocks, c=stem_width * 4 * 2**stage, s=1 if stage == 0 else 2, br=0.25)
        for stage, blocks in enumerate(config.blocks)
    )
    layout = ByoModelCfg(
        blocks=stages,
        stem_chs=(stem_width // 2, stem_width // 2, stem_width),
        stem_type="",
        stem_pool="avg2",
        downsample="avg",
        aa_layer="avg",
        head_type="attn_abs",
    )
    tower = ModifiedResNet(layout, num_classes=embed_dim, img_size=config.image_size_px)
    projection: nn.Linear = tower.get_submodule("head.proj")  # type: ignore[assignment]
    nn.init.normal_(projection.weight, std=config.width**-0.5)
    return tower


class ImageTransformer(VisionTransformer):  # type: ignore[misc]
    """VisionTransformer that can compute on a part of the patches, and its blocks compiled."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # timm's place for it, after the positions and before the blocks
        self.patch_drop = _KeptPatches()  # type: ignore[assignment]
        self._block = call

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, *, kept_BP: torch.Tensor | None = None, compiled: bool = False
    ) -> torch.Tensor:
        """Return feature_BD of image_BCHW.

        `kept_BP` (int64) are the patches to compute on, all if unset. `compiled` has torch compile a block,
        once for each shape.
        """
        kept_patches = cast(_KeptPatches, self.patch_drop)
        kept_patches.kept_BP, self._block = kept_BP, get_compiled(call) if compiled else call
        try:
            feature_BD: torch.Tensor = self.forward_head(self.forward_features(x))
            return feature_BD
        finally:
            kept_patches.kept_BP, self._block = None, call

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return tokens_BTW of image_BCHW: timm's computation, block by block."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._block, block, x, use_reentrant=False)
            else:
                x = self._block(block, x)
        tokens_BTW: torch.Tensor = self.norm(x)
        return tokens_BTW


class _KeptPatches(nn.Module):
    """The class token and the patches that are kept (FLIP: Li et al. 2023, section 3)."""

    kept_BP: torch.Tensor | None = None

    def forward(self, tokens_BTW: torch.Tensor) -> torch.Tensor:
        if self.kept_BP is None:
            return tokens_BTW
        index_BP1 = self.kept_BP[:, :, None] + 1  # the class token stands before the patches
        kept_BPW = tokens_BTW.gather(1, index_BP1.expand(-1, -1, tokens_BTW.shape[2]))
        return torch.cat([tokens_BTW[:, :1], kept_BPW], dim=1)


class ModifiedResNet(ByobNet):  # type: ignore[misc]
    """ByobNet in channels-last layout, whose activation checkpointing leaves running statistics alone.

    Checkpointing runs a stage's forward twice; timm's would let both passes update the running mean and
    variance, so that a checkpointed run would evaluate differently from a plain one.
    """

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        # channels last: a fifth less time on a CPU, and what tensor cores want
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            if self.grad_checkpointing and torch.is_grad_enabled():
                contexts = partial(_first_pass_and_recomputation, stage)
                x = checkpoint(stage, x, use_reentrant=False, context_fn=contexts)
            else:
                x = stage(x)
        return x


def _first_pass_and_recomputation(stage: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _running_statistics_kept(stage)


@contextlib.contextmanager
def _running_statistics_kept(stage: nn.Module) -> Iterator[None]:
    """Let batch norms normalise by the batch as always, without updating their running statistics."""
    norms = [module for module in stage.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked
