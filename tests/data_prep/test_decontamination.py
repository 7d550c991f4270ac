"""Guards: the images that stay out of training."""

import base64
from pathlib import Path

import polars as pl
import pytest

from data_prep.decontamination import guarded_ids, guarded_marks
from pipeline.cli import main
from pipeline.core.records import InputError
from tests.helpers.sources import cn_clip_set, picture


def test_guard_of_pictures_gives_ids_and_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cn_clip_set(tmp_path / "set")
    (tmp_path / "set" / "train_imgs.tsv").write_text(f"5\t{base64.b64encode(picture()).decode()}\n")
    pictures = tmp_path / "pictures" / "中文"
    pictures.mkdir(parents=True)
    (pictures / "1000.jfif").write_bytes(picture(side=40))  # the ending is not what makes an image
    (pictures / "labels.txt").write_text("1000 猫")
    guards = []
    for name, family in (("set", "own"), ("pictures", "flickr")):
        guards.append(str(tmp_path / f"{name}.parquet"))
        assert main(["guard", str(tmp_path / name), "--family", family, "--out", guards[-1]]) == 0
    assert "1 images" in capsys.readouterr().out
    assert guarded_ids(guards).flickr == {1000}
    assert guarded_ids(guards).coco == frozenset()
    (_, first), (_, second) = (next(guarded_marks(path)) for path in guards)
    assert first.perceptual_hash == second.perceptual_hash  # the same image at another size
    pl.read_parquet(guards[0]).drop("image_signature").write_parquet(tmp_path / "old.parquet")
    with pytest.raises(InputError, match=r"old.parquet: has hashes but no column image_signature"):
        guarded_ids([str(tmp_path / "old.parquet")])
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert main(["guard", str(tmp_path / "pictures"), "--out", str(tmp_path / "x.parquet")]) == 1
    assert main(["guard", str(tmp_path / "none"), "--out", str(tmp_path / "x.parquet")]) == 1
    assert not (tmp_path / "x.parquet").exists()
    with pytest.raises(InputError, match="make it with cnclip guard"):
        guarded_ids([str(tmp_path / "set" / "train_imgs.tsv")])
