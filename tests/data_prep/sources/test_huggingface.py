"""Folders that Hugging Face `datasets` writes, as sources: each image's bytes arrive, and each row counts."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from urllib.request import urlopen

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.download import own_images
from data_prep.sources import packed
from data_prep.sources.local_server import HOST
from data_prep.sources.readers.source import PackedSource
from data_prep.sources.regions import Converted, Places
from data_prep.sources.text_rows import BETWEEN
from pipeline.core.records import InputError
from pipeline.core.run import make_context
from tests.helpers.sources import kept, manifest, picture, take_in, why

datasets.disable_progress_bars()
IMAGES = [picture((number, 30, 200)) for number in range(7)]
CAPTIONS = [f"第{number}张红色的图片" for number in range(7)]


def _source(path: Path | str, **settings: Any) -> PackedSource:
    return PackedSource(kind="huggingface", path=str(path), name="hf", **settings)


def _data_set(rows: range) -> Any:
    table = {"image": [IMAGES[row] for row in rows], "text": [CAPTIONS[row] for row in rows]}
    return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())


def _read(source: PackedSource, folder: Path) -> tuple[pl.DataFrame, list[Converted]]:
    """Return the rows of every piece, and what each piece came to."""
    tables, found = [], []
    folder = folder / "out"  # outside the source, whose folder may be this one
    for number, files in enumerate(packed.pieces(source)):
        names = ("table", "malformed", "dropped")
        to = Places(
            *(str(folder / f"{number}-{name}.parquet") for name in names), str(folder / f"{number}.tar")
        )
        found.append(packed.unpack(source, files, to))
        tables.append(pl.read_parquet(to.table))
    return pl.concat(tables, how="vertical_relaxed"), found


def _bytes(source: PackedSource, rows: pl.DataFrame, copies: Path) -> list[bytes]:
    """Return what lies at the place of each row: in the source's folder, or in that of the copies."""
    folder = source.path if os.path.isdir(source.path) else os.path.dirname(source.path)
    found = []
    for address in map(urlsplit, rows["picture_at"]):
        kind, name, relative = address.path.removeprefix("/").split("/", 2)
        place = {key: int(value) for key, value in parse_qsl(address.query)}
        root = {"packed": Path(folder), "unpacked": copies}[kind]
        with open(root / unquote(relative), "rb") as file:
            file.seek(place["offset"])
            found.append(file.read(place["size"]))
        assert (address.hostname, name) == (HOST, source.name)
    return found


def _pushed(folder: Path) -> None:
    """Write files as push_to_hub names them."""
    (folder / "data").mkdir(parents=True)
    for number, rows in enumerate((range(4), range(4, 7))):
        _data_set(rows).to_parquet(folder / "data" / f"train-{number:05d}-of-00002.parquet")
    _data_set(range(1)).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("# a card\n")


def _saved(folder: Path) -> None:
    _data_set(range(7)).save_to_disk(folder, num_shards=2)
    (folder / "cache-0123456789abcdef.arrow").write_bytes(b"of map()")


def _saved_splits(folder: Path) -> None:
    both = {"train": _data_set(range(7)), "test": _data_set(range(2))}
    datasets.DatasetDict(both).save_to_disk(folder)


def _compressed(folder: Path) -> None:
    folder.mkdir()
    table = pa.table({"jpg": IMAGES, "txt": CAPTIONS, "__key__": CAPTIONS})
    pq.write_table(table, folder / "a.parquet", row_group_size=3, compression="zstd")


def _plain_bytes(folder: Path) -> None:
    folder.mkdir()
    table = pa.table({"jpg": IMAGES, "caption": CAPTIONS})
    pq.write_table(
        table,
        folder / "a.parquet",
        row_group_size=5,
        compression="none",
        use_dictionary=False,
        data_page_size=99,
    )


def _compressed_arrow(folder: Path) -> None:
    folder.mkdir()
    table = pa.table({"img": pa.array(IMAGES, pa.large_binary()), "text": CAPTIONS})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(folder / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema, options=options) as out,
    ):
        out.write_table(table, max_chunksize=3)


