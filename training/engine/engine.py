"""DeepSpeed around the model: from a file of deepspeed_configs to one optimizer step."""

import datetime
import math
import os
from collections.abc import Callable
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from pipeline.core.records import ConfigError
from training.config.deepspeed_file import DEEPSPEED_BUCKET_VALUES, half_of, read_deepspeed_file
from training.config.train import TrainConfig
from training.data.loader import Batch
from training.engine.optim import build_optimizer
from training.engine.precision import autocast, autocast_dtype, compute_dtype
from training.engine.teacher import Teacher, TeacherFeatures
from training.engine.zero_state import make_adam_state, set_weight, whole_weight
from training.losses.contrastive import contrastive_loss
from training.losses.distillation import distillation_loss
from training.losses.negation import negation_loss
from training.model.clip import CLIP
from training.model.preprocess import MEAN, STD, normalise

_SIDES = (0, 1, 3)  # of `Features`, those that have a row a sample
# One rank validates or writes while the others wait.
_COLLECTIVE_TIMEOUT = datetime.timedelta(hours=4)


class Towers(nn.Module):
    """What DeepSpeed wraps: a rank's pictures and captions in, features and the temperature out."""

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
        self.teacher, self._negation = teacher, config.negation
        self._num_samples_of_ranks = num_samples_of_ranks
        self._exclude_duplicates = config.exclude_duplicates
        settings = read_deepspeed_file(config.deepspeed)
        self._autocast_dtype, self.compute_dtype = autocast_dtype(settings), compute_dtype(settings)
        self.exact: dict[str, Tensor] = {}  # parameters that are not trained, where the model rounds them
        self.num_asked = 0  # questions of statements that this rank was asked
        self.skipped = ""  # why the last step changed nothing; empty: it did
        # Gradients travel while micro-batches go back, so all ranks need the same number of them.
        largest = config.micro_batch or max(num_samples_of_ranks)
        self.num_micro_batches = math.ceil(max(num_samples_of_ranks) / largest)
        self._mean_C11: Tensor
        self._std_C11: Tensor
        self.register_buffer("_mean_C11", torch.tensor(MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std_C11", torch.tensor(STD).view(3, 1, 1) * 255, persistent=False)
        # A validation goes around it: its batches have other sizes, and what is compiled depends on which
        # came first, which in a start from a checkpoint may be another.
        self._encode_image = torch.compile(clip.encode_image) if config.compile_image else clip.encode_image

    def forward(self, image: Tensor, tokens_XL: Tensor, kept_BP: Tensor | None = None) -> "Features":
        """Features in float32, unit-norm.

        `image` is uint8 pictures [B, C, H, W], or features [B, D] that are already there. Texts are the B
        captions, and after them a true and a false statement each where the run asks. `kept_BP` are the
        patches to compute on.
        """
        scale = self.clip.logit_scale.float().clone()
        image_BD = image.float() if image.ndim == 2 else self.encode_image(image, kept_BP)
        text_BD, statement_SD = self.clip.encode_text(tokens_XL).tensor_split([len(image)])
        if not len(statement_SD):
            return image_BD, text_BD, scale
        return image_BD, text_BD, scale, statement_SD.view(len(image), 2, -1)

    def encode_image(self, image_BCHW: Tensor, kept_BP: Tensor | None = None) -> Tensor:
        """Unit-norm feature_BD in float32 of uint8 pictures; compiled where the run asks for it."""
        return self._encode_image(self.normalise(image_BCHW), kept_BP)

    def normalise(self, image_BCHW: Tensor) -> Tensor:
        """float32 pixels as the image tower wants them, of uint8."""
        return normalise(image_BCHW, self._mean_C11.float(), self._std_C11.float())

    def autocast(self) -> torch.autocast:
        """What DeepSpeed's engine computes in, for a pass that goes around it."""
        return autocast(self._mean_C11.device.type, self._autocast_dtype)

    def teacher_features(self, image_BCHW: Tensor, tokens_BL: Tensor) -> TeacherFeatures | None:
        """What the teacher gives for uint8 pictures and captions, where there is one."""
        if self.teacher is None:
            return None
        return self.teacher.features(self.normalise(image_BCHW), tokens_BL)

    def loss(
        self,
        image_BD: Tensor,
        text_BD: Tensor,
        logit_scale: Tensor,
        batch: Batch,
        *,
        statement_B2D: Tensor | None = None,
        taught: TeacherFeatures | None = None,
    ) -> Tensor:
        """Loss of the global batch, a scalar: contrastive, and what else the run asks for."""
        device, sizes = image_BD.device, self._num_samples_of_ranks
        loss = contrastive_loss(
            image_BD,
            text_BD,
            logit_scale,
            num_samples_of_ranks=sizes,
            image_id_B=batch.image_id_B.to(device) if self._exclude_duplicates else None,
            caption_id_B=batch.caption_id_B.to(device) if self._exclude_duplicates else None,
        )
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
            self.num_asked += int(batch.questions.asked_B.sum())
            asked_B = batch.questions.asked_B.to(device)
            loss = loss + self._negation.weight * negation_loss(
                image_BD, statement_B2D, logit_scale, asked_B, sum(sizes)
            )
        return loss


# image_BD, text_BD, the [1] logarithm of the logits' scale and, where the run asks, statement_B2D
Features = tuple[Tensor, ...]


def _inputs(batch: Batch, part: slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """(pictures, token ids of captions and statements, patches) of some rows, as `Towers` reads them.

    Token ids stay on the CPU, where the text tower packs them: their padding is never computed on.
    """
    texts = [batch.tokens_BL[part]]
    if batch.questions is not None:
        texts.append(batch.questions.tokens_B2L[part].flatten(0, 1))
    longest = max(tokens.shape[1] for tokens in texts)
    tokens_XL = torch.cat([F.pad(tokens, (0, longest - tokens.shape[1])) for tokens in texts])
    kept_BP = None if batch.kept_BP is None else batch.kept_BP[part].to(device, non_blocking=True)
    return (
        batch.image[part].to(device, non_blocking=True),
        tokens_XL,
        kept_BP,
    )


def _loss(towers: Towers, features: Features, batch: Batch, taught: TeacherFeatures | None) -> Tensor:
    image_BD, text_BD, scale, *statements = features
    statement_B2D = statements[0] if statements else None
    return towers.loss(image_BD, text_BD, scale, batch, statement_B2D=statement_B2D, taught=taught)


def _joined(taught: list[TeacherFeatures]) -> TeacherFeatures | None:
    if not taught:
        return None
    return TeacherFeatures(
        torch.cat([part.image_BE for part in taught]), torch.cat([part.text_BE for part in taught])
    )


def join_ranks(config: TrainConfig) -> None:
    """Form the process group that the launcher's environment describes; ConfigError at another size."""
    # The operator is for tensor-parallel inference. Compiling it takes half a minute and a compiler, and a
    # kill while it compiles leaves a lock that every later start waits for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        accelerator.communication_backend_name(),
        auto_mpi_discovery=False,
        timeout=_COLLECTIVE_TIMEOUT,
        verbose=False,
    )
    if dist.get_world_size() != config.ranks:
        raise ConfigError(
            f"started as {dist.get_world_size()} ranks, but the stage says ranks = {config.ranks}"
        )


def build_engine(towers: Towers, config: TrainConfig) -> Any:
    """A DeepSpeed engine around the towers; its optimizer holds the trainable parameters alone.

    `training.engine.precision.check_precision` comes before.
    """
    settings, clip = read_deepspeed_file(config.deepspeed), towers.clip
    before: dict[str, Tensor] = {}
    if half_of(settings):
        before = {name: parameter.detach().clone() for name, parameter in clip.named_parameters()}
        clip.visual.register_forward_pre_hook(_as_the_weights)
    if towers.teacher is not None:
        towers.teacher.prepare(get_accelerator().current_device_name(), towers.compute_dtype)
    trained = sum(parameter.numel() for parameter in clip.parameters() if parameter.requires_grad)
    # DeepSpeed allocates its bucket for gradients whole, however few there are.
    bucket = {"reduce_bucket_size": min(DEEPSPEED_BUCKET_VALUES, trained)}
    # DeepSpeed's batch size feeds only its own speed report here: a rank's share may be uneven, and the
    # contrastive loss needs the whole global batch at once, so that micro-batches are ours.
    engine, *_ = deepspeed.initialize(
        model=towers,
        optimizer=build_optimizer(clip, config),
        config={
            **settings,
            "zero_optimization": {**bucket, **settings.get("zero_optimization", {})},
            "gradient_clipping": config.max_gradient_norm or 0.0,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # torch's AdamW steps on the CPU too; DeepSpeed's own would have to be compiled.
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    if engine.zero_optimization_partition_weights():
        # `Towers` uses them outside of the module that owns them.
        for parameter in (clip.logit_scale, clip.text_projection):
            deepspeed.zero.register_external_parameter(engine.module, parameter)
    make_adam_state(engine)
    for name, parameter in clip.named_parameters():
        if name in before and parameter.requires_grad:
            set_weight(parameter, before.pop(name))  # DeepSpeed made the master from the rounded copy
    towers.exact = before  # locked weights: rounded copies compute, and what is written at the end are these
    return engine


def _as_the_weights(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(tensor.to(dtype) for tensor in inputs)


def train_step(engine: Any, batch: Batch, learning_rate: float, max_temperature: float, seed: int) -> float:
    """One optimizer step on a global batch; returns its loss.

    A loss or a gradient that is not finite changes nothing; `Towers.skipped` then says which it was.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    towers: Towers = engine.module
    statistics = [(tensor, tensor.clone()) for tensor in _running_statistics(towers.clip)]
    compute_loss = _whole_batch if towers.num_micro_batches == 1 else _in_micro_batches
    value, backward = compute_loss(engine, batch, seed)
    towers.skipped = "" if math.isfinite(value) else f"the loss is {value}"
    if not towers.skipped and not _backward_and_step(engine, backward):
        towers.skipped = "the gradient is not finite"
    if towers.skipped:
        for tensor, before in statistics:
            tensor.copy_(before)
        return value
    clamp_temperature(towers.clip, max_temperature)
    average_batch_norms(towers.clip)
    return value


def _backward_and_step(engine: Any, backward: Callable[[], None]) -> bool:
    """False where the gradient is not finite: the weights and Adam's state are then as before."""
    backward()
    if engine.zero_optimization():
        engine.step()  # looks at the gradient's norm first, over all ranks
        # In float16 an overflow is how DeepSpeed finds the loss scale: it leaves the step out and goes on.
        return bool(engine.fp16_enabled() or not engine.optimizer.overflow)
    # Every rank has the whole gradient, already averaged.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if not bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
        engine.zero_grad()
        return False
    engine.step()
    return True


def _whole_batch(engine: Any, batch: Batch, seed: int) -> tuple[float, Callable[[], None]]:
    """(loss, what its backward pass is) with all activations held."""
    _seed_dropout(seed, batch.step)
    device = engine.module.clip.logit_scale.device
    image, tokens_XL, kept_BP = _inputs(batch, slice(None), device)
    taught = engine.module.teacher_features(image, tokens_XL[: len(image)])
    loss = _loss(engine.module, engine(image, tokens_XL, kept_BP), batch, taught)
    # The loss's gradients add up over ranks; DeepSpeed averages.
    return loss.item(), lambda: engine.backward(loss * dist.get_world_size())


def _in_micro_batches(engine: Any, batch: Batch, seed: int) -> tuple[float, Callable[[], None]]:
    """The same with the activations of one micro-batch held at a time (Gao et al. 2021, GradCache).

    A first pass without activations gives every feature; the loss over the whole global batch gives each
    feature's gradient; then every micro-batch runs again, with the same dropout, and takes the gradients of
    its own features back. What a locked tower gave in the first pass is not computed again.

    A batch norm that is trained normalises within a micro-batch, as it does within a rank, and its running
    statistics see every micro-batch once.

    A rank with fewer samples than another has micro-batches computes its first sample again where it has none
    left: collectives want every rank. What comes of it is dropped.
    """
    towers: Towers = engine.module
    device = towers.clip.logit_scale.device
    rows = np.arange(len(batch.tokens_BL))
    num_parts = min(towers.num_micro_batches, len(rows))
    parts = [slice(part[0], part[-1] + 1) for part in np.array_split(rows, num_parts)]
    parts += [slice(0, 1)] * (towers.num_micro_batches - num_parts)

    statistics = [(tensor, tensor.clone()) for tensor in _running_statistics(towers.clip)]
    features, taught = list[Features](), list[TeacherFeatures]()
    with torch.no_grad():
        for number, part in enumerate(parts):
            image, tokens_XL, kept_BP = _inputs(batch, part, device)
            _seed_dropout(seed, batch.step, number)
            with towers.autocast():
                features.append(towers(image, tokens_XL, kept_BP))
            if (known := towers.teacher_features(image, tokens_XL[: len(image)])) is not None:
                taught.append(known)
    for tensor, before in statistics:
        tensor.copy_(before)
    features, taught = features[:num_parts], taught[:num_parts]
    scale = features[0][2].requires_grad_()
    image_BD, *texts = (
        torch.cat([found[side] for found in features]) for side in _SIDES[: len(features[0]) - 1]
    )
    leaves = (
        image_BD.requires_grad_(not towers.clip.image_tower_locked),
        *(text.requires_grad_() for text in texts),
    )
    loss = _loss(towers, (*leaves[:2], scale, *leaves[2:]), batch, _joined(taught))

    def backward() -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            engine.set_gradient_accumulation_boundary(is_last)
            _seed_dropout(seed, batch.step, number)
            image, tokens_XL, kept_BP = _inputs(batch, part, device)
            if towers.clip.image_tower_locked:
                image = image_BD[part].detach()
            statistics_before = [tensor.clone() for tensor, _ in statistics]
            again = engine(image, tokens_XL, kept_BP)
            is_extra = number >= num_parts
            # The temperature's gradient is the whole batch's, so it goes back once.
            surrogate = (again[2] * scale.grad * is_last).sum()
            # Linear in the features, with the slope that the loss has there.
            for side, leaf in zip(_SIDES, leaves, strict=False):
                if leaf.grad is not None:
                    slope = torch.zeros_like(leaf.grad[part]) if is_extra else leaf.grad[part]
                    surrogate = surrogate + (slope * again[side]).sum()
            engine.backward(surrogate * dist.get_world_size())
            if is_extra:  # only now: the backward pass reads the statistics as the forward pass left them
                for (tensor, _), before in zip(statistics, statistics_before, strict=True):
                    tensor.copy_(before)

    return loss.item(), backward


def _seed_dropout(seed: int, step: int, *micro_batch: int) -> None:
    """Dropout draws from here: whatever ran before, also in a run that was resumed, it is the same."""
    purpose = np.random.SeedSequence([seed, step, dist.get_rank(), *micro_batch])
    torch.manual_seed(int(purpose.generate_state(1, np.uint64)[0]))


def clamp_temperature(clip: CLIP, max_temperature: float) -> None:
    """Keep the logits' scale in [1, max_temperature] (Table 8), in the float32 master too.

    Clamping the module alone would be undone by the next step, which writes the master over it.
    """
    master = whole_weight(clip.logit_scale)
    clamped = master.clamp(0, math.log(max_temperature))
    if not torch.equal(clamped, master):
        set_weight(clip.logit_scale, clamped)


def average_batch_norms(clip: CLIP) -> None:
    """Give all ranks the mean of their running statistics, so that every rank holds the same model.

    Normalisation itself stays within a rank, as in the released training.
    """
    running = [tensor for tensor in _running_statistics(clip) if tensor.is_floating_point()]
    if not running or dist.get_world_size() == 1:
        return
    flat = torch.cat(running)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(running, torch.split(flat, [buffer.numel() for buffer in running]), strict=True):
        buffer.copy_(mean)


def _running_statistics(clip: CLIP) -> list[Tensor]:
    """Buffers of the batch norms that learn: means, variances and counts."""
    return [
        buffer
        for module in clip.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in (module.running_mean, module.running_var, module.num_batches_tracked)
        if buffer is not None
    ]


def load_weights(engine: Any, weights: dict[str, Tensor]) -> None:
    """Set the model's weights and the masters behind them, by the names of `CLIP.state_dict`."""
    clip: CLIP = engine.module.clip
    for name, parameter in clip.named_parameters():
        set_weight(parameter, weights[name])
    for name, buffer in clip.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])


def logit_scale(engine: Any) -> Tensor:
    """The [1] logarithm of the factor on cosine similarities; a collective."""
    return whole_weight(engine.module.clip.logit_scale)
