"""A larger model whose similarities a smaller one learns (the paper's future work, section 5)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.records import ConfigError
from training.config.train import DistilConfig, TrainConfig
from training.engine.precision import autocast
from training.model.clip import CLIP
from training.weights.formats import load_model


@dataclass(frozen=True, slots=True)
class TeacherFeatures:
    """What the teacher gives for one rank's part of a batch: unit-norm, without gradients."""

    image_BE: Tensor
    text_BE: Tensor


class Teacher:
    """A frozen model.

    It is no part of the module that DeepSpeed wraps, so that nothing of it is trained.
    """

    def __init__(self, clip: CLIP, config: DistilConfig) -> None:
        self.config = config
        self._clip = clip.eval().requires_grad_(False)
        self._dtype = torch.float32

    @property
    def scale(self) -> Tensor:
        """The [1] factor on its cosines."""
        return self._clip.logit_scale.exp()

    def prepare(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Move to a device, and compute in `dtype` from now on; the weights stay float32."""
        self._clip.to(device)
        self._dtype = dtype

    @torch.no_grad()
    def features(self, image_BCHW: Tensor, tokens_BL: Tensor) -> TeacherFeatures:
        """Return float32 features of whole images, normalised for the image tower, and of captions."""
        with autocast(image_BCHW.device.type, self._dtype):
            return TeacherFeatures(*self._clip(image_BCHW, tokens_BL))


def load_teacher(config: TrainConfig, student: CLIP, stage: str) -> Teacher | None:
    """Return the teacher that a stage names, or None.

    Raises:
        ConfigError: if it cannot see what the student sees: another vocabulary or image size, or too few
            positions.
        InputError: if the weights cannot be read.
    """
    if config.distil is None:
        return None
    clip = load_model(config.distil.teacher)
    for name, theirs, ours in (
        ("a vocabulary of", clip.config.text.vocab_size, student.config.text.vocab_size),
        ("images of", clip.config.vision.image_size_px, student.config.vision.image_size_px),
    ):
        if theirs != ours:
            raise ConfigError(
                f"[{stage}] distil.teacher = {config.distil.teacher!r} has {name} {theirs}, the model {ours}:"
                " both must read the same tokens and pixels; take a teacher that does"
            )
    if clip.config.text.max_positions < config.context_length:
        raise ConfigError(
            f"[{stage}] distil.teacher = {config.distil.teacher!r} has {clip.config.text.max_positions}"
            f" positions, but context_length = {config.context_length}; shorten context_length"
        )
    return Teacher(clip, config.distil)
