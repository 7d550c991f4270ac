"""Digests of large files are remembered, and never of other bytes."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.core import store
from pipeline.core.files import known_digests
from pipeline.core.files.known_digests import digests_of_files

LARGE = 1 << 20
OLD_NS = 1_700_000_000_000_000_000


@pytest.fixture(autouse=True)
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the files that were hashed, in order; the cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths: list[str] = []
    digest = store.digest_file

    def noted(path: str) -> str:
        paths.append(Path(path).name)
        return digest(path)

    monkeypatch.setattr(store, "digest_file", noted)
    return paths


def write(path: Path, data: bytes, time_ns: int = OLD_NS) -> str:
    path.write_bytes(data)
    os.utime(path, ns=(time_ns, time_ns))
    return str(path)


def right(*paths: str) -> list[str]:
    return [store.digest_bytes(Path(path).read_bytes()) for path in paths]


def test_a_large_file_is_hashed_once_and_a_small_one_each_time(tmp_path: Path, hashed: list[str]) -> None:
    large, small = write(tmp_path / "large", bytes(LARGE)), write(tmp_path / "small", b"a")
    for _ in range(2):
        assert digests_of_files([large, small, large]) == right(large, small, large)
    assert hashed == ["large", "small", "small"]


def test_others_may_hash_what_is_unknown(tmp_path: Path, hashed: list[str]) -> None:
    known, new = write(tmp_path / "known", bytes(LARGE)), write(tmp_path / "new", bytes(LARGE + 1))
    digests_of_files([known])
    asked: list[str] = []

    def hash_all(paths: Sequence[str]) -> list[str]:
        asked.extend(paths)
        return right(*paths)

    assert digests_of_files([new, known, new], hash_all) == right(new, known, new)
    assert asked == [new]
    assert digests_of_files([new]) == right(new)
    assert hashed == ["known"]


@pytest.mark.parametrize("same_time", [True, False])
def test_other_bytes_are_seen(tmp_path: Path, same_time: bool) -> None:
    path = write(tmp_path / "table", bytes(LARGE))
    digests_of_files([path])
    write(tmp_path / "table", bytes(LARGE - 1) + b"a", OLD_NS if same_time else OLD_NS + 1)
    assert digests_of_files([path]) == right(path)


def test_a_file_that_may_be_written_still_is_not_remembered(tmp_path: Path, hashed: list[str]) -> None:
    (tmp_path / "young").write_bytes(bytes(LARGE))
    for _ in range(2):
        digests_of_files([str(tmp_path / "young")])
    assert hashed == ["young", "young"]


@pytest.mark.parametrize("damage", [b"{", b"[1]", b'{"/a": 1}', b"\xff"])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, damage: bytes, hashed: list[str]) -> None:
    path = write(tmp_path / "table", bytes(LARGE))
    digests_of_files([path])
    known_digests._place().write_bytes(damage)
    assert digests_of_files([path]) == right(path)
    assert digests_of_files([path]) == right(path)
    assert hashed == ["table", "table"]


def test_a_home_that_cannot_be_written_costs_only_time(tmp_path: Path, hashed: list[str]) -> None:
    (tmp_path / "cache").write_bytes(b"")  # a file where the folder belongs
    path = write(tmp_path / "table", bytes(LARGE))
    for _ in range(2):
        assert digests_of_files([path]) == right(path)
    assert hashed == ["table", "table"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        digests_of_files([str(tmp_path / "gone")])
