"""Raw releases and LMDB: each becomes Chinese-CLIP's layout, with the owners' ids, texts and pairs."""

import base64
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest

from eval.datasets.cnclip_tsv import RetrievalSet, read_evaluation
from eval.datasets.discover import find_sets, reported_splits
from eval.datasets.releases import find_releases
from pipeline.core.records import InputError
from tests.helpers.classification_files import write_cnclip
from tests.helpers.evaluation_files import png_bytes, small_evaluation


def converted(root: Path, out: Path) -> RetrievalSet:
    (release,) = find_releases(str(root))
    release.write(str(out))
    return read_evaluation(str(out), release.protocol)


def pairs(data: RetrievalSet) -> Mapping[str, list[int]]:
    return {
        text: data.image_ids[rows].tolist()
        for text, rows in zip(data.texts, data.images_of_text, strict=True)
    }


def url_safe(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


def test_muge(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    (root / "MR_valid_imgs.tsv").write_text(
        "".join(f"{40 + n}\t{url_safe(png_bytes(n))}\n" for n in range(3))
    )
    queries = [
        {"query_id": 7, "query_text": "红色连衣裙", "item_ids": [42, 40]},
        {"query_id": 9, "query_text": "帆布鞋", "item_ids": [41]},
    ]
    (root / "MR_valid_queries.jsonl").write_text("\n".join(json.dumps(item) for item in queries))
    data = converted(root, tmp_path / "out")
    assert data.name == "muge-valid"
    assert data.text_ids.tolist() == [7, 9]
    assert pairs(data) == {"红色连衣裙": [40, 42], "帆布鞋": [41]}
    assert list(data.image_bytes(range(3))) == [png_bytes(n) for n in range(3)]
    found = find_sets(str(tmp_path / "raw"))
    assert ([item.protocol for item in found.releases], found.retrieval) == (["muge-valid"], ())


def test_muge_with_other_columns_lists_them(tmp_path: Path) -> None:
    (tmp_path / "MR_valid_imgs.tsv").write_text(f"1\t{url_safe(png_bytes(1))}\n")
    (tmp_path / "MR_valid_queries.jsonl").write_text('{"query_id": 1, "words": "x"}')
    (release,) = find_releases(str(tmp_path))
    with pytest.raises(InputError, match=r"queries.jsonl:1: has none of query_text, .*; found query_id"):
        release.write(str(tmp_path / "out"))


@pytest.mark.parametrize(
    "changed", [{"query_id": "7"}, {"query_id": 7.0}, {"item_ids": ["40"]}, {"item_ids": 40}]
)
def test_muge_ids_are_integers(tmp_path: Path, changed: dict[str, object]) -> None:
    (tmp_path / "MR_valid_imgs.tsv").write_text(f"40\t{url_safe(png_bytes(1))}\n")
    query = {"query_id": 7, "query_text": "红裙", "item_ids": [40]} | changed
    (tmp_path / "MR_valid_queries.jsonl").write_text(json.dumps(query))
    (release,) = find_releases(str(tmp_path))
    with pytest.raises(InputError, match=r"queries.jsonl:1: ids must be integers"):
        release.write(str(tmp_path / "out"))


def test_of_a_release_the_split_that_the_paper_reports_is_measured(tmp_path: Path) -> None:
    for split in ("test", "train", "valid"):
        (tmp_path / f"MR_{split}_imgs.tsv").write_text(f"1\t{url_safe(png_bytes(1))}\n")
        (tmp_path / f"MR_{split}_queries.jsonl").write_text('{"query_id": 1, "query_text": "裙"}')
    sources, notes = reported_splits(find_sets(str(tmp_path)))
    assert [item.protocol for item in sources.releases] == ["muge-valid"]
    assert [note.split(":")[0] for note in notes] == ["muge-test", "muge-train"]
    for path in tmp_path.glob("MR_valid_*"):
        path.unlink()
    sources, notes = reported_splits(find_sets(str(tmp_path)))
    assert ([item.protocol for item in sources.releases], notes) == (["muge-test", "muge-train"], [])


def test_images_of_a_release_are_no_classes(tmp_path: Path) -> None:
    root = tmp_path / "sets" / "icr"
    (root / "images").mkdir(parents=True)
    (root / "images" / "a.jpg").write_bytes(png_bytes(1))
    (root / "icr_test.jsonl").write_text('{"text": "猫", "image_path": "images/a.jpg"}')
    write_cnclip(root / "colours")
    for folder, classes in ((root, ["colours"]), (root.parent, [])):
        found = find_sets(str(folder))
        assert [item.protocol for item in found.releases] == ["icr-test"]
        assert [Path(path).name for path in found.classification] == classes


def test_flickr30k_cn(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    for folder in ("ImageSets", "TextData", "images/deep"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets" / "flickr30k-cn-test.txt").write_text("100\n200\n")
    for image_id in (100, 200, 300):
        (root / "images" / "deep" / f"{image_id}.jpg").write_bytes(png_bytes(image_id))
    (root / "TextData" / "seg.flickr30k-cn-test.caption.txt").write_text(
        "100#zhb#0 一个:m 穿着:v T shirt:n 的:u 男人:n\n"
        "200#zhb#0 两:m 只:q 狗:n\n"
        "100#zhb#1 男人:n 在:p 跑:v\n",
        encoding="utf-8",
    )
    data = converted(root, tmp_path / "out")
    assert data.name == "flickr30k-cn-test"
    assert data.image_ids.tolist() == [100, 200]
    assert pairs(data) == {"一个穿着T shirt的男人": [100], "两只狗": [200], "男人在跑": [100]}
    (root / "ImageSets" / "flickr30k-cn-test.txt").write_text("100.jpg\n")
    with pytest.raises(InputError, match=r"test.txt:1: expected an image's number, found '100.jpg'"):
        converted(root, tmp_path / "out")
    (root / "ImageSets" / "flickr30k-cn-test.txt").write_text("100\n200\n")
    (root / "images" / "deep" / "200.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images are not below it, first 200.jpg"):
        converted(root, tmp_path / "out")


def test_coco_cn(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    (root / "val2014").mkdir(parents=True)
    names = ["COCO_val2014_000000000042", "COCO_val2014_000000000007"]
    for name in names:
        (root / "val2014" / f"{name}.jpg").write_bytes(png_bytes(len(name)))
    (root / "coco-cn_test.txt").write_text("\n".join(names))
    (root / "imageid.human-written-caption.txt").write_text(
        f"{names[0]}#0\t一只猫\nCOCO_val2014_000000000099#0\t训练集的\n{names[1]}#0\t一辆车\n{names[0]}#1\t猫在睡觉\n",
        encoding="utf-8",
    )
    data = converted(root, tmp_path / "out")
    assert data.name == "coco-cn-test"
    assert pairs(data) == {"一只猫": [42], "一辆车": [7], "猫在睡觉": [42]}


@pytest.mark.parametrize("as_list", [True, False])
def test_icr(tmp_path: Path, as_list: bool) -> None:
    root = tmp_path / "raw"
    (root / "images").mkdir(parents=True)
    for name in ("a", "b"):
        (root / "images" / f"{name}.jpg").write_bytes(png_bytes(ord(name)))
    records = [{"text": f"第{n}句", "image_path": f"images/{name}.jpg"} for n, name in enumerate("baa")]
    text = json.dumps(records) if as_list else "\n".join(json.dumps(record) for record in records)
    (root / "icr_test.json").write_text(text)
    data = converted(root, tmp_path / "out")
    assert data.name == "icr-test"
    assert pairs(data) == {"第0句": [0], "第1句": [1], "第2句": [1]}
    (root / "icr_test.json").write_text(json.dumps({"text": "x", "image_path": "../../etc/passwd"}))
    with pytest.raises(InputError, match="is outside"):
        converted(root, tmp_path / "out")
    (root / "icr_test.json").write_text(json.dumps({"text": 7, "image_path": "images/a.jpg"}))
    with pytest.raises(InputError, match=r"text and image_path must be strings, found .*7"):
        converted(root, tmp_path / "out")


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("run",))


def write_lmdb(root: Path, pair: object) -> None:
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
    for name, entries in (
        ("pairs", {b"0": pickle.dumps(pair), b"1": pickle.dumps((41, 7, "红")), b"num_samples": b"2"}),
        (
            "imgs",
            {str(40 + n).encode(): url_safe(png_bytes(n)).encode() for n in range(2)} | {b"num_images": b"2"},
        ),
    ):
        folder = root / "lmdb" / "valid" / name
        folder.mkdir(parents=True)
        with (
            lmdb.open(str(folder), map_size=1 << 22) as environment,
            environment.begin(write=True) as transaction,
        ):
            for key, value in entries.items():
                transaction.put(key, value)


def test_lmdb(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "MUGE", (40, 7, "红"))
    data = converted(tmp_path / "MUGE", tmp_path / "out")
    assert data.name == "muge-valid"
    assert pairs(data) == {"红": [40, 41]}
    assert list(data.image_bytes([1])) == [png_bytes(1)]
    for name in ("imgs.tsv", "texts.jsonl"):
        (tmp_path / "out" / f"muge-valid_{name}").rename(tmp_path / "MUGE" / f"valid_{name}")
    sources, notes = reported_splits(find_sets(str(tmp_path)))
    assert ([item.name for item in sources.retrieval], sources.releases) == (["valid"], ())
    assert notes == ["muge-valid: read from its files, not from the LMDB next to them"]


def test_lmdb_with_two_texts_of_one_id(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "MUGE", (40, 7, "绿"))
    with pytest.raises(InputError, match=r"entry 1: text_id 7 has two texts, '绿' and '红'"):
        converted(tmp_path / "MUGE", tmp_path / "out")


def test_two_sets_of_one_name(tmp_path: Path) -> None:
    for folder in ("sets/a", "sets/b"):
        small_evaluation(tmp_path / folder, "coco-cn-test", count=12)
    with pytest.raises(InputError, match=r"b: coco-cn-test lies in .*a too"):
        reported_splits(find_sets(str(tmp_path / "sets")))


def test_a_pickle_that_names_a_function_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lmdb(tmp_path / "MUGE", Trap())
    with pytest.raises(InputError, match=r"pairs: entry 0: expected .*names builtins.print"):
        converted(tmp_path / "MUGE", tmp_path / "out")
    assert capsys.readouterr().out == ""
