"""Weights as people have them, and as they should not have them: read past, or refused; nothing ever runs."""

import argparse
import io
import pathlib
import pickle
import time
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.records import InputError
from training.model.clip import CLIP
from training.model.config import MODELS
from training.weights.convert import inspect
from training.weights.formats import load_model, read_weights
from training.weights.pickle_machine import Foreign
from training.weights.tensor_files import read_pickle
from training.weights.torchscript import write_torchscript
from training.weights.weights import state_for_file


def _state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return state_for_file(CLIP(MODELS["tiny-vit"]))


class Settings(dict[str, Any]):
    """Stands for a library's own kind of dict."""


class Wrapper(torch.nn.Module):
    """Stands for a user's own class, saved whole."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.Linear(2, 2)


def _beside() -> dict[str, Any]:
    return {
        "epoch": np.int64(3),
        "optimizer": {"lr": np.float64(1e-4), "state": {0: {"step": torch.tensor(3.0)}}},
        "args": argparse.Namespace(lr=1, path=pathlib.Path("x")),
        "history": np.arange(5.0),
        "settings": Settings(a=1),
        "counts": defaultdict(list, {"a": [1]}),
        "names": {"a", "b"},
        "shape": torch.Size([1, 2]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "range": range(3),
        "simple": types.SimpleNamespace(a=1),
    }


@pytest.mark.parametrize("new_format", [True, False])
def test_what_stands_beside_the_tensors_is_read_past(new_format: bool, tmp_path: Path) -> None:
    path, state = tmp_path / "a.pt", _state()
    payload = {**_beside(), "state_dict": OrderedDict(state), "ema": {"decay": np.float32(0.9)}}
    torch.save(payload, path, _use_new_zipfile_serialization=new_format)
    loaded = state_for_file(load_model(str(path)))
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    read = read_pickle(str(path))
    assert isinstance(read["args"], Foreign)
    assert (read["args"].kind, read["args"].attributes["lr"]) == ("argparse.Namespace", 1)
    assert read["optimizer"]["state"][0]["step"] == 3


WRAPPED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "lightning": lambda state: {"pytorch-lightning_version": "2", "state_dict": _with("model.", state)},
    "clip_model": lambda state: {"model": _with("clip_model.", state)},
    "peft": lambda state: _with("base_model.model.", state),
    "ddp on one tower": lambda state: {
        f"module.{name}" if name.startswith("visual.") else name: value for name, value in state.items()
    },
    "compiled towers": lambda state: {
        f"{'_orig_mod.' if 'bert' in name else ''}{name}": value for name, value in state.items()
    },
    "nested": lambda state: {"state": {"model": {"state_dict": _with("net.backbone.", state)}}},
    "unknown": lambda state: _with("my_own.wrapper.", state),
    "parameters": lambda state: {name: torch.nn.Parameter(value) for name, value in state.items()},
}


def _with(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_recognised(kind: str, tmp_path: Path) -> None:
    state = _state()
    torch.save(WRAPPED[kind](state), tmp_path / "a.pt")
    loaded = state_for_file(load_model(str(tmp_path / "a.pt")))
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_bias_of_siglip_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {**_state(), "logit_bias": torch.tensor(-10.0)}}, tmp_path / "a.pt")
    load_model(str(tmp_path / "a.pt"))
    said = capsys.readouterr()
    assert "a.pt: logit_bias is left out" in said.out + said.err
    assert any("left out" in line and "logit_bias" in line for line in inspect(str(tmp_path / "a.pt")))


def _two_models(state: dict[str, torch.Tensor]) -> Any:
    return _with("student.", state) | _with("teacher.", state)


def _adapters(state: dict[str, torch.Tensor]) -> Any:
    name = "base_model.model.visual.transformer.resblocks.0.attn.out_proj.lora_A.default.weight"
    return _with("base_model.model.", state) | {name: torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda state: Wrapper(), r"holds a whole Python object \(.*Wrapper\).*save its state_dict\(\)"),
        (lambda state: {"model": Wrapper(), "epoch": 3}, r"holds a whole Python object .*state_dict\(\)"),
        (_two_models, "twice, below student. and teacher.: two models in one file"),
        (_adapters, r"holds adapters \(base_model.*merge_and_unload"),
        (
            lambda state: {name: value.numpy() for name, value in state.items()},
            "no tensors, but values of numpy",
        ),
        (
            lambda state: {**state, "visual.proj": state["visual.proj"].to_sparse()},
            "visual.proj is a sparse tensor",
        ),
        (
            lambda state: {**state, "visual.proj": state["visual.proj"].to("meta")},
            "visual.proj is a tensor of the meta device",
        ),
        (
            lambda state: {**state, "visual.proj": state["visual.proj"] * 1j},
            "visual.proj is a tensor of complex",
        ),
    ],
    ids=["module", "module beside", "two", "adapters", "numpy", "sparse", "meta", "complex"],
)
def test_what_is_no_state_is_named(make: Any, said: str, tmp_path: Path) -> None:
    torch.save(make(_state()), tmp_path / "a.pt")
    with pytest.raises(InputError, match=rf"a\.pt: .*{said}") as caught:
        load_model(str(tmp_path / "a.pt"))
    assert "do not use" not in str(caught.value)


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("function", ["eval", "exec", "getattr", "__import__", "print"])
def test_no_function_of_python_is_called(function: str, new_format: bool, tmp_path: Path) -> None:
    builtin = vars(__import__("builtins"))[function]
    payload = {"state_dict": _state(), "x": Call(builtin, f"open({str(tmp_path / 'ran')!r}, 'w')")}
    torch.save(payload, tmp_path / "a.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(InputError, match=rf"its pickle asks for builtins\.{function}, .* nothing was run"):
        load_model(str(tmp_path / "a.pt"))
    assert not (tmp_path / "ran").exists()


def _zip(path: Path, pickled: bytes, data: bytes = bytes(16), *, script: bool = False) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
        if script:
            archive.writestr("archive/constants.pkl", b"\x80\x02).")


def _older_format(path: Path, pickled: bytes) -> None:
    header = (0x1950A86A20F9469CFC6C, 1001, {})  # magic number, version, sizes of integers
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in header) + pickled + pickle.dumps([], 2))


def _tensor(size: str, stride: str, numel: int = 4, offset: int = 0) -> bytes:
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ%btQ"
    storage %= numel.to_bytes(4, "little", signed=True)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J" + offset.to_bytes(4, "little", signed=True)
        + size.encode("latin1") + stride.encode("latin1") + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


HOSTILE = {
    "a stride of 0": (_tensor("(J\xff\xff\xff\x7ft", "(K\0t"), "out of bounds"),
    "a size beyond the file": (_tensor("(K\x08t", "(K\x01t"), "out of bounds"),
    "a storage beyond the file": (_tensor("(K\x08t", "(K\x01t", numel=1 << 30), "has 16 bytes, and should"),
    "an offset beyond the storage": (_tensor("(K\x02t", "(K\x01t", offset=3), "out of bounds"),
    "a negative offset": (_tensor("(K\x02t", "(K\x01t", offset=-1), "not all of them sizes"),
    "a negative size": (_tensor("(J\xff\xff\xff\xfft", "(K\x01t"), "not all of them sizes"),
    "a place in the memo": (b"K\x01r\xff\xff\xff\x7fK\x02", "holds a int"),
    "a buffer": (b"\x96" + (1 << 40).to_bytes(8, "little"), "a buffer of bytes"),
    "many classes": (b"".join(b"cx\ny%d\n0" % at for at in range(10_001)), "more than 10,000 classes"),
    "tuples in tuples as a key": (b"}" + b"(K\x01K\x01t" + b"2\x86" * 60 + b"K\x01s", "no tensors by name"),
    "a set of such tuples": (b"\x8f(" + b"(K\x01K\x01t" + b"2\x86" * 60 + b"\x90", "no tensors by name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused_before_they_cost(kind: str, tmp_path: Path) -> None:
    import tracemalloc

    body, said = HOSTILE[kind]
    named = b"}X\x0b\0\0\0visual.proj" + body + b"s" if b"_rebuild" in body else body
    _zip(tmp_path / "a.pt", b"\x80\x02" + named + b".")
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"a\.pt: .*{said}") as caught:
        load_model(str(tmp_path / "a.pt"))
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


_COLLIDING = b"K\x01" + b"".join(b"p%d\n" % (at * ((1 << 61) - 1)) for at in range(100_000))
# What the machine does slowly, a byte or so each.
SLOW = {
    "nulls": b"N0" * 4_000_000,
    "marks": b"(t0" * 3_000_000,
    "sets": b"\x8f0" * 4_000_000,
    "frozen sets": b"(\x910" * 3_000_000,
    "names": b"ca\nb\n0" * 1_000_000,
    "calls": b"ca\nb\n)R0" * 1_000_000,
    "memo": b"K\x01" + b"p0\ng0\n0" * 1_000_000,
    "colliding places": _COLLIDING * 2,
}  # fmt: skip


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("kind", SLOW)
def test_no_pickle_takes_long(
    kind: str, new_format: bool, tmp_path: Path, seconds_of_two_million_opcodes: float
) -> None:
    """Seconds are those of this process, next to those of as much work of Python's own in its machine."""
    path, body = tmp_path / "a.pt", b"\x80\x02" + SLOW[kind][: 1_900_000 // 12 * 12] + b"N."
    _zip(path, body) if new_format else _older_format(path, body)
    start = time.process_time()
    with pytest.raises(InputError, match=r"a\.pt: "):
        load_model(str(path))
    assert time.process_time() - start < 10 * seconds_of_two_million_opcodes


@pytest.mark.parametrize("write", [_zip, _older_format])
def test_pickles_of_more_bytes_than_any_model_has_are_refused(write: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.pt", b"\x80\x02" + SLOW["nulls"] + b"N.")
    with pytest.raises(
        InputError,
        match=r"a\.pt: .*(has 8,000,004 bytes, more than 2,097,152|have more than 2,097,152 bytes)",
    ):
        load_model(str(tmp_path / "a.pt"))


@pytest.fixture(scope="module")
def seconds_of_two_million_opcodes() -> float:
    machine, start = pickle._Unpickler, time.process_time()  # type: ignore[attr-defined]
    machine(io.BytesIO(b"N0" * 1_000_000 + b"N.")).load()
    return time.process_time() - start


def test_compressed_entries_are_refused_unread(tmp_path: Path) -> None:
    """A TorchScript archive of some kilobytes whose one tensor unpacks to 64 MB."""
    write_torchscript(str(tmp_path / "small.pt"), {"visual.proj": torch.ones(2, 2)}, {})
    with (
        zipfile.ZipFile(tmp_path / "small.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.namelist():
            target.writestr(entry, bytes(64 << 20) if entry.endswith("data/0") else source.read(entry))
    with pytest.raises(InputError, match=r"bomb\.pt: .*is compressed"):
        read_weights(str(tmp_path / "bomb.pt"))


def test_tensors_in_the_same_bytes_again_and_again_are_refused(tmp_path: Path) -> None:
    weight = torch.zeros(1 << 18)
    torch.save({f"visual.layer1.{number}.x": weight for number in range(100)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: its tensors have 104,857,600 bytes, but the file"):
        read_weights(str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    "target", ["ctorch._utils\n_rebuild_tensor_v2\n", "ccollections\nOrderedDict\n", "ctorch\nFloatStorage\n"]
)
def test_the_state_that_a_file_sets_goes_with_the_file(target: str, tmp_path: Path) -> None:
    """BUILD on what outlives the file is refused; on its own objects it changes nothing of others."""
    build = target.encode() + b"}X\x08\0\0\0pollutedK\x01sb"
    _zip(tmp_path / "a.pt", b"\x80\x02" + build + b".", script=True)
    _zip(tmp_path / "b.pt", b"\x80\x02" + build + b".")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match=rf"{name}: .*it sets the state of a"):
            read_weights(str(tmp_path / name))
    own = b"cargparse\nNamespace\n)\x81}X\x04\0\0\0kindK\x01sb"
    _zip(tmp_path / "c.pt", b"\x80\x02" + own + b".")
    assert read_pickle(str(tmp_path / "c.pt")).attributes == {"kind": 1}
    assert (Foreign.kind, hasattr(OrderedDict, "polluted")) == ("", False)


def test_modules_in_a_circle_end(tmp_path: Path) -> None:
    module = b"c__torch__\nM\n)\x81q\x01}X\x01\0\0\0ah\x01sb"
    _zip(tmp_path / "a.pt", b"\x80\x02" + module + b".", script=True)
    with pytest.raises(InputError, match=r"a\.pt: .*a module is at two places"):
        read_weights(str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    "payload", [{"module": None}, {"module": []}, {"module": {1: torch.ones(2)}}, {}, [1]]
)
def test_deepspeed_folders_without_tensors_end(payload: Any, tmp_path: Path) -> None:
    torch.save(payload, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(
        InputError, match=r"hold no tensors by name|not DeepSpeed's file|not a readable DeepSpeed"
    ):
        read_weights(str(tmp_path))
    (tmp_path / "latest").write_bytes(b"\xff\0")
    (tmp_path / "mp_rank_00_model_states.pt").rename(tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"latest: not a readable name"):
        read_weights(str(tmp_path))


def test_files_of_torch_are_read_whole(tmp_path: Path) -> None:
    """Views, shared storages, every type of number; written to in memory, never to the disk."""
    base = torch.arange(24, dtype=torch.float32)
    tensors = {
        "view": base.view(4, 6).T, "part": base[5:9], "shared": base, "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5), "expanded": torch.ones(1, 5).expand(1, 5),
        **{str(dtype): torch.ones(3).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64,
           torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)},
    }  # fmt: skip
    for new_format in (True, False):
        path = tmp_path / f"{new_format}.pt"
        torch.save(tensors, path, _use_new_zipfile_serialization=new_format)
        before = path.read_bytes()
        read = read_pickle(str(path))
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        read["shared"].add_(1)
        assert path.read_bytes() == before