@pytest.mark.parametrize(
    ("write", "copied"),
    [
        (_pushed, 0),
        (_saved, 0),
        (_saved_splits, 0),
        (_plain_bytes, 0),
        (_compressed, 7),
        (_compressed_arrow, 7),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_images_arrive_as_they_were_written(write: Any, copied: int, tmp_path: Path) -> None:
    write(tmp_path / "set")
    source = _source(tmp_path / "set")
    rows, found = _read(source, tmp_path)
    assert rows["caption"].to_list() == CAPTIONS
    assert rows["url"].n_unique() == 7
    assert _bytes(source, rows, tmp_path / "out") == IMAGES
    assert sum(piece.num_copies for piece in found) == copied  # what lies there as it is needs none


def test_a_run_takes_copies_from_its_own_folder(tmp_path: Path) -> None:
    _compressed(tmp_path / "set")
    run = take_in(tmp_path / "run", _source(tmp_path / "set"))
    found, rows = manifest(run, "corpus"), kept(run).sort("row")
    assert (found.num_in, found.num_kept, found.dropped) == (7, 7, {})
    assert [shard.path for shard in found.shards if shard.path.endswith(".tar")] == ["images/00000.tar"]
    assert found.extra["00000"]["unpacked"] == ["hf"]
    assert _bytes(_source(tmp_path / "set"), rows, tmp_path / "run/corpus/images") == IMAGES
    context = make_context(run, run.stage("filter_text"))
    assert context is not None
    with own_images.served(context) as own:
        asked = rows.select(own.address(rows.columns)).to_series().to_list()
        assert [urlopen(address).read() for address in asked] == IMAGES
    assert "  hf row 2  " in why(run, rows["url"][2])[0]


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0123"
    _pushed(snapshot)
    blobs = tmp_path / "datasets--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.rglob("*.parquet"))):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    rows, _ = _read(_source(snapshot), tmp_path)
    served = _source(tmp_path / "datasets--a--b")
    assert _bytes(served, rows, tmp_path) == IMAGES


def test_splits(tmp_path: Path) -> None:
    _pushed(tmp_path / "set")
    assert len(packed.pieces(_source(tmp_path / "set", split="test"))) == 1
    with pytest.raises(InputError, match=r"no split 'valid' .* found test, train; set split"):
        packed.pieces(_source(tmp_path / "set", split="valid"))
    pattern = str(tmp_path / "set" / "data" / "{train,test}-00000-*.parquet")
    assert len(packed.pieces(_source(pattern))) == 1
    with pytest.raises(InputError, match=r"valid-\*\.parquet: no such file"):
        packed.pieces(_source(tmp_path / "set" / "data" / "{train,valid}-*.parquet"))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "set" / "data" / "own_metadata.csv").write_text("about,columns\n")
    assert len(packed.pieces(_source(tmp_path / "set"))) == 2
    with pytest.raises(InputError, match="it is empty"):
        packed.pieces(_source(tmp_path / "nothing"))
    (tmp_path / "nothing" / "images.zip").touch()
    with pytest.raises(InputError, match=r"found 1 with \.zip; .* archives have to be unpacked"):
        packed.pieces(_source(tmp_path / "nothing"))


def test_a_saved_set_lacks_none_of_its_files(tmp_path: Path) -> None:
    _saved(tmp_path / "set")
    (tmp_path / "set" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        InputError, match=r"data-00001-of-00002\.arrow: no such file, but state\.json lists it"
    ):
        packed.pieces(_source(tmp_path / "set"))
    (tmp_path / "set" / "state.json").write_text('{"_data_files": [{"filename": "../a.arrow"}]}')
    with pytest.raises(InputError, match=r"state\.json: not what save_to_disk writes"):
        packed.pieces(_source(tmp_path / "set"))


def _table(folder: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def test_columns_that_are_not_clear_are_listed_with_their_types(tmp_path: Path) -> None:
    path = _table(tmp_path, image=IMAGES[:1], jpg=IMAGES[:1], caption=["一"], text=["二"])
    files = [str(path)]
    to = Places(*(str(tmp_path / name) for name in "tmdc"))
    with pytest.raises(
        InputError, match=r"several .* images \(image, jpg\); set image_column .* jpg \(binary\)"
    ):
        packed.unpack(_source(path), files, to)
    with pytest.raises(InputError, match=r"several .* captions \(caption, text\); set caption_column"):
        packed.unpack(_source(path, image_column="jpg"), files, to)
    with pytest.raises(InputError, match=r"no column 'title' \(caption_column of source hf\); found image"):
        packed.unpack(_source(path, image_column="jpg", caption_column="title"), files, to)
    _table(tmp_path, image=[1], caption=["一"])
    with pytest.raises(InputError, match="column 'image' is int64, neither an image"):
        packed.unpack(_source(path, image_column="image"), files, to)
    _table(tmp_path, a=[1], caption=["一"])
    with pytest.raises(InputError, match=r"no column of images; set image_column .* of a \(int64\)"):
        packed.unpack(_source(path), files, to)
    _table(tmp_path, jpg=IMAGES[:2], json=[{"zh": "一只猫", "n": 1}, {"zh": "一只狗", "n": 2}])
    with pytest.raises(
        InputError, match=r"no column of captions; set caption_column .* json \(struct<zh: string"
    ):
        packed.unpack(_source(path), files, to)
    rows, _ = _read(_source(path, caption_column="json.zh"), tmp_path)
    assert rows["caption"].to_list() == ["一只猫", "一只狗"]


def test_lists_of_captions(tmp_path: Path) -> None:
    path = _table(
        tmp_path,
        image=IMAGES[:3],
        captions=[["一", "二"], [], None],
        url=["http://a.cn/1", "b", None],
        n=[1, 2, 3],
    )
    with pytest.raises(
        InputError, match="column 'captions' holds lists of captions; set list_captions = \"each\""
    ):
        _read(_source(path), tmp_path)
    each, _ = _read(_source(path, list_captions="each"), tmp_path)
    assert each["caption"].to_list() == ["一", "二", None, None]
    assert each["url"][:2].to_list() == ["http://a.cn/1"] * 2
    assert each["url"][2].startswith(f"http://{HOST}/packed/hf/train/a.parquet/1")
    first, _ = _read(_source(path, list_captions="first", carry_columns=("n",)), tmp_path)
    assert first.select("caption", "n").rows() == [("一", 1), (None, 2), (None, 3)]
    all_of_it, (found,) = _read(_source(path, list_captions="random"), tmp_path)
    assert all_of_it["caption"].to_list() == [f"一{BETWEEN}二", None, None]  # for one row of the sidecar
    assert found.source.list_captions == "random"
    with pytest.raises(ValueError, match="carry_columns names url, which a caption table has anyway"):
        _source(path, carry_columns=("url",))


def test_an_image_is_looked_for_in_the_folder_and_never_outside(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "猫 1.png").write_bytes(IMAGES[0])
    (tmp_path / "secret.png").write_bytes(IMAGES[1])
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    paths = [
        "images/猫 1.png",
        str(folder / "images" / "猫 1.png"),
        "../secret.png",
        "link.png",
        "no.png",
        None,
    ]
    image = pa.array(
        [{"bytes": None, "path": path} for path in paths],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    _table(folder, image=image, text=CAPTIONS[:6])
    rows, (found,) = _read(_source(folder), tmp_path)
    assert _bytes(_source(folder), rows, tmp_path) == [IMAGES[0]] * 2
    assert found.dropped == {"image_missing": 2, "image_outside": 2}


def test_damage_is_one_line(tmp_path: Path) -> None:
    for name, data in (
        ("a.parquet", b"PAR1 and no more PAR1"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\0\0\0broken"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"{name}: not a readable table .*: download or copy it again"):
            _read(_source(tmp_path / name), tmp_path)


_CELLS = st.one_of(st.none(), st.just(b"bad \xff"), st.sampled_from([text.encode() for text in CAPTIONS]))
_ROWS = st.lists(
    st.tuples(
        st.sampled_from(["bytes", "path", "lost", "outside", "null", "empty"]),
        st.one_of(st.none(), st.lists(_CELLS, max_size=3)),
    ),
    min_size=1,
    max_size=20,
)


def _expected(rows: Sequence[tuple[str, list[bytes | None] | None]]) -> dict[str, int]:
    """Count what each caption comes to, without the reader."""
    found: dict[str, int] = {}
    reasons = {
        "lost": "image_missing",
        "null": "image_missing",
        "empty": "image_missing",
        "outside": "image_outside",
    }
    for kind, captions in rows:
        for caption in captions or [None]:
            damaged = caption is not None and b"\xff" in caption
            reason = "malformed:encoding" if damaged else reasons.get(kind, "kept")
            found[reason] = found.get(reason, 0) + 1
    return found


@settings(max_examples=15, deadline=None)
@given(rows=_ROWS, form=st.sampled_from(["none", "snappy", "arrow"]), rows_at_once=st.integers(1, 7))
def test_every_row_is_kept_dropped_or_malformed(rows: Any, form: str, rows_at_once: int) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place, "set")
        folder.mkdir()
        (folder / "here.png").write_bytes(IMAGES[0])
        Path(place, "secret.png").write_bytes(IMAGES[1])
        of_kind = {
            "bytes": {"bytes": IMAGES[2], "path": "a.png"}, "path": {"bytes": None, "path": "here.png"},
            "lost": {"bytes": None, "path": "no.png"}, "outside": {"bytes": None, "path": "../secret.png"},
            "null": None, "empty": {"bytes": b"", "path": None},
        }  # fmt: skip
        dtype = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        raw = pa.array([captions for _, captions in rows], pa.list_(pa.binary()))
        is_there, starts, data = raw.values.buffers()
        cells = pa.StringArray.from_buffers(len(raw.values), starts, data, is_there)
        buffers = raw.buffers()[:2]
        captions = pa.ListArray.from_buffers(pa.list_(pa.string()), len(raw), buffers, children=[cells])
        table = pa.table(
            {"image": pa.array([of_kind[kind] for kind, _ in rows], dtype), "captions": captions}
        )
        if form == "arrow":
            with (
                pa.OSFile(str(folder / "a.arrow"), "wb") as file,
                pa.ipc.new_stream(file, table.schema) as out,
            ):
                out.write_table(table, max_chunksize=rows_at_once)
        else:
            pq.write_table(
                table,
                folder / "a.parquet",
                row_group_size=rows_at_once,
                compression=form,
                use_dictionary=False,
            )
        source = _source(folder, list_captions="each")
        found, (counted,) = _read(source, Path(place))
        expected = _expected(rows)
        assert counted.num_rows == found.height == expected.pop("kept", 0)
        assert dict(counted.dropped) == expected
        images = [
            IMAGES[2] if kind == "bytes" else IMAGES[0]
            for kind, captions in rows
            if kind in ("bytes", "path")
            for caption in captions or [None]
            if b"\xff" not in (caption or b"")
        ]
        assert _bytes(source, found, Path(place, "out")) == images


def _image_folder(folder: Path) -> None:
    for split, rows in (("train", range(4)), ("validation", range(4, 6))):
        (folder / split / "cats").mkdir(parents=True)
        for row in rows:
            (folder / split / "cats" / f"{row}#.png").write_bytes(IMAGES[row])
    lines = [{"file_name": f"cats/{row}#.png", "caption": CAPTIONS[row]} for row in range(4)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "train" / "metadata.jsonl").write_text(text)
    (folder / "validation" / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": f"./cats/{row}#.png", "caption": CAPTIONS[row]}) + "\n" for row in (4, 5)
        )
    )


def test_image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    _image_folder(folder)
    seen = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: rows["caption"][:] for split, rows in seen.items()} == {
        "train": CAPTIONS[:4], "validation": CAPTIONS[4:6],
    }  # fmt: skip
    rows, (found,) = _read(_source(folder, split="validation"), tmp_path)
    assert rows.rows() == [(f"validation/cats/{row}#.png", CAPTIONS[row]) for row in (4, 5)]
    assert found.source.picture_folder == str(folder)
    (folder / "validation" / "metadata.jsonl").unlink()
    table = "".join(f"./cats/{row}#.png,{CAPTIONS[row]}\n" for row in (4, 5))
    (folder / "validation" / "metadata.csv").write_text("file_name,caption\n" + table)
    assert _read(_source(folder, split="validation"), tmp_path)[0].equals(rows)
    with open(folder / "train" / "metadata.jsonl", "a") as file:
        file.write(
            '{"file_name": "cats/9.png", "caption": "没有的图片"}\n{"file_name": "cats/1#.png", "cap\n'
        )
        file.write('{"file_name": "../../secret.png", "caption": "外面的图片"}\n')
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
    run = take_in(tmp_path / "run", _source(folder))
    corpus = manifest(run, "corpus")
    assert (corpus.num_in, corpus.num_kept) == (7, 4)
    assert corpus.dropped == {"image_missing": 2, "malformed:json": 1}
    assert "  hf row 1  " in why(run, "train/cats/1#.png")[0]
    monkeypatch.chdir(folder / "train")
    assert any("  hf row 1  " in line for line in why(run, "cats/1#.png"))
    assert why(run, "train/cats/9.png")[1] == "  dropped by corpus: image_missing"


def test_image_folder_with_lists_and_other_names(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").write_bytes(IMAGES[0])
    line = json.dumps(
        {"image_file_name": "a.png", "captions": ["一", "二"], "title": "三"}, ensure_ascii=False
    )
    (folder / "metadata.jsonl").write_text(line)
    rows, _ = _read(_source(folder, list_captions="each"), tmp_path)
    assert rows.rows() == [("a.png", "一"), ("a.png", "二")]
    rows, _ = _read(_source(folder, caption_column="title", carry_columns=("title",)), tmp_path)
    assert rows.rows() == [("a.png", "三", "三")]
    with pytest.raises(
        InputError, match=r"no column 'name' \(source hf\); found image_file_name, captions, title"
    ):
        _read(_source(folder, image_column="name"), tmp_path)
    (folder / "metadata.jsonl").unlink()
    pl.DataFrame({"file_name": ["a.png", "b.png"], "text": [["一"], ["二"]]}).write_parquet(
        folder / "metadata.parquet"
    )
    rows, (found,) = _read(_source(folder, list_captions="first"), tmp_path)
    assert rows.rows() == [("a.png", "一")]
    assert found.dropped == {"image_missing": 1}
