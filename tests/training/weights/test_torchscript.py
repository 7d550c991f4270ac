"""TorchScript archives: read without running them, written with the same bytes every time."""

import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.core.records import InputError
from training.weights.torchscript import read_torchscript, write_torchscript


@pytest.fixture(autouse=True)
def _torch_announces_that_it_will_drop_torchscript() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _tensors() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        "logit_scale": torch.tensor(2.5),
        "visual.layer1.0.conv1.weight": torch.randn(2, 3, 1, 1, generator=generator),
        "visual.layer1.10.weight": torch.randn(4, generator=generator).half(),
    }
    buffers = {
        "visual.layer1.0.bn1.num_batches_tracked": torch.tensor(7),
        "input_resolution": torch.tensor(48),
    }
    return parameters, buffers


def test_torch_loads_what_is_written(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pt")
    parameters, buffers = _tensors()
    write_torchscript(path, parameters, buffers)
    loaded = torch.jit.load(path)  # type: ignore[no-untyped-call]
    state = loaded.state_dict()
    assert state.keys() == (parameters | buffers).keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in (parameters | buffers).items())
    assert {name for name, _ in loaded.named_parameters()} == parameters.keys()
    assert {name for name, _ in loaded.named_buffers()} == buffers.keys()
    assert not loaded.eval().training


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    """Strided, shared and half-precision tensors, numbered submodules, attributes that are no tensors."""

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [1, 2]
            self.body = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).half()
            self.transposed = torch.nn.Parameter(torch.randn(2, 3).T)
            self.register_buffer("row", torch.arange(12).view(3, 4)[1])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * len(self.sizes)

    path = str(tmp_path / "theirs.pt")
    module = torch.jit.script(Part())
    torch.jit.save(module, path)
    read, expected = read_torchscript(path), module.state_dict()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
        assert read[name].dtype == tensor.dtype


def test_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    write_torchscript(str(tmp_path / "a.pt"), *_tensors())
    code = (
        "import sys;"
        "from tests.training.weights.test_torchscript import _tensors, write_torchscript;"
        "write_torchscript(sys.argv[1], *_tensors())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "b.pt")]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "5", "PYTHONPATH": ":".join(sys.path)})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def _archive(path: Path, pickled: bytes) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return str(path)


def test_code_in_the_pickle_does_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(tmp_path / "ran"), "w"))  # type: ignore[return-value]

    path = _archive(tmp_path / "evil.pt", pickle.dumps(Attack(), protocol=2))
    with pytest.raises(InputError, match=r"evil\.pt: .*asks for \w+\.open"):
        read_torchscript(path)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_archives_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.pt: cannot be read: No such file"):
        read_torchscript(str(tmp_path / "absent.pt"))
    (tmp_path / "text.pt").write_text("not found")
    with pytest.raises(InputError, match=r"text\.pt: not a readable TorchScript archive"):
        read_torchscript(str(tmp_path / "text.pt"))
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(InputError, match=r"other\.pt: .* \(a zip without data\.pkl\)"):
        read_torchscript(str(tmp_path / "other.pt"))
    torch.save({"visual.proj": torch.ones(2)}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="holds a dict instead of modules"):
        read_torchscript(str(tmp_path / "state.pt"))


def test_a_cut_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    write_torchscript(str(path), *_tensors())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cut\.pt: not a readable TorchScript archive"):
        read_torchscript(str(path))


def test_a_storage_that_is_too_short_is_named(tmp_path: Path) -> None:
    whole, short = tmp_path / "whole.pt", tmp_path / "short.pt"
    write_torchscript(str(whole), *_tensors())
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(short, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name)[:4] if name.endswith("data/2") else source.read(name))
    with pytest.raises(
        InputError, match=r"short\.pt: not a readable TorchScript archive .*its storage 2 has 4 bytes"
    ):
        read_torchscript(str(short))
