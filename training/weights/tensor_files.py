"""Tensors out of files that others made: which kind of file it is, by its first bytes, and what it holds.

Nothing is run: pickles, of TorchScript too, go through `training.weights.pickle_machine`, which builds
tensors and plain values only; safetensors hold nothing but tensors.
"""

import itertools
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from safetensors import safe_open

from pipeline.core import store
from pipeline.core.files.foreign import DOWNLOAD_AGAIN, foreign
from pipeline.core.files.image_files import what_else
from pipeline.core.records import InputError
from training.weights.pickle_machine import Foreign, Unreadable
from training.weights.torchscript import read_torchscript
from training.weights.unpickle import local_copy, unpickle

Container = Literal["safetensors", "torch", "torchscript"]
# Keys under which files from torch.save keep their tensors, in order of preference.
METADATA_KEY = "cnclip"  # under which this project's files say what model they hold
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "state")
_PREFIXES = ("module.", "_orig_mod.", "clip.")  # of data parallel, of torch.compile, of this project's engine
_PROBE_BYTES = 512
# Functions of torch that build tensors without numbers, or of other ones: part of the name → what they are.
_ODD_TENSORS = {
    "meta": "a tensor of the meta device, which holds no numbers",
    "sparse": "a sparse tensor",
    "qtensor": "a quantised tensor",
    "nested": "a nested tensor",
    "_rebuild_": "a tensor of an unusual kind",
}
_MOST_SHARING = 3  # tensors that share their bytes (tied embeddings) may have so many times those of the file


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The tensors of one file by name, on the CPU, and the plain values next to them."""

    container: Container
    tensors: dict[str, torch.Tensor]
    facts: Mapping[str, str] = field(default_factory=dict)  # epoch, step and name, or safetensors' metadata


def read_tensors(path: str) -> TensorFile:
    """Read the tensors of a local file or a URL.

    Wrappers such as `state_dict` and prefixes such as `module.` are removed.

    Raises:
        InputError: for a file that is absent, empty, a web page, a Git LFS pointer, cut, damaged, without
            tensors, or of more numbers than it holds, and for a pickle that asks for what runs code.
    """
    container = _container(path)
    if container == "safetensors":
        return _read_safetensors(path)
    if container == "torchscript":
        tensors = read_torchscript(path)
        check_size(path, tensors, store.num_bytes(path))
        return TensorFile(container, tensors)
    payload = read_pickle(path)
    if not isinstance(payload, Mapping):
        raise InputError(f"{path}: holds a {type(payload).__name__}, not tensors by name: give a checkpoint")
    state, keys = payload, list[str]()
    while key := next((key for key in _WRAPPERS if isinstance(state.get(key), Mapping) and state[key]), None):
        if key in keys:
            break
        state, keys = state[key], [*keys, key]
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and isinstance(name, str)
    }
    if not tensors:
        raise InputError(f"{path}: {_what_instead(payload, state)}")
    for name, value in state.items():
        if isinstance(value, Foreign) and (kind := _kind_of_tensor(value)):
            raise InputError(
                f"{path}: {str(name)[:80]} is {kind}: save it as an ordinary tensor of real numbers"
            )
    check_size(path, tensors, store.num_bytes(path))
    facts = {key: str(payload[key]) for key in ("name", "epoch", "step") if _is_short(payload.get(key))}
    if isinstance(payload.get(METADATA_KEY), str):
        facts[METADATA_KEY] = payload[METADATA_KEY]
    return TensorFile(container, strip_prefixes(tensors), facts)


def _is_short(value: Any) -> bool:
    return (isinstance(value, str) and len(value) < 200) or (isinstance(value, int) and abs(value) < 2**63)


def _kind_of_tensor(value: Foreign) -> str:
    """Return what kind of tensor an object is, if not numbers in memory; empty if it is no tensor at all."""
    for part, kind in _ODD_TENSORS.items():
        if value.kind.startswith("torch._utils.") and part in value.kind:
            return kind
    return value.kind if isinstance(value, Unreadable) else ""


def _what_instead(payload: Mapping[Any, Any], state: Mapping[Any, Any]) -> str:
    """Return what a pickle without tensors by name holds, and what to do."""
    for found in (state, payload, *payload.values()):
        if isinstance(found, Foreign) and found.is_module:
            return (
                f"holds a whole Python object ({found.kind}), not its tensors: load it where its code is, and"
                " save its state_dict()"
            )
    if kinds := [
        kind for value in state.values() if isinstance(value, Foreign) and (kind := _kind_of_tensor(value))
    ]:
        return f"its tensors are each {kinds[0]}: save them as ordinary tensors of real numbers"
    if arrays := [value for value in state.values() if isinstance(value, Foreign) and value.kind]:
        return (
            f"holds no tensors, but values of {arrays[0].kind}: save its tensors by name, as state_dict()"
            " gives them"
        )
    keys = ", ".join(str(key)[:40] for key in itertools.islice(payload, 8) if not isinstance(key, float))
    return f"holds no tensors by name (its keys: {keys or 'none'}): give a checkpoint"


def check_size(path: str, tensors: Mapping[str, torch.Tensor], num_bytes: int) -> None:
    """Refuse tensors that lie in the same bytes again and again: a model of them would fill the memory."""
    wanted = sum(tensor.nbytes for tensor in tensors.values())
    if wanted > _MOST_SHARING * num_bytes:
        raise InputError(
            f"{path}: its tensors have {wanted:,} bytes, but the file {num_bytes:,}:"
            f" {DOWNLOAD_AGAIN}, and if it stays so do not use it"
        )


def strip_prefixes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take off, again and again, a wrapper's prefix that every name has."""
    stripped = dict(tensors)
    while stripped:
        prefix = next((one for one in _PREFIXES if all(name.startswith(one) for name in stripped)), "")
        if not prefix:
            break
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped


