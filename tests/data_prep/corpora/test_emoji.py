"""The emoji corpus: captions, the site, evaluation sets with several positives, and bad input."""

import base64
import io
import json
import urllib.request
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.corpora.emoji import EmojiConfig, captions, evaluation_texts, make_emoji
from data_prep.formats.cnclip import EvaluationText
from data_prep.sources.local_server import serve
from pipeline.core.config import build
from pipeline.core.records import ConfigError, InputError

COLOURS = {"红": (220, 30, 30), "绿": (30, 160, 60), "蓝": (30, 60, 220)}


def _png(colour: tuple[int, ...], mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(buffer, "PNG", **options)
    return buffer.getvalue()


def _row(name_zh: str, png: bytes, category_en: str = "Objects") -> dict[str, Any]:
    return {
        "name_zh": name_zh,
        "keywords_zh": [name_zh, "颜色", "方块", "纸"],
        "name_en": f"{name_zh} thing",
        "keywords_en": ["colour", "block"],
        "category_en": category_en,
        "png": png,
    }


def _write(folder: Path, vendor: str, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{vendor}.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "emoji"
    folder.mkdir()
    for vendor in ("one", "two", "three"):
        _write(folder, vendor, [_row(name, _png(rgb)) for name, rgb in COLOURS.items()])
    return folder


def _texts(out: Path, vendor: str) -> dict[str, list[int]]:
    lines = (out / f"evaluation/{vendor}/{vendor}_texts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["text_id"] for row in rows] == list(range(len(rows)))
    return {row["text"]: row["image_ids"] for row in rows}


def test_trains_on_every_vendor_that_is_not_evaluated(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_emoji(EmojiConfig(folder=str(folder), evaluate=("two",)), out)
    assert sorted(path.name for path in (out / "tables").iterdir()) == ["one.parquet", "three.parquet"]
    assert [path.name for path in (out / "evaluation").iterdir()] == ["two"]
    assert not (out / "site/two").exists()
    urls = (out / "evaluation/two/two_urls.txt").read_text().split()
    assert urls == [f"http://corpus.invalid/two/{number:05d}.png" for number in range(3)]


def test_the_site_serves_every_url_of_the_tables(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_emoji(EmojiConfig(folder=str(folder), train=("one",), evaluate=("two",)), out)
    rows = pq.read_table(out / "tables/one.parquet").to_pylist()
    assert {row["caption"].split("，")[0] for row in rows} == set(COLOURS)
    with serve(out) as site:
        for row in rows:
            reply = urllib.request.urlopen(row["url"].replace("http://corpus.invalid", site), timeout=5)
            assert reply.headers["Content-Type"] == "image/png"
            pixel = Image.open(io.BytesIO(reply.read())).getpixel((0, 0))
            assert pixel == COLOURS[row["caption"][0]]


def test_same_input_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_emoji(EmojiConfig(folder=str(folder), evaluate=("two",)), tmp_path / name)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_captions_are_the_name_and_the_name_with_some_keywords() -> None:
    forms = captions(
        "书",
        ["书", "书本", "图书馆", "阅读", "知识"],
        count=40,
        max_keywords=2,
        separators=("，", "、"),
        rng=Random(0),
    )
    assert forms[0] == "书"
    assert len(forms) == 40
    for form in forms[1:]:
        name, _, keywords = form.partition("，")
        assert name == "书"
        chosen = keywords.split("、")
        assert 1 <= len(chosen) == len(set(chosen)) <= 2
        assert set(chosen) <= {"书本", "图书馆", "阅读", "知识"}
    assert len(set(forms)) > 10
    assert (
        captions("书", ["书"], count=3, max_keywords=3, separators=("，", "、"), rng=Random(0)) == ["书"] * 3
    )


def test_a_picture_has_no_two_rows_with_one_caption(folder: Path, tmp_path: Path) -> None:
    config = EmojiConfig(folder=str(folder), train=("one",), evaluate=("two",), captions_per_picture=30)
    make_emoji(config, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/tables/one.parquet").to_pylist()
    pairs = [(row["url"], row["caption"]) for row in rows]
    assert len(set(pairs)) == len(pairs)
    assert len(pairs) > 3 * 5


def test_flags_are_not_scored(folder: Path, tmp_path: Path) -> None:
    _write(folder, "two", [_row("旗: 中国", _png((200, 0, 0)), "Flags"), _row("苹果", _png((255, 0, 0)))])
    make_emoji(EmojiConfig(folder=str(folder), evaluate=("two",)), tmp_path / "out")
    assert _texts(tmp_path / "out", "two") == {"苹果": [0]}
    line = (tmp_path / "out/evaluation/two/two_imgs.tsv").read_text().splitlines()
    assert [base64.b64decode(text.split("\t")[1]) for text in line] == [_png((255, 0, 0))]
    urls = (tmp_path / "out/evaluation/two/two_urls.txt").read_text().split()
    assert urls == ["http://corpus.invalid/two/00001.png"]


def test_pictures_equal_in_pixels_or_name_are_all_hits(folder: Path, tmp_path: Path) -> None:
    red = (220, 30, 30)
    _write(
        folder,
        "two",
        [
            _row("红", _png(red)),
            _row("赤", _png(red, compress_level=0)),  # other bytes, same pixels
            _row("绿", _png((30, 160, 60))),
            _row("红", _png((255, 0, 0))),
            _row("朱", _png((*red, 255), "RGBA")),
            _row("白", _png((0, 0, 0, 0), "RGBA")),
            _row("素", _png((255, 255, 255))),
        ],
    )
    make_emoji(EmojiConfig(folder=str(folder), evaluate=("two",)), tmp_path / "out")
    assert _texts(tmp_path / "out", "two") == {
        "红": [0, 1, 3, 4],
        "赤": [0, 1, 4],
        "绿": [2],
        "朱": [0, 1, 4],
        "白": [5, 6],
        "素": [5, 6],
    }


def test_evaluation_texts_keep_the_order_of_first_appearance() -> None:
    texts = evaluation_texts(["b", "a", "b"], [b"1", b"2", b"2"])
    assert texts == [EvaluationText("b", [0, 1, 2]), EvaluationText("a", [1, 2])]


def test_bad_input_is_named(folder: Path, tmp_path: Path) -> None:
    def error(config: EmojiConfig) -> str:
        with pytest.raises(InputError) as caught:
            make_emoji(config, tmp_path / "out")
        return str(caught.value)

    assert "nowhere: no such folder" in error(EmojiConfig(folder=str(tmp_path / "nowhere")))
    message = error(EmojiConfig(folder=str(folder), evaluate=("noto",)))
    assert "noto.parquet: no such file; vendors found" in message
    assert "one, three, two" in message
    assert "sun.parquet: no such file" in error(
        EmojiConfig(folder=str(folder), train=("sun",), evaluate=("two",))
    )

    pq.write_table(pa.table({"png": [b""], "name": ["x"]}), folder / "bare.parquet")
    message = error(EmojiConfig(folder=str(folder), evaluate=("bare",)))
    assert "bare.parquet: no column name_zh, keywords_zh" in message
    assert "columns found: png, name" in message

    (folder / "text.parquet").write_text("no table")
    assert "text.parquet: not a readable table" in error(EmojiConfig(folder=str(folder), evaluate=("text",)))
    _write(folder, "text", [_row("红", b"no picture")])
    assert "text.parquet: the image of row 0 cannot be decoded" in error(
        EmojiConfig(folder=str(folder), train=("one",), evaluate=("text",))
    )
    _write(folder, "text", [_row("", _png((0, 0, 0)))])
    assert "text.parquet: row 0 has no name_zh" in error(EmojiConfig(folder=str(folder), evaluate=("text",)))
    _write(folder, "text", [_row("旗", _png((0, 0, 0)), "Flags")])
    assert "every image is in category Flags" in error(
        EmojiConfig(folder=str(folder), train=("one",), evaluate=("text",))
    )


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    _write(tmp_path, "only", [_row("红", _png((1, 2, 3)))])
    with pytest.raises(InputError, match="no file to train on besides the evaluated only"):
        make_emoji(EmojiConfig(folder=str(tmp_path), evaluate=("only",)), tmp_path / "out")


def test_a_vendor_cannot_be_trained_and_evaluated_on(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus\.train and corpus\.evaluate both name one"):
        make_emoji(EmojiConfig(folder=str(folder), train=("one",), evaluate=("one",)), tmp_path / "out")


@pytest.mark.parametrize("name", ["captions_per_picture", "max_keywords"])
def test_numbers_that_leave_nothing_to_make_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.toml: {name}: must be (at least|greater than) .*, found 0"):
        build(EmojiConfig, {"folder": "emoji", name: 0}, "run.toml")
