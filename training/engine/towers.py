"""What DeepSpeed wraps, and what is used of its engine."""

import functools
import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from training.config.deepspeed_file import read_deepspeed_file
from training.config.train import TrainConfig
from training.data.loader import Batch
from training.engine.averages import RunningAverages
from training.engine.compiler import compiles
from training.engine.precision import autocast, autocast_dtype, compute_dtype
from training.engine.teacher import Teacher, TeacherFeatures
from training.losses.contrastive import contrastive_loss
from training.losses.distillation import distillation_loss
from training.losses.negation import negation_loss
from training.losses.sigmoid import sigmoid_loss
from training.model.clip import CLIP
from training.model.preprocess import normalise
from training.model.transfer import send
from training.model.vision import ImageTransformer


class Features(NamedTuple):
    """What the towers make of a rank's part of a batch, or of a micro-batch."""

    image_BD: Tensor
    text_BD: Tensor
    logit_scale: Tensor  # [1], the logarithm of the factor on cosines
    statement_B2D: Tensor | None = None  # the true and the false statement, if the run asks
    logit_bias: Tensor | None = None  # [1], added to scaled cosines by the sigmoid loss


class Towers(nn.Module):
    """What DeepSpeed wraps: a rank's images and captions in, features and the temperature out."""

    def __init__(
        self,
        clip: CLIP,
        *,
        num_samples_of_ranks: tuple[int, ...],
        config: TrainConfig,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.averages: RunningAverages | None = None  # rank 0 has them, if the stage averages weights
        self.teacher, self._negation = teacher, config.negation
        self._num_samples_of_ranks = num_samples_of_ranks
        self._knows_ids = config.exclude_duplicates or config.several_positives
        self._several_positives = config.several_positives
        settings = read_deepspeed_file(config.deepspeed)
        self._autocast_dtype, self.compute_dtype = autocast_dtype(settings), compute_dtype(settings)
        self.exact: dict[str, Tensor] = {}  # parameters that are not trained, if the model rounds them
        # Gradients travel while micro-batches go back, so all ranks need the same number of them.
        largest = config.micro_batch or max(num_samples_of_ranks)
        self.num_micro_batches = math.ceil(max(num_samples_of_ranks) / largest)
        self.judges_gradients = False  # `build_engine` sets it: a step does, and not DeepSpeed
        self.max_gradient_norm = config.max_gradient_norm
        # A validation goes around what is compiled: its batches have other shapes.
        self._is_compiled, self._encode_image = compiles(config), clip.encode_image
        if self._is_compiled and clip.image_tower_locked:
            # As a whole, and for any number of images, since a shard's last ones are fewer.
            self._encode_image = torch.compile(clip.encode_image)
        elif self._is_compiled and isinstance(clip.visual, ImageTransformer):
            self._encode_image = functools.partial(clip.encode_image, compiled=True)

    def forward(self, image: Tensor, tokens_XL: Tensor, kept_BP: Tensor | None = None) -> Features:
        """Return features in float32, unit-norm.

        `image` is uint8 images [B, C, H, W], or features [B, D] that are already there. Texts are the B
        captions, and after them a true and a false statement each if the run asks. `kept_BP` are the
        patches to compute on.
        """
        scale = self.clip.logit_scale.float().clone()
        bias = None if self.clip.logit_bias is None else self.clip.logit_bias.float().clone()
        image_BD = image.float() if image.ndim == 2 else self.encode_image(image, kept_BP)
        text_XD = self.clip.encode_text(tokens_XL, compiled=self._is_compiled)
        text_BD, statement_SD = text_XD.tensor_split([len(image)])
        if not len(statement_SD):
            return Features(image_BD, text_BD, scale, logit_bias=bias)
        return Features(image_BD, text_BD, scale, statement_SD.view(len(image), 2, -1), bias)

    def encode_image(self, image_BCHW: Tensor, kept_BP: Tensor | None = None) -> Tensor:
        """Return unit-norm feature_BD in float32 of uint8 images; compiled if the run asks for it."""
        return self._encode_image(normalise(image_BCHW), kept_BP)

    def autocast(self) -> torch.autocast:
        """Return a context that computes as DeepSpeed's engine does, for a pass that goes around it."""
        return autocast(self.clip.logit_scale.device.type, self._autocast_dtype)

    def teacher_features(self, image_BCHW: Tensor, tokens_BL: Tensor) -> TeacherFeatures | None:
        """Return what the teacher gives for uint8 images and captions, if there is one."""
        if self.teacher is None:
            return None
        return self.teacher.features(normalise(image_BCHW), tokens_BL)

    def loss(
        self,
        features: Features,
        batch: Batch,
        *,
        taught: TeacherFeatures | None = None,
    ) -> Tensor:
        """Return the loss of the global batch, a scalar: contrastive, and what else the run asks for."""
        image_BD, text_BD, logit_scale, statement_B2D, logit_bias = features
        device, sizes = image_BD.device, self._num_samples_of_ranks
        of_pairs: Any = {
            "num_samples_of_ranks": sizes,
            "image_id_B": send(batch.image_id_B, device) if self._knows_ids else None,
            "caption_id_B": send(batch.caption_id_B, device) if self._knows_ids else None,
            "are_positives": self._several_positives,
        }
        if logit_bias is None:
            loss = contrastive_loss(image_BD, text_BD, logit_scale, **of_pairs)
        else:
            loss = sigmoid_loss(image_BD, text_BD, logit_scale, logit_bias, **of_pairs)
        if self.teacher is not None and taught is not None:
            loss = loss + self.teacher.config.weight * distillation_loss(
                image_BD,
                text_BD,
                logit_scale,
                taught.image_BE,
                taught.text_BE,
                self.teacher.scale,
                temperature=self.teacher.config.temperature,
                num_samples_of_ranks=sizes,
            )
        if self._negation is not None and batch.questions is not None and statement_B2D is not None:
            asked_B = send(batch.questions.asked_B, device)
            loss = loss + self._negation.weight * negation_loss(
                image_BD, statement_B2D, logit_scale, asked_B, sum(sizes)
            )
        return loss


class Engine(Protocol):
    """What is used of `deepspeed.DeepSpeedEngine` around `Towers`."""

    @property
    def module(self) -> Towers: ...

    @property
    def optimizer(self) -> Any: ...

    def __call__(self, image: Tensor, tokens_XL: Tensor, kept_BP: Tensor | None = None) -> Features: ...

    def train(self) -> object: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...

    def fp16_enabled(self) -> bool: ...

    def zero_optimization(self) -> bool: ...

    def zero_optimization_partition_weights(self) -> bool: ...


def running_statistics(clip: CLIP) -> list[Tensor]:
    """Return the buffers of the batch norms that learn: means, variances and counts."""
    return [
        buffer
        for module in clip.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in (module.running_mean, module.running_var, module.num_batches_tracked)
        if buffer is not None
    ]
