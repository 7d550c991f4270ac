"""Opening Chinese-CLIP's LMDB, for the corpus and for evaluation sets; nothing in it is trusted."""

import io
import pickle
import pickletools
from typing import Any, ClassVar

from pipeline.core.records import InputError

_MOST_PLACES = 1 << 16  # in the memo; the machine in C takes memory up to the highest at once
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"names {module}.{name}")


class _CarefulUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """As `_PlainUnpickler`, in Python: its memo is a dict."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"names {module}.{name}")


def unpickle_plain(data: bytes) -> Any:
    """Read a pickle of tuples, numbers and strings.

    Damaged bytes can raise anything: catch `Exception`.

    Raises:
        UnpicklingError: if the pickle names any class or function.
    """
    machine = _CarefulUnpickler if _is_greedy(data) else _PlainUnpickler
    return machine(io.BytesIO(data)).load()


def _is_greedy(data: bytes) -> bool:
    """Return whether a pickle has opcodes for which the machine in C takes memory that the bytes do not fill.

    Looks for places in the memo and buffers only among the opcodes: an image has any byte somewhere.
    """
    for opcode, argument, _ in pickletools.genops(data):
        place = argument if opcode.name in _PUTS and isinstance(argument, int) else 0
        if opcode.name == "BYTEARRAY8" or not 0 <= place < _MOST_PLACES:
            return True
    return False


def open_lmdb(path: str) -> Any:
    """Open an LMDB environment read-only.

    Raises:
        InputError: if the folder is not one, or the package `lmdb` is not installed.
    """
    try:
        import lmdb
    except ImportError:
        raise InputError(
            f'{path}: reading LMDB needs the lmdb package: pip install "cnclip-pretraining[lmdb]"'
        ) from None
    try:
        return lmdb.open(path, readonly=True, create=False, lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"{path}: not an LMDB ({error}); give the folder that holds lmdb/<split>") from None
