"""Random patch masking: in training, the image tower sees a part of each image (FLIP, Li et al. 2023).

Which patches are kept is a function of (seed, epoch, key), so of the step as well: it depends on no rank and
no micro-batch, and a forward pass that is repeated for the gradient keeps the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.core.records import ConfigError
from training.config.train import TrainConfig
from training.model.config import ModelConfig, VisionTransformerConfig

_PURPOSE = 1  # a word of the generator's counter that the view's draws (training.data.augment) have at 0


@dataclass(frozen=True, slots=True)
class PatchMask:
    """How many of an image's patches are kept."""

    num_patches: int
    num_kept: int
    seed: int

    def draw(self, keys: Sequence[bytes], epochs: Sequence[int]) -> torch.Tensor:
        """Return kept_BP, int64: the patches that each visit of a sample keeps, in raster order."""
        kept = [self._draw_one(key, epoch) for key, epoch in zip(keys, epochs, strict=True)]
        return torch.from_numpy(np.stack(kept))

    def _draw_one(self, key: bytes, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        counter = [0, _PURPOSE, epoch, self.seed]
        random = np.random.Generator(np.random.Philox(key=int(key, 16), counter=counter))
        return np.sort(random.permutation(self.num_patches)[: self.num_kept])


def make_patch_mask(config: TrainConfig, model: ModelConfig, stage: str, seed: int) -> PatchMask | None:
    """Return the mask that a stage asks for, or None.

    Raises:
        ConfigError: if the tower has no patches.
    """
    if not config.patch_mask:
        return None
    if not isinstance(model.vision, VisionTransformerConfig):
        raise ConfigError(
            f"[{stage}] patch_mask = {config.patch_mask}: {model.name} has a ResNet, which computes on whole"
            " images; set patch_mask = 0 or take a ViT"
        )
    return PatchMask(model.vision.num_patches, model.vision.num_kept(config.patch_mask), seed)
