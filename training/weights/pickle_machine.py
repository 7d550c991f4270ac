"""A pickle machine for weights: it builds tensors and plain containers, and runs nothing that a file brings.

It reads what `torch.save` writes, in the zip format and in the older one, and TorchScript's modules. Objects
of any other class (numpy's scalars, `argparse.Namespace`, a library's settings) become a `Foreign`: their
arguments, items and attributes, and none of their code. Names of Python's own library are refused unless
they are listed in `_HARMLESS`: nothing that weights come with asks for `os.system`.

`torch.load(weights_only=True)` is not used: it stops at the first object that it does not know, even far
from the tensors, and takes memory for storages and memo places that a damaged file makes up.
"""

import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

_MOST_OBJECTS = 500_000
_MOST_CLASSES = 10_000
_MEMO_PLACES = 1 << 32
_MOST_DIMENSIONS = 16
_DTYPE_OF_STORAGE = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# Classes of Python's own library that settings and counters next to weights are made of.
_HARMLESS = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "datetime.date",
        "datetime.datetime",
        "datetime.timedelta",
        "decimal.Decimal",
        "fractions.Fraction",
        "functools.partial",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePath",
        "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath",
        "pathlib.WindowsPath",
        "random.Random",
        "types.SimpleNamespace",
        "uuid.UUID",
        *(
            f"builtins.{name}"
            for name in ("bytearray", "bytes", "complex", "frozenset", "object", "range", "set", "slice")
        ),
        *(f"builtins.{name}" for name in ("bool", "float", "int", "long", "str", "unicode", "xrange")),
    }
)


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_KEY_BITS = 60  # of integers as keys: larger ones can be chosen to collide


class RefusedName(pickle.UnpicklingError):
    """The pickle asks for something of Python's own library that weights have no need of."""


class Foreign(dict[Any, Any]):
    """An object of a class that is not known here, as what the pickle says of it."""

    kind = ""  # full name of its class
    arguments: tuple[Any, ...]
    attributes: dict[str, Any]

    def __new__(cls, *arguments: Any, **_: Any) -> "Foreign":
        made = super().__new__(cls)
        made.arguments, made.attributes = arguments, {}
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def append(self, item: Any) -> None:
        """Ignore the item: items of a list are of no use here."""

    def extend(self, items: Iterable[Any]) -> None:
        """Ignore the items: items of a list are of no use here."""

    @property
    def is_module(self) -> bool:
        """True for a whole torch.nn.Module."""
        return {"_parameters", "_modules"} <= self.attributes.keys()


class Unreadable(Foreign):
    """A tensor of numbers that no model has."""

    kind = "a tensor of complex or quantised numbers"


class Storages(Protocol):
    """The bytes of a file's storages."""

    def flat(self, place: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that lie at a place: its start and its size in bytes."""


@dataclass(frozen=True, slots=True)
class _Storage:
    flat: torch.Tensor


# The machine in Python, because the one in C allocates memory up to any place in its memo that a file names.
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class WeightsUnpickler(_PythonUnpickler):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: Any, data: Storages, places: Mapping[str, tuple[int, int]] | None) -> None:
        """Take the `places` of the storages by key; None if they are not known yet: tensors are then left
        out.
        """
        super().__init__(file)
        self._data, self._places = data, places
        self._storages: dict[tuple[str, torch.dtype], _Storage] = {}
        self._classes: dict[str, type[Foreign]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._num_objects = 0

    def find_class(self, module: str, name: str) -> Any:
        self._count(1)
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        if full in _BUILDERS:
            return _BUILDERS[full]
        top = module.partition(".")[0]
        if top == "torch":
            if name in _DTYPE_OF_STORAGE:
                return _DTYPE_OF_STORAGE[name]
            if module == "torch" and name in _DTYPES:
                return _DTYPES[name]
            if module == "torch.jit._pickle" and name.startswith("build_"):
                return _list
        elif top in sys.stdlib_module_names and top != "__main__" and full not in _HARMLESS:
            raise RefusedName(full)
        if full not in self._classes:
            if len(self._classes) == _MOST_CLASSES:
                raise pickle.UnpicklingError(f"it names more than {_MOST_CLASSES:,} classes")
            self._classes[full] = type("Foreign", (Foreign,), {"kind": full})
        return self._classes[full]

    def persistent_load(self, pid: Any) -> _Storage | None:
        """Return the bytes of one storage; the device it was saved from does not matter."""
        _, dtype, key, _, numel, *view = pid
        if not isinstance(dtype, torch.dtype):
            return None  # of complex or quantised numbers: what is built of it is no tensor for us
        if not isinstance(key, str) or not isinstance(numel, int):
            raise pickle.UnpicklingError("a storage without a name or a size")
        if view and view[0] is not None:
            raise pickle.UnpicklingError("a storage that is a part of another one; save it again")
        self.dtypes[key] = dtype
        if self._places is None:
            return None
        if (key, dtype) not in self._storages:
            if key not in self._places:
                raise pickle.UnpicklingError(f"the bytes of its storage {key} are missing")
            if numel * dtype.itemsize > self._places[key][1]:
                raise pickle.UnpicklingError(
                    f"its storage {key} has {self._places[key][1]:,} bytes, and should have"
                    f" {numel * dtype.itemsize:,}"
                )
            self._storages[key, dtype] = _Storage(self._data.flat(self._places[key], dtype))
        return self._storages[key, dtype]

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("a class by number")

    def _load_build(self) -> None:
        """Keep an object's state with the object; never set it on what lives on after the file is read."""
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Foreign):
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    self._count(1 + len(part))
                    made.attributes |= {key: value for key, value in part.items() if isinstance(key, str)}
        elif not isinstance(made, dict | list | torch.Tensor):  # an OrderedDict has `_metadata`
            raise pickle.UnpicklingError(f"it sets the state of a {type(made).__name__}")

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], (key, value))

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        _set_items(self.stack[-1], items)

    def _load_set(self) -> None:
        self._count(1)
        self.append(Foreign())

    def _load_additems(self) -> None:
        self.pop_mark()

    def _load_frozenset(self) -> None:
        self._count(1)
        self.pop_mark()
        self.append(Foreign())

    def _load_put(self) -> None:
        self.memo[self._place()] = self.stack[-1]

    def _load_get(self) -> None:
        self.append(self.memo[self._place()])

    def _place(self) -> int:
        """Read the number of a place in the memo: large ones can be chosen to collide."""
        place = int(self.readline())
        if not 0 <= place < _MEMO_PLACES:
            raise pickle.UnpicklingError("a place in the memo that cannot be")
        return place

    def _refuse_buffer(self) -> None:
        raise pickle.UnpicklingError("a buffer of bytes, which torch.save never writes")

    def _load_reduce(self) -> None:
        arguments = self._arguments()
        self.stack[-1] = self.stack[-1](*arguments)

    def _load_newobj(self) -> None:
        arguments = self._arguments()
        self.stack[-1] = self.stack[-1].__new__(self.stack[-1], *arguments)

    def _refuse_object(self) -> None:
        raise pickle.UnpicklingError("an object by an opcode that torch.save never writes")

    def _arguments(self) -> tuple[Any, ...]:
        """Take what a call is given off the stack: it is copied, so it counts."""
        arguments = self.stack.pop()
        if type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"a call with a {type(arguments).__name__} in place of arguments")
        self._count(1 + len(arguments))
        return arguments

    def _count(self, number: int) -> None:
        self._num_objects += number
        if self._num_objects > _MOST_OBJECTS:
            raise pickle.UnpicklingError(f"it makes more than {_MOST_OBJECTS:,} objects")

    dispatch[pickle.PUT[0]] = _load_put
    dispatch[pickle.GET[0]] = _load_get
    dispatch[pickle.BUILD[0]] = _load_build
    dispatch[pickle.REDUCE[0]] = _load_reduce
    dispatch[pickle.NEWOBJ[0]] = _load_newobj
    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.DICT[0]] = _load_dict
    dispatch[pickle.EMPTY_SET[0]] = _load_set
    dispatch[pickle.ADDITEMS[0]] = _load_additems
    dispatch[pickle.FROZENSET[0]] = _load_frozenset
    dispatch[pickle.BYTEARRAY8[0]] = _refuse_buffer
    dispatch[pickle.NEWOBJ_EX[0]] = _refuse_object
    dispatch[pickle.OBJ[0]] = _refuse_object
    dispatch[pickle.INST[0]] = _refuse_object


