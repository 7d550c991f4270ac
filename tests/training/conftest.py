"""Makes timm and torchvision importable for tests in any order."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import training.model  # noqa: F401
from tests.helpers.hub_server import Hub, ask_here, hub_server

torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that serves nothing yet; the process has an empty cache."""
    with hub_server() as server:
        ask_here(server, tmp_path / "cache", monkeypatch)
        yield server
