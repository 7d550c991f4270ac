"""Tensors out of files that others made: which kind of file it is, by its first bytes, and what it holds.

Nothing is run: pickles go through torch's weights-only machine, which knows tensors and plain values;
archives of TorchScript through `training.weights.torchscript`; safetensors hold nothing but tensors.
"""

import itertools
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import fsspec
import torch
from safetensors import SafetensorError, safe_open

from pipeline.core import store
from pipeline.core.records import InputError
from training.weights.torchscript import read_torchscript

Container = Literal["safetensors", "torch", "torchscript"]
DOWNLOAD_AGAIN = "download it again"
# Where files from torch.save keep their tensors, in the order in which they are looked for.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "state")
_PREFIXES = ("module.", "_orig_mod.", "clip.")  # of data parallel, of torch.compile, of this project's engine
_PROBE_BYTES = 512


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The tensors of one file by name, on the CPU, and the plain values beside them."""

    container: Container
    tensors: dict[str, torch.Tensor]
    facts: Mapping[str, str] = field(default_factory=dict)  # epoch, step and name, or safetensors' metadata


def read_tensors(path: str) -> TensorFile:
    """Read a local file or a URL; wrappers such as `state_dict` and prefixes such as `module.` are taken off.

    InputError names the file: absent, empty, a web page, a Git LFS pointer, cut, damaged, without tensors, or
    a pickle that asks for anything but tensors.
    """
    container = _container(path)
    if container == "torchscript":
        return TensorFile(container, read_torchscript(path))
    if container == "safetensors":
        return _read_safetensors(path)
    payload = read_pickle(path)
    if not isinstance(payload, Mapping):
        raise InputError(f"{path}: holds a {type(payload).__name__}, not tensors by name: give a checkpoint")
    state = next(
        (payload[key] for key in _WRAPPERS if isinstance(payload.get(key), Mapping) and payload[key]), payload
    )
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        keys = ", ".join(itertools.islice(map(str, payload), 8))
        raise InputError(f"{path}: holds no tensors by name (its keys: {keys or 'none'}): give a checkpoint")
    facts = {
        key: str(payload[key]) for key in ("name", "epoch", "step") if isinstance(payload.get(key), int | str)
    }
    return TensorFile(container, strip_prefixes(tensors), facts)


def strip_prefixes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take off, again and again, a wrapper's prefix that every name has."""
    stripped = dict(tensors)
    while prefix := next((one for one in _PREFIXES if all(name.startswith(one) for name in stripped)), ""):
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped


def read_pickle(path: str, *, stand_ins: Mapping[str, type] | None = None) -> Any:
    """What `torch.save` wrote, on the CPU, as tensors, containers and plain values.

    `stand_ins` maps full names of classes that may occur besides to classes that are built in their place.
    InputError for every other name, and for files that are cut or damaged.
    """
    local = local_copy(path)
    allowed: list[Any] = [(stand_in, name) for name, stand_in in (stand_ins or {}).items()]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what is wrong is said below
            # Large files are mapped into memory; the old format, without a zip, cannot be.
            return torch.load(local, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(local))
    except pickle.UnpicklingError as error:
        if names := _foreign_names(str(error)):
            raise InputError(
                f"{path}: its pickle asks for {names}, which weights have no need of: nothing was run;"
                " do not use this file"
            ) from None
        raise InputError(
            f"{path}: a pickle that torch's reader of weights refuses ({_refusal(str(error))}): nothing was"
            f" run; {DOWNLOAD_AGAIN}, and if it stays so do not use it"
        ) from None
    except Exception as error:  # damaged bytes surface as whatever torch trips over
        raise InputError(f"{path}: cut or damaged ({_first_line(error)}): {DOWNLOAD_AGAIN}") from None


def local_copy(path: str) -> str:
    """The path itself, or a temporary copy of what a URL names."""
    return path if store.is_local(path) else str(fsspec.open_local(f"simplecache::{path}"))


def _container(path: str) -> Container:
    try:
        size = store.num_bytes(path)
        with store.open_read(path) as file:
            head = bytes(file.read(_PROBE_BYTES))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not head:
        raise InputError(f"{path}: empty: {DOWNLOAD_AGAIN}")
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head[8:9] == b"{":
        header_bytes = int.from_bytes(head[:8], "little")
        if header_bytes > size - 8:
            raise InputError(
                f"{path}: cut: {size} bytes, but its header alone has {header_bytes}: {DOWNLOAD_AGAIN}"
            )
        return "safetensors"
    if head.startswith(b"\x80"):
        return "torch"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise InputError(
            f"{path}: a web page (HTML or XML), not weights: {DOWNLOAD_AGAIN}, from the link itself"
        )
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    raise InputError(
        f"{path}: not a weights file: begins with {head[:8]!r}, not as torch.save's format,"
        f" TorchScript or safetensors do: {DOWNLOAD_AGAIN}, or give the checkpoint itself"
    )


def _kind_of_zip(path: str) -> Container:
    try:
        with store.open_read(path) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: cut or damaged ({_first_line(error)}): {DOWNLOAD_AGAIN}") from None
    if not any(name.endswith("/data.pkl") for name in names):
        raise InputError(f"{path}: a zip without data.pkl, not weights: give the checkpoint itself")
    return "torchscript" if any(name.endswith("/constants.pkl") for name in names) else "torch"


def _read_safetensors(path: str) -> TensorFile:
    try:
        with safe_open(local_copy(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: cut or damaged safetensors ({_first_line(error)}): {DOWNLOAD_AGAIN}"
        ) from None
    if not tensors:
        raise InputError(f"{path}: a safetensors file without tensors: give a checkpoint")
    return TensorFile("safetensors", strip_prefixes(tensors), metadata)


def _foreign_names(message: str) -> str:
    """The class or function that torch's weights-only machine refused, from its message."""
    for marker in (
        "Unsupported global: GLOBAL ",
        "Trying to load unsupported GLOBAL ",  # of a module that is never allowed, such as os
        "Unsupported class ",
        "Trying to call reduce for unrecognized function ",
        "Trying to instantiate unsupported class ",
        "Can only build ",
    ):
        _, found, rest = message.partition(marker)
        if found:
            return rest.split()[0]
    return ""


def _refusal(message: str) -> str:
    """What torch's message says about the file, without its advice to read it by unsafe means."""
    around = ("Weights only load failed", "Please file an issue", "Check the documentation")
    lines = (line.strip() for line in message.splitlines())
    return next((line[:200] for line in lines if line and not line.startswith(around)), "no reason given")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
