"""Whatever a foreign parser raises becomes one line with the file's name; our own errors and stops pass."""

import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.core import store
from pipeline.core.config import apply_overrides, read_toml
from pipeline.core.files.columns import column
from pipeline.core.files.foreign import foreign, parse_json
from pipeline.core.files.npy import map_npy, read_npy, read_npy_bytes, read_npy_rows
from pipeline.core.records import ConfigError, InputError, Stopped


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("bad\nsecond line"), "a.bin: not a readable thing (bad): download it again"),
        (RecursionError("x"), "a.bin: not a readable thing (nested too deep): download it again"),
        (
            MemoryError(),
            "a.bin: not a readable thing (it asks for more memory than there is): download it again",
        ),
        (AssertionError(), "a.bin: not a readable thing (AssertionError): download it again"),
        (KeyError("shape"), "a.bin: not a readable thing (KeyError: 'shape'): download it again"),
        (
            PermissionError(13, "Permission denied"),
            "a.bin: cannot be read: Permission denied; check the path and its permissions",
        ),
        (pl.exceptions.PanicException("panic"), "a.bin: not a readable thing (panic): download it again"),
    ],
)
def test_any_error_becomes_one_line(error: BaseException, said: str) -> None:
    with pytest.raises(InputError) as caught, foreign("a.bin", "thing"):
        raise error
    assert str(caught.value) == said


@pytest.mark.parametrize("error", [InputError("x"), ConfigError("x"), Stopped("x"), KeyboardInterrupt()])
def test_our_own_errors_and_stops_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, foreign("a.bin", "thing"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "text", ["[" * 20_000, '{"a":' * 20_000, "9" * 5000, '"\\ud83d"', '{"\\udc00": 1}', b"\xff", "", "{"]
)
def test_json_of_any_kind_is_refused_by_value_errors_alone(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    assert parse_json('{"a": "\\ud83d\\ude00"}') == {"a": "😀"}
    assert parse_json('"\\ud83d"', keep_surrogates=True) == "\ud83d"


def _npy(header: str, data: bytes = bytes(64)) -> bytes:
    body = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + data


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 4)}", "16,000,000,000 bytes"),
        ("{'descr': '<U100000000', 'fortran_order': False, 'shape': (1,)}", "400,000,000 bytes"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "holds Python objects"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}", "its header names an array"),
        ("{'descr': '<f4'", "not a readable .npy file"),
        ("(" * 300, "not a readable .npy file"),
    ],
)
def test_arrays_are_checked_before_memory_is_taken(header: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(_npy(header))
    for read in (
        lambda: read_npy(str(path), "embed again"),
        lambda: map_npy(str(path), "embed again"),
        lambda: read_npy_rows(str(path), 0, 1, "embed again"),
        lambda: read_npy_bytes(path.read_bytes(), str(path), "embed again"),
    ):
        tracemalloc.start()
        with pytest.raises(InputError, match=r"a\.npy: ") as caught:
            read()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()
        assert said in str(caught.value)


def test_whole_arrays_are_read(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for version in ((1, 0), (2, 0)):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.asfortranarray(array), version=version)
        (tmp_path / "a.npy").write_bytes(buffer.getvalue())
        assert np.array_equal(read_npy(str(tmp_path / "a.npy"), ""), array)
        assert np.array_equal(map_npy(str(tmp_path / "a.npy"), ""), array)
        with pytest.raises(InputError, match=r"a\.npy: stored by columns"):
            read_npy_rows(str(tmp_path / "a.npy"), 0, 1, "")
    np.save(tmp_path / "rows.npy", array)
    for first, end in ((1, 2), (0, 3), (3, 3)):
        assert np.array_equal(read_npy_rows(str(tmp_path / "rows.npy"), first, end, ""), array[first:end])
    np.save(tmp_path / "empty.npy", np.empty((0, 4), np.float32))
    assert read_npy(str(tmp_path / "empty.npy"), "").shape == (0, 4)
    with pytest.raises(InputError, match=r"none\.npy: cannot be read: No such file"):
        read_npy(str(tmp_path / "none.npy"), "")


@pytest.mark.parametrize("name", ["*", "^a.*$", "a", "", "^", "$"])
def test_a_column_is_taken_by_its_very_name(name: str) -> None:
    frame = pl.DataFrame(
        {"*": ["1"], "^a.*$": ["2"], "a": ["3"], "ab": ["4"], "": ["5"], "^": ["6"], "$": ["7"]}
    )
    assert frame.select(column(name).alias("x"))["x"].to_list() == frame[name].to_list()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = " + "[" * 20_000, "not a readable TOML file (nested too deep)"),
        ("x = " + "[" * 300 + "]" * 300, "nested deeper than 64"),
        ("x = " + "9" * 5000, "not a readable TOML file (Exceeds the limit"),
        ("x.y = 18446744073709551616", "x.y: must be a number of at most 64 bits, found one of 65"),
        ("x = 1979-05-27", "x: must be text, a number or true or false, found the date or time 1979-05-27"),
        ("x = [{y = 07:32:00}]", "x.y: must be text, a number or true or false, found the date or time"),
        ('x = "a\\u0000b"', "x: must be text in UTF-8 without a NUL character"),
        ('"a\\u0000b" = 1', "must be text in UTF-8 without a NUL character"),
    ],
)
def test_settings_that_cannot_be_are_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_toml(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    if text.startswith("x ="):
        with pytest.raises(ConfigError, match="--set x") as caught:
            apply_overrides({}, [text])
        assert len(str(caught.value)) < 400


def test_an_argument_that_is_no_utf8_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--set run\.folder=.*must be text in UTF-8"):
        apply_overrides({}, ["run.folder=runs/\udcff"])


def test_a_store_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials, as on a machine that has none."""
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    for use in (store.exists, store.list_files, store.read_bytes, store.num_bytes):
        with pytest.raises(ConfigError, match=r"s3://bucket/a: its store cannot be used .*AWS_ACCESS_KEY_ID"):
            use("s3://bucket/a")
    with pytest.raises(ConfigError, match="s3://bucket/a: its store cannot be used"):
        store.write_text("s3://bucket/a", json.dumps({}))
