"""Opening Chinese-CLIP's LMDB, for the corpus and for evaluation sets; nothing in it is trusted."""

import io
import pickle
from typing import Any

from pipeline.core.records import InputError


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"names {module}.{name}")


def unpickle_plain(data: bytes) -> Any:
    """Tuples, numbers and strings; a pickle that names any class or function raises `UnpicklingError`.

    Damaged bytes can raise anything: catch `Exception`.
    """
    return _PlainUnpickler(io.BytesIO(data)).load()


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
