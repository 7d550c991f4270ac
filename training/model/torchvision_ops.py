"""Let `import torchvision` work next to a torch that its compiled extension was not built for.

The package index's torchvision is a CUDA build. Next to a CPU-only torch its `_C.so` does not load, and then
`import torchvision`, `import timm` and every model class of transformers fail with `operator torchvision::nms
does not exist`, because torchvision registers a fake kernel for an operator that is not declared. Declaring
the two operators without an implementation is enough for all that this project uses (transforms, AutoAugment,
model classes); `torchvision.ops.nms` itself stays unusable.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_library: Any = None  # the declarations live as long as this object


class _DeclareBeforeTorchvision(MetaPathFinder):
    """Finds nothing: takes the first import of torchvision as the moment to declare the operators."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare_operators()
        return None


def install() -> None:
    """Put the hook in place, once.

    It imports nothing until torchvision is imported.
    """
    # By name: an environment may have a copy of this module (`torchvision_site`), and once is enough.
    name = _DeclareBeforeTorchvision.__name__
    installed = any(type(finder).__name__ == name for finder in sys.meta_path)
    if not installed and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _DeclareBeforeTorchvision())


def _declare_operators() -> None:
    """Declare the operators only if torchvision's own extension cannot: declaring twice is an error."""
    global _library
    spec = PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return  # torchvision is not installed: its own import error says so
    import torch

    for extension in sorted(Path(spec.submodule_search_locations[0]).glob("_C*.so")):
        try:
            torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
        except OSError:
            continue
        return
    try:
        _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    except RuntimeError:  # a copy of this module has declared them, when somebody only looked for torchvision
        return
    for schema in _SCHEMAS:
        _library.define(schema)
