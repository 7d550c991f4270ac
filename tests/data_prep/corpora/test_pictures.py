"""The pictures corpus of a run: what is kept out of training, and the sets that ask for it."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.corpora.pictures.corpus import PicturesConfig, concepts, make_pictures
from pipeline.core.records import ConfigError, InputError

NUM_CONCEPTS = 40


def _png(red: int, green: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (red, green, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def _row(name_zh: str, png: bytes) -> dict[str, Any]:
    return {
        "name_zh": name_zh,
        "keywords_zh": ["颜色", "名字00", "名字01", "名字02", "名字03", "名字04", "名字05"],
        "name_en": f"{name_zh} thing",
        "keywords_en": ["colour"],
        "category_en": "things",
        "png": png,
    }


def _write(folder: Path, style: str, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{style}.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three styles of the same concepts, each in its own colours."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for green, style in enumerate(("first", "second", "flags-circle")):
        rows = [_row(f"名字{number:02d}", _png(number, green)) for number in range(NUM_CONCEPTS)]
        _write(folder, style, rows)
    return folder


def _make(tmp_path: Path, **settings: Any) -> Path:
    out = tmp_path / "out"
    config = PicturesConfig(
        kind="pictures", folder=str(tmp_path / "pictures"), **{"unseen_concepts": 0.3, **settings}
    )
    make_pictures(config, out)
    return out


def _queries(out: Path, name: str) -> set[str]:
    lines = (out / f"evaluation/{name}/{name}_texts.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["text"] for line in lines}


def _trained(out: Path) -> dict[str, list[str]]:
    return {
        path.stem: pq.read_table(path)["caption"].to_pylist() for path in (out / "tables").glob("*.parquet")
    }


@pytest.mark.usefixtures("folder")
def test_styles_and_concepts_stay_out_of_training(tmp_path: Path) -> None:
    out = _make(tmp_path)
    captions = _trained(out)
    assert set(captions) == {"first", "second"}
    names = {caption.partition("，")[0] for table in captions.values() for caption in table}
    unseen = _queries(out, "concept")
    assert 4 <= len(unseen) <= 20
    assert names.isdisjoint(unseen)
    assert _queries(out, "both") == unseen
    assert _queries(out, "style") == names
    assert len(names | unseen) == NUM_CONCEPTS
    # Nor does a keyword name them.
    words = {word for table in captions.values() for caption in table for word in caption.split("，")[1:]}
    assert not any(name in word for word in words for name in unseen)


@pytest.mark.usefixtures("folder")
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    def made(folder: str, seed: int) -> dict[str, bytes]:
        (tmp_path / folder).mkdir()
        config = PicturesConfig(kind="pictures", folder=str(tmp_path / "pictures"), seed=seed)
        make_pictures(config, tmp_path / folder)
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        return {path.relative_to(tmp_path / folder).as_posix(): path.read_bytes() for path in files}

    assert made("one", 0) == made("two", 0)
    assert made("three", 1) != made("four", 0)


def test_images_with_one_name_or_the_same_pixels_are_one_concept() -> None:
    assert concepts(["a", "b", "b", "c", "d"], [b"1", b"1", b"2", b"3", b"2"]) == [0, 0, 0, 1, 0]
    assert concepts([], []) == []


def test_an_image_that_training_shows_is_not_scored(folder: Path, tmp_path: Path) -> None:
    same = [_row(f"名字{number:02d}", _png(number, 0 if number % 2 else 2)) for number in range(NUM_CONCEPTS)]
    _write(folder, "flags-circle", same)
    asked = _queries(_make(tmp_path), "style")
    assert asked
    assert all(int(name[2:]) % 2 == 0 for name in asked)


def test_an_unseen_style_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no third; name styles that it has: first, flags-circle"):
        _make(tmp_path, unseen_styles=("third",))
    with pytest.raises(ConfigError, match="no style is left to train on"):
        _make(tmp_path, unseen_styles=("first", "second", "flags-circle"))
    (folder / "flags-circle.parquet").unlink()
    with pytest.raises(InputError, match="no image for the evaluation set 'style'"):
        _make(tmp_path)