def read_pickle(path: str) -> Any:
    """Return what `torch.save` wrote, on the CPU: tensors, containers, plain values, and `Foreign` objects.

    Raises:
        InputError: if the file is cut or damaged, or its pickle asks for what runs code.
    """
    return unpickle(path, "checkpoint of torch.save: cut or damaged", DOWNLOAD_AGAIN)


def _container(path: str) -> Container:
    is_there = store.is_local(path) and os.path.exists(path) and not os.path.isdir(path)
    if is_there and (kind := what_else(path)) is not None:
        raise InputError(f"{path}: {kind}, not a file of weights: give the file itself")
    with foreign(path, "file of weights"):
        size = store.num_bytes(path)
        with store.open_read(path) as file:
            head = bytes(file.read(_PROBE_BYTES))
    if not head:
        raise InputError(f"{path}: empty: {DOWNLOAD_AGAIN}")
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head[8:9] == b"{":
        header_bytes = int.from_bytes(head[:8], "little")
        if header_bytes > size - 8:
            raise InputError(
                f"{path}: cut short: {size} bytes, but its header alone has {header_bytes}: {DOWNLOAD_AGAIN}"
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
    with (
        foreign(path, "zip: cut or damaged"),
        store.open_read(path) as file,
        zipfile.ZipFile(file) as archive,
    ):
        names = archive.namelist()
    if not any(name.endswith("/data.pkl") for name in names):
        raise InputError(f"{path}: a zip without data.pkl, not weights: give the checkpoint itself")
    return "torchscript" if any(name.endswith("/constants.pkl") for name in names) else "torch"


def _read_safetensors(path: str) -> TensorFile:
    with foreign(path, "safetensors file: cut or damaged"), safe_open(local_copy(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    if not tensors:
        raise InputError(f"{path}: a safetensors file without tensors: give a checkpoint")
    return TensorFile("safetensors", strip_prefixes(tensors), metadata)
