"""DeepSpeed around the model: from a file of deepspeed_configs to one optimizer step."""

import datetime
import math
import os
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch import distributed as dist

from pipeline.core.records import ConfigError
from training.config.deepspeed_file import (
    BUCKET_VALUES,
    accumulates_in_float32,
    half_of,
    judges_gradients,
    overlaps_communication,
    read_deepspeed_file,
)
from training.config.train import TrainConfig
from training.data.loader import Batch
from training.engine.float8 import multiply_in_float8
from training.engine.gradients import step_if_finite
from training.engine.micro_batches import in_micro_batches, whole_batch
from training.engine.optim import build_optimizer
from training.engine.towers import Engine, Towers, running_statistics
from training.engine.zero_state import clamp_weight, make_adam_state, own_master, set_weight
from training.model.clip import CLIP

# Rank 0 may wait for a checkpoint, or write the model, while the others wait for it.
_COLLECTIVE_TIMEOUT = datetime.timedelta(hours=4)


def join_ranks(config: TrainConfig) -> None:
    """Form the process group that the launcher's environment describes.

    Raises:
        ConfigError: if it has another size than the stage's `ranks`.
    """
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


def build_engine(towers: Towers, config: TrainConfig) -> Engine:
    """Build a DeepSpeed engine around the towers; its optimizer holds only the trainable parameters.

    `training.engine.precision.check_precision` and `training.engine.float8.check_device` come before.
    """
    settings, clip = read_deepspeed_file(config.deepspeed), towers.clip
    towers.judges_gradients = judges_gradients(settings, towers.num_micro_batches)
    before: dict[str, Tensor] = {}
    if half_of(settings):
        before = {name: parameter.detach().clone() for name, parameter in clip.named_parameters()}
        clip.visual.register_forward_pre_hook(_as_the_weights)
    if config.fp8:
        multiply_in_float8(clip)
    if towers.teacher is not None:
        towers.teacher.prepare(get_accelerator().current_device_name(), towers.compute_dtype)
    engine: Engine
    engine, *_ = deepspeed.initialize(
        model=towers,
        optimizer=build_optimizer(clip, config),
        config=_with_own_settings(settings, towers, config),
        dist_init_required=False,
    )
    if engine.zero_optimization_partition_weights():
        # `Towers` uses them outside of the module that owns them.
        for parameter in (clip.logit_scale, clip.logit_bias, clip.text_projection):
            if parameter is not None:
                deepspeed.zero.register_external_parameter(engine.module, parameter)
    make_adam_state(engine)
    for name, parameter in clip.named_parameters():
        if name in before and parameter.requires_grad:
            set_weight(parameter, before.pop(name))  # DeepSpeed made the master from the rounded copy
    towers.exact = before  # locked weights: rounded copies compute, and what is written at the end are these
    return engine


def _with_own_settings(settings: dict[str, Any], towers: Towers, config: TrainConfig) -> dict[str, Any]:
    """Return a DeepSpeed file's settings with what training decides.

    Of `zero_optimization`, what the file says goes first.
    """
    zero: dict[str, Any] = settings.get("zero_optimization", {})
    trained = sum(parameter.numel() for parameter in towers.clip.parameters() if parameter.requires_grad)
    # DeepSpeed allocates its bucket for gradients whole, however few there are.
    own: dict[str, Any] = {"reduce_bucket_size": min(BUCKET_VALUES, trained)}
    more: dict[str, Any] = {}
    # A CPU has nothing that could compute meanwhile, and adds up in another order then.
    if get_accelerator().device_name() != "cpu" and overlaps_communication(settings, config.ranks):
        own["overlap_comm"] = True
    if towers.judges_gradients:  # see `step_if_finite`: DeepSpeed would look at every gradient once more
        if zero.get("stage"):
            own["compute_grad_norm"] = False
        if half_of(settings) == "bf16":
            more["bf16"] = {**settings["bf16"], "check_grad_overflow": False}
    if accumulates_in_float32(settings, towers.num_micro_batches):
        more["data_types"] = {"grad_accum_dtype": "fp32"}
    return {
        **settings,
        **more,
        "zero_optimization": {**own, **zero},
        "gradient_clipping": 0.0 if towers.judges_gradients else config.max_gradient_norm or 0.0,
        # DeepSpeed's batch size feeds only its own speed report here: a rank's share may be uneven, and the
        # contrastive loss needs the whole global batch at once, so that micro-batches are ours.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # torch's AdamW steps on the CPU too; DeepSpeed's own would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def _as_the_weights(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(tensor.to(dtype) for tensor in inputs)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did; its tensors are scalars on the device, for which nobody has waited yet."""

    loss: Tensor  # of the global batch
    is_skipped: Tensor  # the step changed nothing: the loss or a gradient is not finite
    temperature: Tensor  # the factor on cosines after it; 0 if only other ranks have it
    num_statements: int  # questions of statements that this rank was asked
    learning_rate: float  # that it was taken with


def train_step(
    engine: Engine, batch: Batch, learning_rate: float, max_temperature: float, seed: int
) -> StepResult:
    """Take one optimizer step on a global batch; the host only says what is to be done.

    A loss or a gradient that is not finite changes nothing.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    towers: Towers = engine.module
    statistics = [(tensor, tensor.clone()) for tensor in running_statistics(towers.clip)]
    compute_loss = whole_batch if towers.num_micro_batches == 1 else in_micro_batches
    loss, backward = compute_loss(engine, batch, seed)
    backward()
    is_skipped = step_if_finite(engine, loss, towers.max_gradient_norm)
    average_batch_norms(towers.clip)
    for tensor, before in statistics:
        tensor.copy_(torch.where(is_skipped, before, tensor))
    scale = towers.clip.logit_scale
    # Table 8's limits of the factor on cosines
    clamp_weight(scale, 0.0, math.log(max_temperature), unless=is_skipped)
    temperature = torch.cat([own_master(scale).to(loss.device).exp(), loss.new_zeros(1)]).max()
    num_statements = 0 if batch.questions is None else int(batch.questions.asked_B.numpy().sum())
    return StepResult(loss, is_skipped, temperature, num_statements, learning_rate)


def average_batch_norms(clip: CLIP) -> None:
    """Give all ranks the mean of their running statistics, so that every rank holds the same model.

    Normalisation itself stays within a rank, as in the released training.
    """
    running = [tensor for tensor in running_statistics(clip) if tensor.is_floating_point()]
    if not running or dist.get_world_size() == 1:
        return
    flat = torch.cat(running)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(running, torch.split(flat, [buffer.numel() for buffer in running]), strict=True):
        buffer.copy_(mean)


def load_weights(engine: Engine, weights: dict[str, Tensor]) -> None:
    """Set the model's weights and the masters behind them, by the names of `CLIP.state_dict`."""
    clip: CLIP = engine.module.clip
    for name, parameter in clip.named_parameters():
        set_weight(parameter, weights[name])
    for name, buffer in clip.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])
