"""Opening Chinese-CLIP's LMDB, for the corpus and for evaluation sets; nothing in it is trusted."""

import io
import pickle
from typing import Any, ClassVar

from pipeline.core.records import InputError

# Numbers of places in the memo, and lengths of buffers, for which the machine in C takes memory at once.
_GREEDY = (pickle.LONG_BINPUT, pickle.BYTEARRAY8)
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
    """Tuples, numbers and strings; a pickle that names any class or function raises `UnpicklingError`.

    Damaged bytes can raise anything: catch `Exception`.
    """
    machine = _CarefulUnpickler if any(code in data for code in _GREEDY) else _PlainUnpickler
    return machine(io.BytesIO(data)).load()


def open_lmdb(path: str) -> Any:
    """A read-only LMDB environment; InputError where the folder is none, or the package `lmdb` is absent."""
    try:
        import lmdb
    except ImportError:
        raise InputError(
            f'{path}: reading LMDB needs the lmdb package: pip install "cnclip-pretraining[lmdb]"'
        ) from None
    try:
        return lmdb.open(path, readonly=True, create=False, lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"{path}: no LMDB ({error}); give the folder that holds lmdb/<split>") from None
