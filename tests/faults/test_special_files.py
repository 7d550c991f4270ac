"""FIFOs and devices in place of files: every reader refuses them at once."""

import os
from pathlib import Path

import pytest

from data_prep.decontamination import read_guard, tsv_marks
from data_prep.sources.table import TableSource, scan
from eval.features.tables import parquet_schema, read_texts
from eval.index.files import load_index
from pipeline.core import store
from pipeline.core.config import read_toml
from pipeline.core.files.npy import map_npy, read_npy
from pipeline.core.records import ConfigError, InputError
from pipeline.core.shard_format import ByteRanges
from training.weights.formats import load_model
from training.weights.said import read_object


def test_what_is_no_plain_file_is_refused_by_every_reader(tmp_path: Path) -> None:
    """Opening a FIFO waits for its writer, and a device has no end; each must end at once."""
    pipe, device = str(tmp_path / "pipe.parquet"), str(tmp_path / "device.parquet")
    os.mkfifo(pipe)
    os.symlink("/dev/zero", device)
    readers = (
        store.open_read, store.read_bytes, store.digest_file, store.digest_edges, store.digest_tree,
        ByteRanges, load_model, lambda path: map_npy(path, "x"), lambda path: read_npy(path, "x"), read_toml,
        read_guard, read_object, lambda path: read_texts(path, ("text",)), lambda path: list(tsv_marks(path)),
        lambda path: scan(path, TableSource(path=path, name="a")), parquet_schema, load_index,
    )  # fmt: skip
    for reader in readers:
        for path, kind in ((pipe, "a FIFO"), (device, "a device")):
            with pytest.raises((OSError, InputError, ConfigError)) as caught:
                reader(path)
            assert isinstance(caught.value, OSError) or str(caught.value).startswith(path), reader
            assert kind in str(caught.value) or "not a regular file" in str(caught.value), (
                reader,
                caught.value,
            )
    with pytest.raises(IsADirectoryError):
        store.open_read(str(tmp_path))
    os.symlink(__file__, tmp_path / "link")
    assert store.read_bytes(str(tmp_path / "link")) == Path(__file__).read_bytes()
