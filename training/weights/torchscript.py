"""TorchScript archives, the form in which OpenAI publishes CLIP: tensors read from them and written to them.

An archive is a zip: pickled modules (`data.pkl`), the source of their classes (`code/`), and a file of raw
bytes for each tensor (`data/`). torch's own functions are not used: they are deprecated, loading runs the
code that an archive brings along, and saving numbers class names by a counter of the process, so that the
same weights give other bytes in another process. The reader here takes tensors and runs nothing; the writer
is deterministic.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pipeline.core import store
from pipeline.core.files.foreign import foreign
from training.weights.pickle_machine import Foreign
from training.weights.unpickle import unpickle

_STORAGE_OF_DTYPE = {
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.float32: "FloatStorage",
    torch.float64: "DoubleStorage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that zip knows


_WHAT, _REMEDY = "TorchScript archive of tensors", "give one of OpenAI CLIP's"


def read_torchscript(path: str) -> dict[str, torch.Tensor]:
    """Return an archive's tensors by dotted name, as `torch.jit.load(path).state_dict()`, on the CPU.

    Raises:
        InputError: if the file is not a TorchScript archive, is damaged, or pickles anything but modules,
            tensors and plain values.
    """
    root = unpickle(path, _WHAT, _REMEDY)
    with foreign(path, _WHAT, _REMEDY):
        return _named_tensors(root)


def _named_tensors(root: Any) -> dict[str, torch.Tensor]:
    if not isinstance(root, Foreign) or not root.kind.startswith("__torch__."):
        raise pickle.UnpicklingError(f"it holds a {type(root).__name__} instead of modules")
    found: dict[str, torch.Tensor] = {}
    waiting, seen = [("", root)], set[int]()
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen and module.attributes:
            raise pickle.UnpicklingError("a module is at two places of its tree")
        seen.add(id(module))
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor):
                found[prefix + name] = value
            elif isinstance(value, Foreign) and value.kind.startswith("__torch__."):
                waiting.append((f"{prefix}{name}.", value))
    return found


def write_torchscript(
    path: str, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]
) -> None:
    """Write an archive for which `torch.jit.load(path).state_dict()` gives these tensors by these names.

    Names are dotted; its modules have no methods. The same tensors in the same order give the same bytes.
    """
    root = _tree(parameters, buffers)
    tensors: list[torch.Tensor] = []
    pickled = pickle.PROTO + b"\x02" + _pickle_module(root, tensors) + pickle.STOP
    with store.publish(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _add(archive, "data.pkl", pickled)
        _add(archive, "code/__torch__.py", "".join(_class_sources(root)).encode())
        _add(archive, "constants.pkl", pickle.PROTO + b"\x02" + pickle.EMPTY_TUPLE + pickle.STOP)
        _add(archive, "version", b"3\n")
        _add(archive, "byteorder", b"little")
        for key, tensor in enumerate(tensors):
            _add(archive, f"data/{key}", tensor.view(-1).view(torch.uint8).numpy().tobytes())


class _Node:
    """One module to write; each has its own class, because classes list their tensors."""

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        self.parameters: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self.children: dict[str, _Node] = {}


def _tree(parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> _Node:
    root = _Node("Model")
    for kind, tensors in (("parameters", parameters), ("buffers", buffers)):
        for dotted_name, tensor in tensors.items():
            node = root
            *path, name = dotted_name.split(".")
            for step in path:
                node = node.children.setdefault(step, _Node(f"{node.class_name}_{step}"))
            getattr(node, kind)[name] = tensor.detach().cpu().contiguous()
    return root


def _class_sources(node: _Node) -> Iterator[str]:
    """Yield the TorchScript source of a module's class after those of its children."""
    for child in node.children.values():
        yield from _class_sources(child)
    yield f"class {node.class_name}(Module):\n"
    for field, tensors in (("__parameters__", node.parameters), ("__buffers__", node.buffers)):
        yield f"  {field} = {json.dumps(list(tensors))}\n"
    for name in [*node.parameters, *node.buffers]:
        yield f"  {name} : Tensor\n"
    yield "  training : bool\n"
    for name, child in node.children.items():
        # modules in a list are named by their number, which is no identifier
        yield f'  __annotations__["{name}"] = __torch__.{child.class_name}\n'


def _pickle_module(node: _Node, tensors: list[torch.Tensor]) -> bytes:
    """Write the opcodes that build the module; append its tensors, whose places in the list are their
    keys.
    """
    attributes = b""
    for name, tensor in [*node.parameters.items(), *node.buffers.items()]:
        attributes += _pickle_text(name) + _pickle_tensor(tensor, len(tensors), name in node.parameters)
        tensors.append(tensor)
    attributes += _pickle_text("training") + pickle.NEWFALSE
    for name, child in node.children.items():
        attributes += _pickle_text(name) + _pickle_module(child, tensors)
    return (
        _pickle_global("__torch__", node.class_name)
        + (pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        + (pickle.EMPTY_DICT + pickle.MARK + attributes + pickle.SETITEMS)
        + pickle.BUILD
    )


def _pickle_tensor(tensor: torch.Tensor, key: int, requires_grad: bool) -> bytes:
    storage = _pickle_tuple(
        _pickle_text("storage"),
        _pickle_global("torch", _STORAGE_OF_DTYPE[tensor.dtype]),
        _pickle_text(str(key)),
        _pickle_text("cpu"),
        _pickle_int(tensor.numel()),
    )
    arguments = _pickle_tuple(
        storage + pickle.BINPERSID,
        _pickle_int(0),
        _pickle_tuple(*map(_pickle_int, tensor.shape)),
        _pickle_tuple(*map(_pickle_int, tensor.stride())),
        pickle.NEWTRUE if requires_grad else pickle.NEWFALSE,
        _pickle_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    )
    return _pickle_global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _pickle_global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _pickle_text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _pickle_int(value: int) -> bytes:
    """Write an integer as torch writes sizes: four bytes if they do, else eight."""
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _pickle_tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(f"archive/{name}", date_time=_ZIP_TIME), data)
