"""Images that are on disk already: TSV, LMDB, img2dataset and shards as sources."""

import base64
import io
import pickle
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import lmdb
import polars as pl
import pytest

from data_prep.corpus_facts import packed_folders
from data_prep.formats.tar import TarWriter
from data_prep.sources.local_server import HOST, serve
from data_prep.sources.readers.source import PackedSource
from pipeline.core.records import InputError
from pipeline.core.run import Run, make_context
from tests.helpers.sources import cn_clip_set, kept, key_of, manifest, picture, take_in, why


def _fetch(run: Run, at: str) -> bytes:
    found = manifest(run, "corpus")
    context = make_context(run, run.stage("filter_text"))
    assert context is not None
    assert found.extra
    with (
        serve(None, packed=packed_folders(context)) as address,
        urllib.request.urlopen(at.replace(f"http://{HOST}", address)) as response,
    ):
        return bytes(response.read())


def test_cn_clip_tsv(tmp_path: Path) -> None:
    cn_clip_set(tmp_path / "own")
    run = take_in(tmp_path / "run", PackedSource(kind="cn_clip_tsv", path=str(tmp_path / "own"), name="own"))
    found = manifest(run, "corpus")
    assert (found.num_in, found.num_kept) == (6, 2)
    assert found.dropped == {
        "image_missing": 1, "malformed:columns": 1, "malformed:picture_line": 1, "unpaired": 1,
    }  # fmt: skip
    missing = f"http://{HOST}/packed/own/train/77"
    assert why(run, missing) == [
        f"{key_of(missing, '图片不在这里吧')}  own", "  dropped by corpus: image_missing"
    ]  # fmt: skip
    assert why(run, key_of("", "没有配对的文字"))[1] == "  dropped by corpus: unpaired"
    rows = kept(run)
    assert rows["url"].to_list() == [f"http://{HOST}/packed/own/train/{number}" for number in (5, 9)]
    assert [_fetch(run, at) for at in rows["picture_at"]] == [picture(), picture((0, 0, 255))]


def test_broken_lines_of_a_picture_tsv_are_counted_each_with_its_reason(tmp_path: Path) -> None:
    cn_clip_set(tmp_path)
    encoded = base64.b64encode(picture((0, 200, 0)))
    with open(tmp_path / "train_imgs.tsv", "ab") as file:
        file.write(
            b"\n" + b"12\n" + b"12\t\r\n" + b"x\t" + encoded + b"\n" + b"9" * 19 + b"\t" + encoded + b"\n"
        )
        file.write(b"\xff\xfe\n" + b"5\t" + encoded)  # the last line of a number counts, as in LMDB
    with open(tmp_path / "train_texts.jsonl", "a") as file:
        file.write('{"text_id": 9, "text": "编号长得不像话", "image_ids": [' + "9" * 30 + "]}\n")
    run = take_in(tmp_path / "run", PackedSource(kind="cn_clip_tsv", path=str(tmp_path), name="own"))
    found = manifest(run, "corpus")
    assert found.dropped == {
        "image_missing": 1, "malformed:columns": 2, "malformed:picture_line": 6,
        "malformed:picture_repeated": 1, "unpaired": 1,
    }  # fmt: skip
    assert found.num_kept == 2
    assert _fetch(run, kept(run)["picture_at"][0]) == picture((0, 200, 0))
    assert pl.read_parquet(Path(run.folder, "corpus", "malformed", "00000.parquet")).height == 9


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


def test_cn_clip_lmdb_is_read_without_running_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    samples: list[bytes] = [
        pickle.dumps((5, 1, "左边红色的图片")),
        pickle.dumps(_Evil()),
        pickle.dumps((6, 2, "图片不在这里吧")),
        b"\x80",
    ]
    for name, items in {
        "pairs": {**{str(n): data for n, data in enumerate(samples)}, "num_samples": b"4"},
        "imgs": {"5": base64.b64encode(picture()), "num_images": b"1"},
    }.items():
        folder = tmp_path / "lmdb" / "train" / name
        folder.mkdir(parents=True)
        with lmdb.open(str(folder), map_size=1 << 20) as environment, environment.begin(write=True) as out:
            for key, value in items.items():
                out.put(key.encode(), value)
    run = take_in(tmp_path / "run", PackedSource(kind="cn_clip_lmdb", path=str(tmp_path), name="own"))
    assert manifest(run, "corpus").dropped == {"image_missing": 1, "malformed:pickle": 2}
    assert not (tmp_path / "evil").exists()
    rows = kept(run)
    assert rows["caption"].to_list() == ["左边红色的图片"]
    assert _fetch(run, rows["picture_at"][0]) == picture()
    with (
        lmdb.open(str(tmp_path / "lmdb" / "train" / "pairs")) as environment,
        environment.begin(write=True) as out,
    ):
        out.put(b"num_samples", b"1" * 18)
    with pytest.raises(InputError, match=r"num_samples says 1+, but it holds 5 entries"):
        take_in(tmp_path / "absurd", PackedSource(kind="cn_clip_lmdb", path=str(tmp_path), name="own"))


