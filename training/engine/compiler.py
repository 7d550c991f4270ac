"""Whether torch compiles the model's layers in training, and whether this machine has what that takes."""

from deepspeed.accelerator import get_accelerator

from pipeline.core.records import ConfigError
from training.config.deepspeed_file import read_deepspeed_file
from training.config.train import TrainConfig
from training.model.compiled import lacks


def compiles(config: TrainConfig) -> bool:
    """Return true if the run asks for it, or says nothing and there is a GPU with all that it takes."""
    if config.compile is not None:
        return config.compile
    zero = read_deepspeed_file(config.deepspeed).get("zero_optimization", {})
    return _computes_on_gpu() and zero.get("stage", 0) < 3 and not lacks(on_gpu=True)


def check_compiler(config: TrainConfig, stage: str) -> None:
    """Check that torch has what it needs to compile, if the run asks for it.

    Raises:
        ConfigError: if it does not.
    """
    if config.compile and (reason := lacks(on_gpu=_computes_on_gpu())):
        raise ConfigError(f"[{stage}] compile = true: {reason}, or set compile = false")


def _computes_on_gpu() -> bool:
    return bool(get_accelerator().device_name() == "cuda")
