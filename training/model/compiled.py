"""Compiling the layers of a model: one graph for each shape, which serves every layer of its kind."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# torch gives up after 8 graphs of a function and computes it uncompiled from then on, in an order that a run
# which resumes need not have. Lengths of rows, sizes of micro-batches and passes without activations make
# a dozen or so.
_MOST_GRAPHS = 64


@functools.cache
def compiled(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of a layer and tensors as torch compiles it, at its first call with each shape.

    What it computes for a shape does not depend on the shapes that came before.
    """
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    made: Callable[..., Tensor] = torch.compile(compute, dynamic=False)
    return made


def call(layer: nn.Module, *tensors: Any) -> Tensor:
    """Call a layer."""
    found: Tensor = layer(*tensors)
    return found
