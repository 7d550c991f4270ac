"""What a DeepSpeed file has matrices multiplied in, also in passes that go around DeepSpeed's engine."""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from pipeline.core.records import ConfigError
from training.config.deepspeed_file import half_of, read_deepspeed_file
from training.config.train import TrainConfig


def compute_dtype(settings: dict[str, Any]) -> torch.dtype:
    """Return float32, or the 16-bit format of weights or autocast; `settings` are a DeepSpeed file's."""
    if settings.get("torch_autocast", {}).get("enabled"):
        return torch.bfloat16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[half_of(settings)]


def autocast_dtype(settings: dict[str, Any]) -> torch.dtype:
    """Return what the engine's forward pass casts to; float32 if it casts nothing."""
    return torch.float32 if half_of(settings) else compute_dtype(settings)


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """Return a context that multiplies matrices in `dtype` and leaves the weights; float32: no change."""
    is_half = dtype != torch.float32
    return torch.autocast(device_type, dtype if is_half else None, enabled=is_half)


def check_precision(config: TrainConfig) -> None:
    """Check that a DeepSpeed file's precision runs on this machine.

    Raises:
        ConfigError: if it cannot.
    """
    half = half_of(read_deepspeed_file(config.deepspeed))
    on = get_accelerator()
    # DeepSpeed calls fp16 supported on processors that multiply in it; training there was never tried.
    if half == "fp16" and (on.device_name() == "cpu" or not on.is_fp16_supported()):
        raise ConfigError(
            f"deepspeed = {config.deepspeed!r}: fp16 needs a GPU, and this machine computes on its"
            f" {on.device_name()}; take zero1 (float32) or zero1_bf16 here"
        )
