"""Folders of images with a text file each, and what img2dataset writes besides tars."""

import json
from pathlib import Path
from typing import Any

import img2dataset.writer
import polars as pl
import pyarrow as pa
import pytest

from data_prep.corpus import SourcesConfig
from data_prep.sources import packed
from data_prep.sources.local_server import HOST
from data_prep.sources.readers.image_folder import listing_digest
from data_prep.sources.readers.source import PackedSource
from data_prep.sources.regions import Converted, Places
from pipeline.core.config import build
from pipeline.core.records import ConfigError, InputError
from tests.helpers.sources import kept, manifest, picture, take_in, why


def _read(source: PackedSource, folder: Path) -> tuple[pl.DataFrame, Converted]:
    (files,) = packed.pieces(source)
    to = Places(*(str(folder / f"out-{name}") for name in "tmdc"))
    found = packed.unpack(source, files, to)
    return pl.read_parquet(to.table), found


def _folder(folder: Path) -> None:
    (folder / "cats").mkdir(parents=True)
    for name in ("cats/1.jpg", "cats/2.PNG", "cats/3.png", "cats/4.png", "b.c.png", "cats/._1.jpg"):
        (folder / name).write_bytes(picture())
    (folder / "cats" / "1.txt").write_text("\ufeff窗台上的一只橘猫\n", encoding="utf-8")
    (folder / "cats" / "2.json").write_text(json.dumps({"caption": "草地上的一只黑狗"}))
    (folder / "cats" / "3.caption").write_bytes("雪山下的小屋".encode("gb18030"))
    (folder / "cats" / "9.txt").write_text("没有图片的一句话")
    (folder / "b.c.png.txt").write_text("海边的红色小屋")
    (folder / "notes.npy").write_bytes(b"numbers")


def test_captions_beside_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "set")
    (tmp_path / "set" / "cats" / "5.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "secret.png").write_bytes(picture())
    source = PackedSource(kind="folder", path=str(tmp_path / "set"), name="own")
    run = take_in(tmp_path / "run", source)
    found = manifest(run, "corpus")
    assert (found.num_in, found.num_kept) == (7, 4)
    assert found.dropped == {"image_missing": 1, "image_outside": 1, "malformed:encoding": 1}
    assert manifest(run, "filter_text").dropped == {"caption_missing": 1}
    assert kept(run).sort("row").select("url", "caption").rows() == [
        (f"http://{HOST}/pictures/own/b.c.png", "海边的红色小屋"),
        (f"http://{HOST}/pictures/own/cats/1.jpg", "窗台上的一只橘猫"),
        (f"http://{HOST}/pictures/own/cats/2.PNG", "草地上的一只黑狗"),
    ]
    for asked in ("cats/1.jpg", str(tmp_path / "set" / "cats" / "1.jpg")):
        assert "own row 1" in why(run, asked)[0]
    monkeypatch.chdir(tmp_path)
    assert "own row 1" in why(run, "set/cats/1.jpg")[0]
    assert why(run, "cats/9.txt")[1] == "  dropped by corpus: image_missing"
    assert "malformed:encoding" in why(run, "cats/3.caption")[1]


def test_captions_in_another_encoding_or_key(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.txt").write_bytes("雪山下的小屋".encode("gb18030"))
    (tmp_path / "a.json").write_text(json.dumps({"zh": ["一", "二"], "caption": "三"}))

    def captions(**settings: Any) -> list[str]:
        return _read(
            PackedSource(kind="folder", path=str(tmp_path), name="own", **settings), tmp_path / ".."
        )[0]["caption"].to_list()

    assert captions(encoding="gb18030") == ["雪山下的小屋"]
    assert captions(caption_column="caption") == ["三"]
    assert captions(caption_column="zh", list_captions="each") == ["一", "二"]
    with pytest.raises(InputError, match=r"a\.json: column 'zh' holds lists of captions"):
        captions(caption_column="zh")


def test_what_changes_a_folder_changes_its_digest(tmp_path: Path) -> None:
    _folder(tmp_path)
    seen = {listing_digest(str(tmp_path))}
    (tmp_path / "notes.npy").write_bytes(b"others")
    assert listing_digest(str(tmp_path)) in seen
    for name, data in (("cats/1.txt", b"a"), ("cats/1.jpg", b"a"), ("cats/new.jpg", b"a")):
        (tmp_path / name).write_bytes(data)
        seen.add(listing_digest(str(tmp_path)))
    assert len(seen) == 4


def test_folders_without_captions_are_refused(tmp_path: Path) -> None:
    source = PackedSource(kind="folder", path=str(tmp_path / "set"), name="own")
    with pytest.raises(InputError, match="no such folder"):
        packed.pieces(source)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1.jpg").write_bytes(picture())
    with pytest.raises(
        InputError, match=r'no image with a .* of the same name .* kind = "table" with picture_folder'
    ):
        _read(source, tmp_path)
    (tmp_path / "set" / "metadata.csv").write_text("file_name,text\n1.jpg,一只猫\n")
    with pytest.raises(InputError, match=r'kind = "huggingface" reads metadata\.csv'):
        _read(source, tmp_path)


_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "url", "caption", "status")])


def _written(writer: Any, folder: Path) -> None:
    """Write two images and a failure as img2dataset does."""
    folder.mkdir()
    out = writer(0, str(folder), True, 5, _SCHEMA, "jpg")
    for number, image in enumerate((picture(), None, picture((0, 0, 200)))):
        key, caption = f"{number:09d}", f"第{number}张红色的图片"
        status = "failed_to_download" if image is None else "success"
        meta = {"key": key, "url": f"http://a.cn/{number}", "caption": caption, "status": status}
        out.write(image, key, caption, meta)
    out.close()


@pytest.mark.parametrize("form", ["Parquet", "Files", "WebDataset"])
def test_outputs_of_img2dataset(form: str, tmp_path: Path) -> None:
    _written(getattr(img2dataset.writer, f"{form}SampleWriter"), tmp_path / "set")
    source = PackedSource(kind="img2dataset", path=str(tmp_path / "set"), name="i")
    rows, found = _read(source, tmp_path)
    assert rows.select("url", "caption").rows() == [
        (f"http://a.cn/{n}", f"第{n}张红色的图片") for n in (0, 2)
    ]
    assert {reason: count for reason, count in found.dropped.items() if count} == {"not_downloaded": 1}
    assert rows["picture_at"].str.contains("/unpacked/" if form == "Parquet" else "/packed/").all()
    if form == "Files":
        (tmp_path / "set" / "00000" / "000000000.jpg").unlink()
        rows, found = _read(source, tmp_path)
        assert (rows["url"].to_list(), found.dropped["image_missing"]) == (["http://a.cn/2"], 1)


def test_settings_of_other_kinds_are_refused() -> None:
    fields = {"kind": "folder", "path": "p", "name": "n"}
    with pytest.raises(ConfigError, match="image_column is a setting of kind huggingface, not of folder"):
        build(PackedSource, {**fields, "image_column": "a"}, "my.toml")
    with pytest.raises(
        ConfigError, match=r"must be one of 'table', .* 'webdataset', 'huggingface', 'folder', found"
    ):
        build(SourcesConfig, {"kind": "sources", "sources": [{**fields, "kind": "hf"}]}, "my.toml")
    with pytest.raises(ConfigError, match="encoding 'nonsense' is not known"):
        build(PackedSource, {**fields, "encoding": "nonsense"}, "my.toml")
