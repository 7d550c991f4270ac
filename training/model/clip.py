"""The two-tower model (section 2.1 of the paper)."""

import dataclasses
import math
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from training.model.config import ModelConfig
from training.model.text import build_text_tower, encode_packed
from training.model.vision import build_image_tower

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
INITIAL_LOGIT_BIAS = -10.0  # SigLIP, Zhai et al. 2023, section 3: most pairs are negatives


class CLIP(nn.Module):
    """Image tower, text tower, text projection and temperature; the image projection belongs to `visual`.

    `logit_scale` is the logarithm of the factor on cosine similarities. Its shape is [1] here, since
    DeepSpeed cannot hold a parameter without dimensions; files store shape [] as Chinese CLIP's do.
    `logit_bias`, which the sigmoid loss adds to scaled cosines, is there after `add_logit_bias`.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = build_image_tower(config.vision, config.embed_dim)
        self.bert = build_text_tower(config.text)
        # A.2 and the released code: normal with std 1/√hidden, temperature 0.07
        self.text_projection = nn.Parameter(
            torch.randn(config.text.width, config.embed_dim) * config.text.width**-0.5
        )
        self.logit_scale = nn.Parameter(torch.full((1,), INITIAL_LOGIT_SCALE))
        self.register_parameter("logit_bias", None)
        self.image_tower_locked = False
        self._recompute_text = False

    def add_logit_bias(self) -> None:
        """Give the model the bias of the sigmoid loss, [1], where that loss starts."""
        self.logit_bias = nn.Parameter(torch.full((1,), INITIAL_LOGIT_BIAS))

    def encode_image(
        self, image_BCHW: torch.Tensor, kept_BP: torch.Tensor | None = None, *, compiled: bool = False
    ) -> torch.Tensor:
        """Return unit-norm feature_BD in float32 of images that are already resized and normalised.

        `kept_BP` are the patches that a ViT computes on, all if unset. `compiled` has torch compile a ViT's
        blocks. No graph is recorded if the image tower is locked.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.image_tower_locked):
            more: dict[str, Any] = {} if kept_BP is None else {"kept_BP": kept_BP}
            if compiled:
                more["compiled"] = True
            return F.normalize(self.visual(image_BCHW, **more).float(), dim=-1)

    def encode_text(self, tokens_BL: torch.Tensor, *, compiled: bool = False) -> torch.Tensor:
        """Return unit-norm feature_BD in float32 of integer token ids; id 0 is padding and costs nothing.

        The ids may be on the CPU wherever the model is, which is quicker: they are packed there. `compiled`
        has torch compile the layers.

        Raises:
            ValueError: if a row begins with padding.
        """
        recompute = self._recompute_text
        return self.project_text(encode_packed(self.bert, tokens_BL, recompute=recompute, compiled=compiled))

    def project_text(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        """Return unit-norm feature_BD in float32 of the text tower's hidden states at [CLS]."""
        return F.normalize((hidden_BH @ self.text_projection).float(), dim=-1)

    def forward(self, image_BCHW: torch.Tensor, tokens_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `encode_image` and `encode_text` of one batch."""
        return self.encode_image(image_BCHW), self.encode_text(tokens_BL)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, block by block in both towers (non-reentrant)."""
        self.visual.set_grad_checkpointing(enabled)
        self._recompute_text = enabled

    def lock_image_tower(self) -> None:
        """Freeze the image tower with its projection (stage 1, A.2).

        Its batch norms use and keep their running statistics from here on, also after `train()`.
        """
        self.image_tower_locked = True
        self.visual.requires_grad_(False)
        self.visual.eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode as of every module, but keep a locked image tower in evaluation: it learns nothing."""
        super().train(mode)
        if self.image_tower_locked:
            self.visual.eval()
        return self


def build_clip(config: ModelConfig, *, vocab_size: int | None = None) -> CLIP:
    """Build a model with random weights from torch's global generator, in training mode.

    `vocab_size` replaces the configuration's if the vocabulary was learned from the corpus; `CLIP.config`
    then says so.
    """
    if vocab_size is not None:
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab_size))
    return CLIP(config)
