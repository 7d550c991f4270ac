"""The images of a tar's samples are found by what they are, wherever they stand."""

import gzip
import io
import tarfile
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit
from urllib.request import urlopen

import polars as pl
import pytest

from data_prep.formats.tar_images import image_members, is_image
from data_prep.sources.local_server import serve
from data_prep.sources.packed import pieces
from data_prep.sources.readers.source import PackedSource
from pipeline.core.records import InputError
from tests.helpers.sources import kept, manifest, picture, take_in


def _tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_an_image_is_known_by_its_first_bytes_then_by_its_extension(tmp_path: Path) -> None:
    path, image = tmp_path / "a.tar", picture()
    _tar(
        path,
        [
            ("./a.npy", b"numbers"), ("./a.png", image), ("./a.url", b"http://a.cn"), ("./a.cls", b"7"),
            ("00000/b.bin", image), ("00000/b.jpg", b"<html>"),
            ("c.jpg", b"<html>"), ("c.npy", b"numbers"), ("d.txt", image),
        ],
    )  # fmt: skip
    data, found = path.read_bytes(), image_members(str(path))
    bytes_of = {key: data[offset : offset + size] for key, (offset, size) in found.items()}
    assert bytes_of == {"a": image, "b": image, "c": b"<html>"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"])
def test_signatures(kind: str) -> None:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, kind)
    assert is_image(out.getvalue()[:16])
    assert not is_image(b"\x93NUMPY\x01\0v\0{'descr'")


def test_keys_that_are_numbers_find_their_images(tmp_path: Path) -> None:
    _tar(tmp_path / "00000.tar", [(f"./{number:09d}.png", picture()) for number in range(2)])
    rows = {"url": ["http://a.cn/0", "http://a.cn/1"], "caption": ["窗台上的一只橘猫"] * 2}
    pl.DataFrame({**rows, "key": [0, 1], "status": ["success"] * 2}).write_parquet(tmp_path / "00000.parquet")
    run = take_in(tmp_path / "run", PackedSource(kind="img2dataset", path=str(tmp_path), name="a"))
    assert kept(run).height == 2


def test_other_layouts_are_named(tmp_path: Path) -> None:
    source = PackedSource(kind="img2dataset", path=str(tmp_path), name="a")
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "000000000.json").write_text("{}")
    with pytest.raises(InputError, match="output_format=files"):
        pieces(source)
    _tar(tmp_path / "00000.tar", [("a.png", picture())])
    with pytest.raises(InputError, match=r"img2dataset writes this table next to 00000\.tar"):
        pieces(source)
    path = tmp_path / "00001.tar"
    path.write_bytes(gzip.compress((tmp_path / "00000.tar").read_bytes()))
    with pytest.raises(InputError, match="compressed with gzip; unpack it first"):
        image_members(str(path))


def test_webdataset_tars_by_themselves(tmp_path: Path) -> None:
    image, folder = picture(), tmp_path / "sets"
    (folder / "00").mkdir(parents=True)
    _tar(
        folder / "00" / "a.tar",
        [
            ("./a.jpg", image), ("./a.npy", b"numbers"), ("./a.txt", "窗台上的一只橘猫\n".encode()),
            ("one/b.png", image), ("one/b.json", '{"caption": "草地上的一只黑狗", "url": "http://a.cn/b"}'.encode()),
            ("two/b.seg.png", image), ("two/b.caption", "雪山下的红色小屋".encode()),
            ("lost.txt", "没有图片的一句话".encode()), ("bad.jpg", image), ("bad.json", b"{"),
        ],
    )  # fmt: skip
    run = take_in(tmp_path / "run", PackedSource(kind="webdataset", path=str(folder), name="w"))
    found = manifest(run, "corpus")
    assert found.dropped == {"image_missing": 1, "malformed:json": 1}
    assert (found.num_in, found.num_kept) == (5, 3)
    rows = kept(run).sort("caption")
    assert rows["caption"].to_list() == sorted(["窗台上的一只橘猫", "草地上的一只黑狗", "雪山下的红色小屋"])
    assert "http://a.cn/b" in rows["url"].to_list()
    data = (folder / "00" / "a.tar").read_bytes()
    for address in rows["picture_at"]:
        place = dict(parse_qsl(urlsplit(address).query))
        start = int(place["offset"])
        assert data[start : start + int(place["size"])] == image
    with serve(None, {}, {"w": str(folder)}) as site:
        at = urlsplit(rows["picture_at"][0])
        with urlopen(f"{site}{at.path}?{at.query}") as answer:
            assert answer.read() == image
    with pytest.raises(InputError, match=r"no \.tar in it or below it"):
        pieces(PackedSource(kind="webdataset", path=str(tmp_path / "run" / "filter_text"), name="w"))
