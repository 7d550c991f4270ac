"""What foreign writers make is looked at before it appears, and their errors name the file."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from data_prep.shards.export import export
from eval.evaluate import evaluate
from eval.features.files import embed_files
from eval.features.shards import embed_shards
from pipeline.core import store
from pipeline.core.files.lock import exclusive, one_at_a_time
from pipeline.core.files.written import (
    check_npy,
    check_parquet,
    check_safetensors,
    check_size,
    check_zip,
    naming,
    parquet_rows,
    write_npy,
)
from pipeline.core.records import InputError


def write_zip(path: str) -> None:
    torch.save({"a": torch.zeros(2000)}, path)


WRITERS: dict[str, tuple[Callable[[str], object], Callable[[str, str], None]]] = {
    "npy": (lambda path: np.save(path, np.zeros(2000)), check_npy),
    "parquet": (
        lambda path: pl.DataFrame({"a": range(2000)}).write_parquet(path),
        lambda temporary, path: check_parquet(temporary, path, 2000),
    ),
    "safetensors": (lambda path: save_file({"a": torch.zeros(2000)}, path), check_safetensors),
    "zip": (write_zip, check_zip),
    "size": (
        lambda path: Path(path).write_bytes(bytes(2000)),
        lambda temporary, path: check_size(temporary, path, 2000),
    ),
}


def publish(path: str, data: bytes, check: Callable[[str, str], None]) -> None:
    with store.publish(path) as temporary:
        Path(temporary).write_bytes(data)
        check(temporary, path)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_cut_file_gets_no_name(kind: str, tmp_path: Path) -> None:
    write, check = WRITERS[kind]
    whole = tmp_path / f"whole.{kind}"
    write(str(whole))
    check(str(whole), "whole")
    size = whole.stat().st_size
    for cut in (0, 1, 10, size // 2, size - 1):
        target = tmp_path / "published"
        with pytest.raises(OSError, match="the disk may be full") as caught:
            publish(str(target), whole.read_bytes()[:cut], check)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
        assert not target.exists()


def test_fewer_rows_than_wanted_are_seen(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1, 2]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(OSError, match="2 of 3 rows"):
        check_parquet(str(tmp_path / "a.parquet"), "a.parquet", 3)


def test_an_array_is_written_whole(tmp_path: Path) -> None:
    write_npy(str(tmp_path / "a.npy"), np.arange(5))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]
    assert os.listdir(tmp_path) == ["a.npy"]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (pl.exceptions.ComputeError("parquet: … No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("unexpected pos 704 vs 598"), errno.EIO),
        (OSError("10500 requested and 7136 written"), errno.EIO),
        (OSError(errno.EACCES, "Permission denied"), errno.EACCES),
    ],
)
def test_what_a_writer_raises_names_the_file(error: Exception, number: int, tmp_path: Path) -> None:
    path = str(tmp_path / "out.bin")
    with pytest.raises(OSError, match=r".") as caught, naming(path):
        raise error
    assert (caught.value.errno, caught.value.filename) == (number, path)
    with pytest.raises(InputError, match="ours"), naming(path):
        raise InputError("ours")


def test_a_folder_is_held_by_the_one_that_an_argument_names(tmp_path: Path) -> None:
    class Job:
        out = str(tmp_path / "b")

    @one_at_a_time("out")
    def plain(out: str) -> bool:
        return held(out)

    @one_at_a_time("job.out")
    def in_job(number: int, *, job: Job) -> bool:
        return held(job.out)

    def held(folder: str) -> bool:
        with contextlib.suppress(InputError), exclusive(folder):
            return False
        return True

    assert plain(str(tmp_path / "a"))
    assert in_job(3, job=Job())
    assert not held(str(tmp_path / "a"))
    for function in (export, evaluate, embed_files, embed_shards):
        assert hasattr(function, "__wrapped__"), function


@pytest.mark.parametrize("writes", ["file", "tables", "npz"])
def test_a_full_disk_names_the_file_whoever_writes(
    writes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system says of a full disk on a write, a flush or a close has no name in it."""
    path = str(tmp_path / "out" / "a.file")
    if writes == "file":
        monkeypatch.setattr(store, "publish", _on_a_full_disk(store.publish))
        with pytest.raises(OSError, match="No space left") as caught:
            store.write_bytes(path, b"a")
    elif writes == "tables":
        monkeypatch.setattr(store, "publish", _on_a_full_disk(store.publish))
        schema = pa.schema([("a", pa.int64())])
        with pytest.raises(OSError, match="No space left") as caught, parquet_rows(path, schema) as rows:
            rows.write_table(pa.table({"a": range(100_000)}, schema=schema))
    else:
        monkeypatch.setattr(store, "publish", _on_a_full_disk(store.publish))
        with pytest.raises(OSError, match="No space left") as caught:
            _write_token_ids(path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, path)
    assert [*Path(path).parent.iterdir()] == []


def _on_a_full_disk(publish: Callable[[str], contextlib.AbstractContextManager[str]]) -> Any:
    @contextlib.contextmanager
    def full(path: str) -> Iterator[str]:
        with publish(path) as temporary:
            os.symlink("/dev/full", temporary)
            yield temporary

    return full


def _write_token_ids(path: str) -> None:
    with store.publish(path) as temporary, naming(path), open(temporary, "wb") as file:
        np.savez(file, token_ids=np.zeros(2000))


def test_tables_are_appended_and_counted(tmp_path: Path) -> None:
    path, schema = str(tmp_path / "a.parquet"), pa.schema([("a", pa.int64())])
    with parquet_rows(path, schema) as rows:
        for start in (0, 3):
            rows.write_table(pa.table({"a": range(start, start + 3)}, schema=schema))
    assert rows.num_rows == 6
    assert pl.read_parquet(path)["a"].to_list() == [*range(6)]
    with pytest.raises(ZeroDivisionError), parquet_rows(path, schema) as rows:
        raise ZeroDivisionError
    assert pl.read_parquet(path).height == 6
