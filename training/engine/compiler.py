"""Whether torch compiles the model's layers in training, and whether this machine has what that takes."""

import importlib.util
import os
import shutil

from deepspeed.accelerator import get_accelerator

from pipeline.core.records import ConfigError
from training.config.deepspeed_file import read_deepspeed_file
from training.config.train import TrainConfig


def compiles(config: TrainConfig) -> bool:
    """Return true if the run asks for it, or says nothing and there is a GPU with all that it takes."""
    if config.compile is not None:
        return config.compile
    zero = read_deepspeed_file(config.deepspeed).get("zero_optimization", {})
    return _computes_on_gpu() and zero.get("stage", 0) < 3 and not _lacks()


def check_compiler(config: TrainConfig, stage: str) -> None:
    """Check that torch has what it needs to compile, if the run asks for it.

    Raises:
        ConfigError: if it does not.
    """
    if config.compile and (lacks := _lacks()):
        raise ConfigError(f"[{stage}] compile = true: {lacks}, or set compile = false")


def _computes_on_gpu() -> bool:
    return bool(get_accelerator().device_name() == "cuda")


def _lacks() -> str:
    """Say what is not there and what to do; empty if all is there."""
    if _computes_on_gpu():
        if importlib.util.find_spec("triton") is None:
            return (
                "Triton, which writes kernels for the GPU, is not installed; install it (pip install triton)"
            )
        variable, names, package = "CC", ["gcc", "clang", "cc"], "gcc"
    else:
        variable, names, package = "CXX", ["g++"], "g++"
    if own := os.environ.get(variable):
        names = [own]
    if any(shutil.which(name) for name in names):
        return ""
    return f"no compiler: {names[0]} is not there; install one (apt-get install {package}), set {variable}"
