"""Compiling the layers of a model: one graph for each shape, which serves every layer of its kind."""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# torch gives up after 8 graphs of a function and computes it uncompiled from then on, in an order that a run
# which resumes need not have. Lengths of rows, sizes of micro-batches and passes without activations make
# a dozen or so.
_MOST_GRAPHS = 64


@functools.cache
def compiled(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a layer and tensors as torch compiles it, at its first call with each shape.

    What it computes for a shape does not depend on the shapes that came before.
    """
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    made: Callable[..., Any] = torch.compile(compute, dynamic=False)
    return made


def call(layer: nn.Module, *tensors: Any) -> Tensor:
    """Call a layer."""
    found: Tensor = layer(*tensors)
    return found


def lacks(*, on_gpu: bool) -> str:
    """Say what compiling needs and this machine does not have, and what to do; empty if all is there."""
    if on_gpu:
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