def _set_items(target: Any, items: Any) -> None:
    """Set keys and values, one after the other, of a dict; keys are kept if hashing them is cheap.

    The hash of a tuple is recomputed each time: forty nested ones would take for ever.
    """
    if not isinstance(target, dict):
        raise pickle.UnpicklingError(f"it sets items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str | float | None) or (isinstance(key, int) and key.bit_length() < _KEY_BITS):
            target[key] = value


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    if storage is None:
        return Unreadable()
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    if not (isinstance(size, tuple | list) and isinstance(stride, tuple | list)):
        raise pickle.UnpicklingError("a tensor without a shape")
    size, stride = tuple(size), tuple(stride)
    numbers = (offset, *size, *stride)
    if len(size) > _MOST_DIMENSIONS or not all(type(one) is int and 0 <= one < 2**63 for one in numbers):
        raise pickle.UnpicklingError(f"a tensor of {len(size)} dimensions, not all of them sizes")
    numel, held = math.prod(size), storage.flat.numel()
    end = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True)) + 1 if numel else 0
    if numel > held or end > held:
        raise pickle.UnpicklingError(
            f"a tensor of {numel:,} numbers out of bounds: its storage holds {held:,} of them"
        )
    return storage.flat.as_strided(size, stride, storage.flat.storage_offset() + offset)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    """Do what `_rebuild_tensor` does, for a storage that does not say what its bytes are."""
    if isinstance(storage, _Storage) and isinstance(dtype, torch.dtype):
        storage = _Storage(storage.flat.view(dtype))
    return _rebuild_tensor(storage, offset, size, stride)


def _first(value: Any = None, *_: Any) -> Any:
    return value


def _rebuild_from_type(function: Callable[..., Any], kind: Any, arguments: Any, state: Any) -> Any:
    return function(*arguments)


def _reconstruct(kind: Any, *_: Any) -> Foreign:
    return kind() if isinstance(kind, type) and issubclass(kind, Foreign) else Foreign()


# What is given is passed on, not copied: a file may ask a million times for a copy of a million items.
def _list(items: Any = None, *_: Any) -> Any:
    return items if isinstance(items, list | tuple) else []


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    if pairs:
        raise pickle.UnpicklingError("an OrderedDict as Python 2 wrote it: save it again with Python 3")
    return OrderedDict()


def _counter(counts: Any = None, *_: Any) -> dict[Any, Any]:
    return counts if isinstance(counts, dict) else {}


def _default_dict(*_: Any) -> dict[Any, Any]:
    return {}


_BUILDERS: Mapping[str, Any] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.jit._pickle.restore_type_tag": _first,
    "torch.Size": _list,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "collections.defaultdict": _default_dict,
    "collections.deque": _list,
    "copyreg._reconstructor": _reconstruct,
    "builtins.dict": _counter,
    "builtins.list": _list,
    "builtins.tuple": _list,
}
