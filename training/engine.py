"""DeepSpeed around the model: from a file of deepspeed_configs to one optimizer step."""

import datetime
import json
import math
import os
from importlib import resources
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn
from torch import distributed as dist

from pipeline.records import ConfigError
from training.config import TrainConfig
from training.data import Batch
from training.loss import contrastive_loss
from training.model.clip import CLIP
from training.model.preprocess import MEAN, STD
from training.optim import build_optimizer

# What a DeepSpeed file may hold. Everything else is the run's TOML's or changes what is learned.
_MEMORY_AND_COMMUNICATION = ("communication_data_type", "prescale_gradients", "zero_optimization")
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's names for them
# One rank validates or writes while the others wait.
_COLLECTIVE_TIMEOUT = datetime.timedelta(hours=4)


class ContrastiveStep(nn.Module):
    """What DeepSpeed wraps: a rank's part of a global batch in, the global batch's loss out."""

    def __init__(
        self, clip: CLIP, *, num_samples_of_ranks: tuple[int, ...], exclude_duplicates: bool
    ) -> None:
        super().__init__()
        self.clip = clip
        self._num_samples_of_ranks = num_samples_of_ranks
        self._exclude_duplicates = exclude_duplicates
        self._mean_C11: Tensor
        self._std_C11: Tensor
        self.register_buffer("_mean_C11", torch.tensor(MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std_C11", torch.tensor(STD).view(3, 1, 1) * 255, persistent=False)

    def forward(
        self, image_BCHW: Tensor, tokens_BL: Tensor, image_id_B: Tensor, caption_id_B: Tensor
    ) -> Tensor:
        """Loss, a scalar, of uint8 pictures and token ids."""
        pixel_BCHW = (image_BCHW.float() - self._mean_C11) / self._std_C11
        image_BD, text_BD = self.clip(pixel_BCHW, tokens_BL)
        return contrastive_loss(
            image_BD,
            text_BD,
            self.clip.logit_scale,
            num_samples_of_ranks=self._num_samples_of_ranks,
            image_id_B=image_id_B if self._exclude_duplicates else None,
            caption_id_B=caption_id_B if self._exclude_duplicates else None,
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


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """A file of deepspeed_configs by its stem, or any path that ends in .json.

    ConfigError for a key that is not about memory or communication. Training is in float32.
    """
    path = resources.files("deepspeed_configs") / f"{name}.json"
    try:
        if name.endswith(".json"):
            with open(name, encoding="utf-8") as file:
                text = file.read()
        else:
            text = path.read_text(encoding="utf-8")
    except OSError:
        entries = (entry.name for entry in resources.files("deepspeed_configs").iterdir())
        known = ", ".join(sorted(entry.removesuffix(".json") for entry in entries if entry.endswith(".json")))
        raise ConfigError(
            f"deepspeed = {name!r}: no such file; known: {known}, or a path to a .json"
        ) from None
    try:
        config: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not valid JSON: {error}") from None
    foreign = sorted(set(config) - set(_MEMORY_AND_COMMUNICATION))
    if foreign:
        raise ConfigError(
            f"{name}: {foreign[0]}: a DeepSpeed file holds memory and communication only"
            f" ({', '.join(_MEMORY_AND_COMMUNICATION)}); the rest stands in the run's TOML"
        )
    if config.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            f"{name}: ZeRO stage 3 is not supported: checkpoints read whole parameters; use stage 2"
        )
    return config


def build_engine(clip: CLIP, config: TrainConfig, num_samples_of_ranks: tuple[int, ...]) -> Any:
    """A DeepSpeed engine around `ContrastiveStep`; its optimizer holds the trainable parameters alone."""
    step = ContrastiveStep(
        clip, num_samples_of_ranks=num_samples_of_ranks, exclude_duplicates=config.exclude_duplicates
    )
    # DeepSpeed's batch size feeds only its own speed report here: a rank's share may be uneven, and the whole
    # global batch is one micro-batch, since the contrastive loss needs all of it at once.
    engine, *_ = deepspeed.initialize(
        model=step,
        optimizer=build_optimizer(clip, config),
        config={
            **read_deepspeed_config(config.deepspeed),
            "gradient_clipping": config.max_gradient_norm or 0.0,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
        },
        dist_init_required=False,
    )
    _make_adam_state(engine)
    return engine


def adam_of(engine: Any) -> torch.optim.AdamW:
    """The AdamW inside: of the model's parameters at ZeRO stage 0, else of a flat partition of each group."""
    optimizer = engine.optimizer
    adam: torch.optim.AdamW = optimizer.optimizer if _is_zero(engine) else optimizer
    return adam


def _is_zero(engine: Any) -> bool:
    return hasattr(engine.optimizer, "single_partition_of_fp32_groups")


def _make_adam_state(engine: Any) -> None:
    """Make the state that Adam would make at its first step.

    DeepSpeed links parameters to their part of it after the first *group's* first step, when the second group
    has none yet, and never again: with two groups, a checkpoint would find half of the moments.
    """
    adam = adam_of(engine)
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
    if _is_zero(engine):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def train_step(engine: Any, batch: Batch, learning_rate: float, max_temperature: float, seed: int) -> float:
    """One optimizer step on a global batch; returns its loss. A loss that is not finite changes nothing."""
    # Dropout draws from here: whatever ran before, also in a run that was resumed, the step is the same.
    purpose = np.random.SeedSequence([seed, batch.step, dist.get_rank()])
    torch.manual_seed(int(purpose.generate_state(1, np.uint64)[0]))
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    device = engine.module.clip.logit_scale.device
    loss: Tensor = engine(
        batch.image_BCHW.to(device, non_blocking=True),
        batch.tokens_BL.to(device, non_blocking=True),
        batch.image_id_B.to(device),
        batch.caption_id_B.to(device),
    )
    value = loss.item()
    if math.isfinite(value):
        # The loss's gradients add up over ranks; DeepSpeed averages.
        engine.backward(loss * dist.get_world_size())
        engine.step()
        clamp_temperature(engine.module.clip, max_temperature)
        average_batch_norms(engine.module.clip)
    return value


def clamp_temperature(clip: CLIP, max_temperature: float) -> None:
    """Keep the logits' scale in [1, max_temperature] (Table 8), in the float32 master too.

    Clamping the module alone would be undone by the next step, which writes the master over it.
    """
    scale = clip.logit_scale
    master = safe_get_full_fp32_param(scale) if hasattr(scale, "_hp_mapping") else scale.detach()
    clamped = master.clamp(0, math.log(max_temperature))
    if not torch.equal(clamped, master):
        if hasattr(scale, "_hp_mapping"):
            safe_set_full_fp32_param(scale, clamped)
        scale.data.copy_(clamped)


def average_batch_norms(clip: CLIP) -> None:
    """Give all ranks the mean of their running statistics, so that every rank holds the same model.

    Normalisation itself stays within a rank, as in the released training.
    """
    running = [
        buffer
        for module in clip.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not running or dist.get_world_size() == 1:
        return
    flat = torch.cat(running)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(running, torch.split(flat, [buffer.numel() for buffer in running]), strict=True):
        buffer.copy_(mean)


def load_weights(engine: Any, weights: dict[str, Tensor]) -> None:
    """Set the model's weights and the masters behind them, by the names of `CLIP.state_dict`."""
    clip: CLIP = engine.module.clip
    clip.load_state_dict(weights)
    for name, parameter in clip.named_parameters():
        if hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))


def gather_weights(engine: Any) -> dict[str, Tensor]:
    """All weights and buffers by the names of `CLIP.state_dict`, on the CPU.

    Parameters come from their masters. A collective: every rank calls it.
    """
    clip: CLIP = engine.module.clip
    weights = {name: tensor.detach() for name, tensor in clip.state_dict().items()}
    for name, parameter in clip.named_parameters():
        if hasattr(parameter, "_hp_mapping"):
            weights[name] = safe_get_full_fp32_param(parameter)
    return {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
