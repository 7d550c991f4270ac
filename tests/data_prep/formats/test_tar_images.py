"""The images of a tar's samples are found by what they are, wherever they stand."""

import gzip
import io
import tarfile
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit
from urllib.request import urlopen

import polars as pl
import pytest

from data_prep.filters.text import FilterTextConfig
from data_prep.formats.tar_images import image_members, is_image, unpack_gzip
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
    with pytest.raises(InputError, match=r"neither \.tar nor \.parquet of img2dataset's output"):
        pieces(source)
    pl.DataFrame({"url": ["a"], "caption": ["b"]}).write_parquet(tmp_path / "00000.parquet")
    with pytest.raises(InputError, match=r"neither a \.tar nor a folder of that name next to it"):
        pieces(source)
    (tmp_path / "00000.parquet").unlink()
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


def test_gzipped_tars_patterns_and_keys_of_captions(tmp_path: Path) -> None:
    image, folder = picture(), tmp_path / "sets"
    for place, packing in (("a/0.tar.gz", "w:gz"), ("b/1.tgz", "w:gz"), ("c/2.tar", "w")):
        (folder / place).parent.mkdir(parents=True)
        with tarfile.open(folder / place, packing) as tar:
            for name, data in (("x.jpg", image), ("x.json", b'{"zh": "a", "caption": ["b", "c"]}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pattern = str(folder / "{a,b}" / "**" / "*")
    source = PackedSource(kind="webdataset", path=pattern, name="w", caption_column="zh")
    filters = FilterTextConfig(min_characters=1)
    run = take_in(tmp_path / "run", source, filters=filters)
    rows = kept(run)
    assert rows["caption"].to_list() == ["a", "a"]
    assert sorted(rows["url"]) == [
        f"http://corpus.invalid/packed/w/train/{place}/x" for place in ("a/0.tar.gz", "b/1.tgz")
    ]
    with serve(None, {}, {}, {"w": f"{run.folder}/corpus/images"}) as site:
        for address in rows["picture_at"]:
            with urlopen(address.replace("http://corpus.invalid", site)) as answer:
                assert answer.read() == image
    lists = PackedSource(kind="webdataset", path=str(folder), name="w", list_captions="each")
    found = manifest(take_in(tmp_path / "lists", lists, filters=filters), "filter_text")
    assert found.num_kept == 6
    assert found.num_in == 6
    (folder / "a" / "0.tar").touch()
    with pytest.raises(InputError, match=r"0\.tar\.gz: 0\.tar next to it holds the same; remove one"):
        pieces(lists)
    with pytest.raises(InputError, match="braces do not match"):
        pieces(PackedSource(kind="webdataset", path=str(folder / "{a"), name="w"))


def test_gzipped_tars_are_read_within_bounds(tmp_path: Path) -> None:
    bomb, cut = tmp_path / "bomb.tar.gz", tmp_path / "cut.tar.gz"
    bomb.write_bytes(gzip.compress(bytes(4 << 20)))
    with pytest.raises(InputError, match=r"bomb\.tar\.gz: holds more than 100 times its own size"):
        unpack_gzip(str(bomb), str(tmp_path / "out"))
    _tar(tmp_path / "a.tar", [("a.png", picture())])
    cut.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes())[:-9])
    with pytest.raises(InputError, match=r"cut\.tar\.gz: damaged \(.*\); download this shard again"):
        unpack_gzip(str(cut), str(tmp_path / "out"))