def test_img2dataset_output_keeps_the_addresses_of_the_web(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, data in {
            "000000000.jpg": picture(),
            "000000000.txt": b"x",
            "000000000.json": b"{}",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    pl.DataFrame(
        {
            "url": [f"http://a.cn/{number}.jpg" for number in range(3)],
            "caption": ["左边红色的图片", "没有下载的图片", "包里没有的图片"],
            "key": ["000000000", "000000001", "000000002"],
            "status": ["success", "failed_to_download", "success"],
        }
    ).write_parquet(folder / "00000.parquet")
    run = take_in(tmp_path / "run", PackedSource(kind="img2dataset", path=str(folder), name="old"))
    assert manifest(run, "corpus").dropped == {"image_missing": 1, "not_downloaded": 1}
    assert why(run, "http://a.cn/1.jpg") == [
        f"{key_of('http://a.cn/1.jpg', '没有下载的图片')}  old", "  dropped by corpus: not_downloaded"
    ]  # fmt: skip
    assert why(run, "http://a.cn/2.jpg")[1] == "  dropped by corpus: image_missing"
    rows = kept(run)
    assert rows["url"].to_list() == ["http://a.cn/0.jpg"]
    assert _fetch(run, rows["picture_at"][0]) == picture()


def test_a_piece_without_a_single_picture_is_counted(tmp_path: Path) -> None:
    """The last shard of img2dataset's is often small: all of its addresses may have failed."""
    for name, status in (("00000", "success"), ("00001", "failed_to_download")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            if status == "success":
                member = tarfile.TarInfo("000000000.jpg")
                member.size = len(picture())
                tar.addfile(member, io.BytesIO(picture()))
        pl.DataFrame(
            {
                "url": [f"http://a.cn/{name}"],
                "caption": ["左边红色的图片"],
                "key": ["000000000"],
                "status": [status],
            }
        ).write_parquet(tmp_path / f"{name}.parquet")
    run = take_in(tmp_path / "run", PackedSource(kind="img2dataset", path=str(tmp_path), name="old"))
    assert manifest(run, "corpus").dropped == {"not_downloaded": 1}
    assert kept(run)["url"].to_list() == ["http://a.cn/00000"]
    assert why(run, "http://a.cn/00001")[1] == "  dropped by corpus: not_downloaded"


def test_a_runs_shards_are_a_source(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    pictures = [picture(), picture((0, 0, 255))]
    with TarWriter(str(folder / "00000.tar")) as tar:
        places = [tar.add(f"{number}.jpg", data) for number, data in enumerate(pictures)]
    rows = {
        "key": ["a", "b", "c"],
        "url": [f"http://a.cn/{number}.jpg" for number in range(3)],
        "caption": ["左边红色的图片", "左边蓝色的图片", "包里没有的图片"],
        "offset_bytes": [*(place.offset_bytes for place in places), 1 << 20],
        "size_bytes": [*(place.size_bytes for place in places), 9],
        "caption_en": ["red", "blue", "none"],
        "pair_score": [0.1, 0.2, 0.3],  # stays behind: another run scores anew
    }
    pl.DataFrame(rows).write_parquet(folder / "00000.parquet")
    source = PackedSource(kind="shards", path=str(folder), name="first", carry_columns=("caption_en",))
    run = take_in(tmp_path / "run", source)
    assert manifest(run, "corpus").dropped == {"image_missing": 1}
    found = kept(run)
    assert found["url"].to_list() == rows["url"][:2]
    assert found["caption_en"].to_list() == ["red", "blue"]
    assert "pair_score" not in found.columns
    assert [_fetch(run, at) for at in found["picture_at"]] == pictures
    missing = PackedSource(kind="shards", path=str(folder), name="first", carry_columns=("caption_fr",))
    with pytest.raises(InputError, match=r"00000\.parquet: no column caption_fr; found key, url"):
        take_in(tmp_path / "missing", missing)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("random", ["左边红色的图片", "左边蓝色的图片"]),
        ("first", ["左边红色的图片", "左边蓝色的图片"]),
        ("each", ["左边红色的图片", "红色的方块在左", "左边蓝色的图片"]),
        (None, []),
    ],
)
def test_shards_whose_rows_keep_several_captions(tmp_path: Path, how: Any, expected: list[str]) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    with TarWriter(str(folder / "00000.tar")) as tar:
        places = [tar.add(f"{number}.jpg", picture()) for number in range(2)]
    rows = {
        "key": ["a", "b"],
        "url": ["http://a.cn/0.jpg", "http://a.cn/1.jpg"],
        "caption": ["左边红色的图片", "左边蓝色的图片"],
        "captions": [["左边红色的图片", "红色的方块在左"], None],
        "offset_bytes": [place.offset_bytes for place in places],
        "size_bytes": [place.size_bytes for place in places],
    }
    pl.DataFrame(rows).write_parquet(folder / "00000.parquet")
    source = PackedSource(kind="shards", path=str(folder), name="first", list_captions=how)
    if how is None:
        with pytest.raises(InputError, match="'captions' holds lists of captions; set list_captions"):
            take_in(tmp_path / "run", source)
        return
    found = kept(take_in(tmp_path / "run", source))
    assert found["caption"].to_list() == expected
    if how == "random":
        assert found["captions"].to_list() == [rows["captions"][0], ["左边蓝色的图片"]]


@pytest.mark.parametrize(
    "path", ["../secret.txt?offset=0&size=3", "%2e%2e/secret.txt?offset=0&size=3", "a?offset=0"]
)
def test_the_site_serves_nothing_outside_a_packed_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.txt").write_text("abc")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a").write_text("abc")
    with serve(None, packed={"own": str(tmp_path / "own")}) as address:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/packed/own/{path}")
        with urllib.request.urlopen(f"{address}/packed/own/a?offset=1&size=2") as response:
            assert response.read() == b"bc"
