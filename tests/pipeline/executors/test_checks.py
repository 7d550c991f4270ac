"""Files are compared with what was recorded: few in this process, many by the run's executor."""

import os
from pathlib import Path

import pytest

from pipeline.core import store
from pipeline.core.records import InputError, Shard
from pipeline.core.run import Run
from pipeline.executors import checks
from pipeline.executors.checks import DIFFERENT, MISSING, find_altered

NUM_FILES = 7


@pytest.fixture
def files(tmp_path: Path) -> list[Shard]:
    """Files of a stage: one has other bytes of the same length, one is cut, one is gone."""
    folder = tmp_path / "stage"
    (folder / "deep").mkdir(parents=True)
    found = []
    for number in range(NUM_FILES):
        name = f"deep/{number}.bin" if number % 2 else f"{number}.bin"
        (folder / name).write_bytes(bytes([number]) * 100)
        found.append(Shard(name, 1, 100, store.digest_file(str(folder / name))))
    (folder / "2.bin").write_bytes(b"x" * 100)
    (folder / "deep" / "3.bin").write_bytes(b"x")
    (folder / "4.bin").unlink()
    return found


@pytest.mark.parametrize("everywhere", [False, True])
def test_altered_files_are_found(
    everywhere: bool, files: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if everywhere:
        monkeypatch.setattr(checks, "_FEW_BYTES", 0)
        monkeypatch.setattr(checks, "_TASK_FILES", 2)
        monkeypatch.setattr(store, "digest_file", lambda path: pytest.fail("hashed here"))
    found = find_altered(Run(str(tmp_path), 0, "local", 2, ()), "stage", files)
    assert {file.path: what for file, what in found} == {
        "2.bin": DIFFERENT,
        "deep/3.bin": DIFFERENT,
        "4.bin": MISSING,
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_an_error(files: list[Shard], tmp_path: Path) -> None:
    (tmp_path / "stage" / "0.bin").chmod(0)
    with pytest.raises(OSError, match=r"0\.bin"):
        list(find_altered(Run(str(tmp_path), 0, "local", 1, ()), "stage", files))


def test_a_disk_that_cannot_read_names_the_file(
    files: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "digest_file", fail)
    monkeypatch.setattr(checks, "_FEW_BYTES", 0)
    with pytest.raises(InputError, match=r"stage/0\.bin: Input/output error"):
        list(find_altered(Run(str(tmp_path), 0, "local", 1, ()), "stage", files))
