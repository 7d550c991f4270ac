"""Tables of texts: values are taken as they are written, and what is unclear is one line."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.features.image_source import open_images
from eval.features.tables import read_texts
from pipeline.core.files.images import BadImageError
from pipeline.core.records import InputError
from tests.helpers.encoded_images import encode

KNOWN = ("caption", "text")
NUMBERS = [str(number) for number in range(150)]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        (
            "a.csv",
            "caption\n007\n3.10\n1e5\ntrue\n2024-01-02\n",
            ["007", "3.10", "1e5", "true", "2024-01-02"],
        ),
        ("a.csv", "caption\n" + "\n".join([*NUMBERS, "北京烤鸭"]), [*NUMBERS, "北京烤鸭"]),
        ("a.csv", "caption\nNA\nnull\n\n猫\n\n", ["NA", "null", "", "猫"]),
        (
            "a.csv",
            '\ufeffid,caption\r\n1,"一只,猫"\r\n\r\n2,"两行\n文字"\r\n3,"说""好"""',
            ["一只,猫", "两行\n文字", '说"好"'],
        ),
        ("a.csv", 'caption,id\n5"屏,1\n', ['5"屏']),
        ("a.tsv", 'id\ttext\n1\t5"屏幕手机\n2\t"苹果"手机\n3\t\n', ['5"屏幕手机', '"苹果"手机', ""]),
        ("a.jsonl", '{"text": "007"}\n\n{"x": 1, "text": "猫\\n狗"}', ["007", "猫\n狗"]),
        ("A.NDJSON", '{"caption": "猫"}\n', ["猫"]),
        ("a.txt", "\ufeff007\r\n\n 3.10 \n", ["007", "", " 3.10 "]),
    ],
)
def test_text_is_text(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read_texts(str(tmp_path / name), KNOWN) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "caption\n北京烤鸭\n".encode("gbk"), r"a\.csv: not UTF-8 .*save it as UTF-8"),
        ("a.csv", "caption\n猫\n".encode("utf-16"), r"a\.csv: not UTF-8"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8"),
        ("a.csv", b"id;caption\n1;x\n", r"no column of texts \(caption, text\); it has id;caption"),
        ("a.csv", b"id,caption\n1,x\n2\n", r"a\.csv:3: 1 fields, but the header has 2 \(id, caption\)"),
        ("a.csv", b"id,caption\n1,x,y\n", r"a\.csv:2: 3 fields"),
        ("a.tsv", b"id\tcaption\n1\tx\ty\n", r"a\.tsv:2: 3 fields"),
        ("a.csv", b'caption\n"x\ny\n', r"a\.csv: after line 1: .*correct the quotes"),
        ("a.csv", b"caption,caption\nx,y\n", r"its header names 'caption' twice"),
        ("a.csv", b"", r"a\.csv: is empty"),
        ("a.csv", b"caption\n", r"a\.csv: holds no rows"),
        ("a.jsonl", b'{"text": "x"}\n{"other": 1}\n', r"a\.jsonl:2: has no 'text'; it has other"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', r"a\.jsonl:2: 'text' is null, not text"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: 'text' is 7, not text; write it in quotes"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not a line of JSON"),
        ("a.jsonl", b"[" * 20_000 + b"\n", r"a\.jsonl:1: not a line of JSON"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: expected an object"),
        ("a.json", b'["x"]\n', r"a\.json: not a table that cnclip reads"),
        ("a.parquet", b"PAR1 and nothing", r"a\.parquet: not a readable table"),
    ],
)
def test_what_is_unclear_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_texts(str(tmp_path / name), KNOWN)
    assert "\n" not in str(error.value)


def test_parquet_has_types_and_they_must_be_text(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pl.DataFrame({"text": ["007", ""]}).write_parquet(path)
    assert read_texts(path, KNOWN) == ["007", ""]
    pl.DataFrame({"text": ["a", "b", "a"]}, schema={"text": pl.Categorical}).write_parquet(path)
    assert read_texts(path, KNOWN) == ["a", "b", "a"]
    for values, message in (
        ([7.0], "column text holds double, not text"),
        ([["x"]], "column text holds .*list.*, not text"),
        (["x", None], "row 1: column text is null, as in 1 of 2 rows"),
    ):
        pq.write_table(pa.table({"text": values}), path)
        with pytest.raises(InputError, match=message):
            read_texts(path, KNOWN)
    with pytest.raises(InputError, match=r"none\.parquet: cannot be read: No such file"):
        read_texts(str(tmp_path / "none.parquet"), KNOWN)


def test_images_of_tables(tmp_path: Path) -> None:
    data = encode(Image.new("RGB", (4, 4)), "PNG")
    (tmp_path / "007").write_bytes(data)
    (tmp_path / "a.csv").write_text("image_path\n007\nnone.png\n\n007\n")
    source = open_images(str(tmp_path / "a.csv"))
    assert source.names == ["007", "none.png", "", "007"]
    found = list(source.read())
    assert (found[0], found[3]) == (data, data)
    assert [str(error) for error in found if isinstance(error, BadImageError)] == [
        "no_file: no such file",
        "no_file: the row names no image",
    ]
    wrapped = pa.table({"image": [{"bytes": data, "path": "a.png"}, None], "id": [5, 6]})
    pq.write_table(wrapped, tmp_path / "datasets.parquet")
    source = open_images(str(tmp_path / "datasets.parquet"))
    assert source.names == ["5", "6"]
    first, second = source.read()
    assert first == data
    assert str(second) == "no_file: the row has no bytes"
    pq.write_table(pa.table({"image": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(InputError, match="column image holds int64, not text"):
        open_images(str(tmp_path / "numbers.parquet"))
