"""Tables of Visual Genome and COCO: captions of one image, and images of evaluation sets."""

import json
from pathlib import Path

import pytest

from data_prep.decontamination import make_guard
from data_prep.sources.table import TableSource
from pipeline.cli import main
from pipeline.core.records import InputError
from tests.helpers.sources import kept, key_of, manifest, take_in, why


def _regions(path: Path) -> None:
    rows = [
        (1, "vg/1.jpg", "一只猫在桌子上面"), (2, "vg/2.jpg", "蓝色的天空"), (1, "vg/1.jpg", "桌子是棕色的"),
        (1, "vg/1.jpg", "一只猫在桌子上面"), (3, "vg/3.jpg", "一个人"), (1, "vg/1.jpg", "猫" * 60),
        (None, "x", "无"),
    ]  # fmt: skip
    lines = [{"image_id": i, "url": f"http://a.cn/{u}", "caption": c} for i, u, c in rows]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + "{broken\n")


def test_region_captions_are_joined_exempt_from_length_and_guarded(tmp_path: Path) -> None:
    path, table = tmp_path / "vg.jsonl", tmp_path / "image_data.json"
    _regions(path)
    table.write_text(
        json.dumps(
            [
                {"image_id": 1, "coco_id": None, "flickr_id": 777, "width": 3},
                {"image_id": 2, "coco_id": 391895, "flickr_id": None},
                {"image_id": 3, "coco_id": None, "flickr_id": 391895},
            ]
        )
    )
    ids, guard = tmp_path / "coco-cn_test.txt", tmp_path / "guard.parquet"
    ids.write_text("COCO_val2014_000000391895\n")
    assert main(["guard", str(ids), "--family", "coco", "--out", str(guard)]) == 0
    source = TableSource(path=str(path), name="vg", kind="visual_genome", image_table=str(table))
    run = take_in(tmp_path / "run", source, guards=(str(guard),))
    found = manifest(run, "corpus")
    assert (found.num_in, found.num_kept) == (8, 2)
    assert found.dropped == {
        "guarded_id": 1, "image_id_missing": 1, "joined_with_image": 3, "malformed:json": 1,
    }  # fmt: skip
    assert kept(run)["caption"].to_list() == ["一只猫在桌子上面，桌子是棕色的，" + "猫" * 60, "一个人"]
    # Rows that never reached the table can be asked about, by key and by address.
    guarded = key_of("http://a.cn/vg/2.jpg", "蓝色的天空")
    assert why(run, guarded) == why(run, "http://a.cn/vg/2.jpg")
    assert why(run, guarded) == [f"{guarded}  vg", "  dropped by corpus: guarded_id"]
    assert why(run, "http://a.cn/x")[1] == "  dropped by corpus: image_id_missing"
    text = kept(run)["key"][0]
    joined = why(run, "http://a.cn/vg/1.jpg")
    assert joined[0] == "vg: 3 further captions of one image"
    assert joined[1] == f"  dropped by corpus: joined_with_image (part of the text {text})"
    assert joined[2].startswith(f"{text}  vg row 0  http://a.cn/vg/1.jpg")
    assert joined[3] == "  kept so far; the shards are not made yet"
    assert why(run, key_of("http://a.cn/vg/1.jpg", "桌子是棕色的"))[1] == joined[1]
    with pytest.raises(InputError, match="not in any caption table"):
        why(run, "http://a.cn/vg/2")
    bare = TableSource(path=str(path), name="vg", kind="visual_genome")
    with pytest.raises(InputError, match="give image_table"):
        take_in(tmp_path / "bare", bare, guards=(str(guard),))


def test_coco_pictures_are_guarded_by_the_number_in_their_name(tmp_path: Path) -> None:
    path, guard = tmp_path / "coco.csv", tmp_path / "guard.parquet"
    path.write_text(
        "url,caption\nhttp://a.cn/COCO_val2014_000000391895.jpg,一个人\nhttp://a.cn/COCO_val2014_000000000007.jpg,两个人\n"
    )
    (tmp_path / "ids.txt").write_text("COCO_val2014_000000391895#0\t一个人\n")
    make_guard(str(tmp_path / "ids.txt"), "coco", str(guard))
    run = take_in(
        tmp_path / "run", TableSource(path=str(path), name="coco", kind="coco"), guards=(str(guard),)
    )
    assert kept(run)["caption"].to_list() == ["两个人"]
    assert manifest(run, "corpus").dropped == {"guarded_id": 1}
