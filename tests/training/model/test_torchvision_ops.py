"""The hook that makes torchvision importable with a torch for which it was not built."""

import subprocess
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import pytest
import torch

from training.model import torchvision_ops


def test_torchvision_imports_after_the_model_package_and_costs_nothing_before() -> None:
    code = (
        "import sys, training.model; print('torch' in sys.modules);"
        "import torchvision; print(torchvision.transforms.Resize.__name__)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "Resize"]


def _pretend_torchvision(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """A torchvision with an extension file; returns the list that will hold the operators declared for it."""
    (folder / "_C.so").touch()
    spec = ModuleSpec("torchvision", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    declared: list[str] = []

    class Library:
        def __init__(self, namespace: str, kind: str) -> None:
            assert (namespace, kind) == ("torchvision", "DEF")

        def define(self, schema: str) -> None:
            declared.append(schema.split("(")[0])

    monkeypatch.setattr(PathFinder, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(torchvision_ops, "_library", None)
    return declared


def test_operators_are_declared_where_the_extension_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    declared = _pretend_torchvision(monkeypatch, tmp_path)
    torchvision_ops._declare_operators()
    assert declared == ["nms", "qnms"]


def test_nothing_is_declared_where_the_extension_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    declared = _pretend_torchvision(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    torchvision_ops._declare_operators()
    assert declared == []
