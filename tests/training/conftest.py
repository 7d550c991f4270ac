"""Make timm and torchvision importable first, and keep the models that a test registers to itself."""

from collections.abc import Iterator

import pytest
import torch

import training.model  # noqa: F401
from training.model.config import MODELS

torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def registered_models() -> Iterator[None]:
    """Forget the model sizes that a test added: messages of later tests list all that are known."""
    before = dict(MODELS)
    yield
    MODELS.clear()
    MODELS.update(before)
