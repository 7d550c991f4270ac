"""Pickled weights in files: the zip of `torch.save` and `torch.jit.save`, and torch's older format."""

import io
import mmap
import pickle
import warnings
import zipfile
from typing import IO, Any

import fsspec
import torch

from pipeline.core import store
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError
from training.weights.pickle_machine import RefusedName, WeightsUnpickler

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# The pickle of ViT-H/14 with its optimizer has less than 1 MB. Each byte may take a microsecond or more, and
# that of the older format is read twice.
_PICKLE_BYTES = 2 << 20


def unpickle(path: str, what: str, remedy: str) -> Any:
    """Return what the pickle of a local file or a URL holds: of a zip, or of torch's older format.

    Raises:
        InputError: if it asks for what runs code, or cannot be read as `what`; it ends with `remedy`.
    """
    with foreign(path, what, remedy), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that is not writable
        local = local_copy(path)
        try:
            with open(local, "rb") as file:
                is_zip = file.read(4) == b"PK\x03\x04"
            return _read_archive(local) if is_zip else _read_legacy(local)
        except RefusedName as refused:
            raise InputError(
                f"{path}: its pickle asks for {refused}, which weights do not need: nothing was run;"
                " do not use this file"
            ) from None


def local_copy(path: str) -> str:
    """Return the path itself, or a temporary copy of what a URL names."""
    store.refuse_special(path)
    return path if store.is_local(path) else str(fsspec.open_local(f"simplecache::{path}"))


def _read_archive(path: str) -> Any:
    """Read a zip of `torch.save` or `torch.jit.save`; its tensors are mapped, not copied."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        name = next((name for name in entries if name.endswith("/data.pkl")), None)
        if name is None:
            raise pickle.UnpicklingError("a zip without data.pkl")
        folder = name.removesuffix("data.pkl")
        if entries[name].file_size > _PICKLE_BYTES:
            raise pickle.UnpicklingError(
                f"its pickle has {entries[name].file_size:,} bytes, more than {_PICKLE_BYTES:,}"
            )
        data = _MappedFile(file)
        if (order := entries.get(f"{folder}byteorder")) is not None:
            start, size = _place(file, order, data.num_bytes)
            file.seek(start)
            if file.read(min(size, 6)) != b"little":
                raise pickle.UnpicklingError("written on a big-endian machine")
        places = {
            entry.removeprefix(f"{folder}data/"): _place(file, info, data.num_bytes)
            for entry, info in entries.items()
            if entry.startswith(f"{folder}data/")
        }
        if sum(size for _, size in places.values()) > data.num_bytes:
            raise pickle.UnpicklingError("its entries overlap")
        start, size = _place(file, entries[name], data.num_bytes)
        file.seek(start)
        return WeightsUnpickler(io.BytesIO(file.read(size)), data, places).load()


def _read_legacy(path: str) -> Any:
    """Read a file of the older format without a zip."""
    with open(path, "rb") as file:
        data, header = _MappedFile(file), []
        pickles = io.BytesIO(file.read(_PICKLE_BYTES + 1))
        try:
            for _ in range(3):  # magic number, version, sizes of integers
                header.append(WeightsUnpickler(pickles, data, {}).load())
                if header[0] != _LEGACY_MAGIC:
                    raise pickle.UnpicklingError(
                        f"it holds a {type(header[0]).__name__}, not torch.save's header"
                    )
            start = pickles.tell()
            survey = WeightsUnpickler(pickles, data, None)
            survey.load()
            keys = WeightsUnpickler(pickles, data, {}).load()
        except Exception as error:  # also struct's, of a number that is cut
            if pickles.tell() > _PICKLE_BYTES:
                raise pickle.UnpicklingError(f"its pickles have more than {_PICKLE_BYTES:,} bytes") from error
            raise
        places: dict[str, tuple[int, int]] = {}
        file.seek(pickles.tell())
        for key in keys:
            numel = int.from_bytes(file.read(8), "little")
            size = numel * survey.dtypes[key].itemsize
            places[key] = (file.tell(), size)
            if size > data.num_bytes - file.tell():
                raise pickle.UnpicklingError(f"a tensor's {size:,} bytes go beyond the end of the file")
            file.seek(size, io.SEEK_CUR)
        pickles.seek(start)
        return WeightsUnpickler(pickles, data, places).load()


def _place(file: IO[bytes], info: zipfile.ZipInfo, num_bytes: int) -> tuple[int, int]:
    """Return where the bytes of an entry lie in the file, and how many they are."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise pickle.UnpicklingError(
            f"its entry {info.filename} is compressed or encrypted, as torch writes none: unpack the zip, and"
            " pack it again without compression"
        )
    file.seek(info.header_offset)
    header = file.read(30)
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
    start += int.from_bytes(header[28:30], "little")
    if not header.startswith(b"PK\x03\x04") or start + info.file_size > num_bytes:
        raise pickle.UnpicklingError(f"its entry {info.filename} goes beyond the end of the file")
    return start, info.file_size


class _MappedFile:
    """The bytes of a file as a tensor: read from the disk when they are looked at."""

    def __init__(self, file: IO[bytes]) -> None:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.num_bytes = len(mapped)
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)

    def flat(self, place: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        start, size = place
        part = self._bytes[start : start + size // dtype.itemsize * dtype.itemsize]
        return (part.clone() if start % dtype.itemsize else part).view(dtype)
