"""Pictures as cameras and people make them, over real HTTP: turned, 16-bit, long, Chinese names, broken."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from tests.helpers.encoded_images import encode, four_colours, png16, sixteen_bits
from tests.helpers.own_corpus import RECIPE, cnclip, write_evaluation


def _stored(folder: Path) -> dict[str, Image.Image]:
    """Address → the image in the shards."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        names = dict(pl.read_parquet(path.with_suffix(".parquet")).select("key", "url").iter_rows())
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, ending = member.name.rpartition(".")
                file = tar.extractfile(member)
                assert file is not None
                if ending == "jpg":
                    found[names[stem]] = Image.open(io.BytesIO(file.read()))
    return found


@pytest.mark.slow
def test_photographs_keep_what_they_show(tmp_path: Path) -> None:
    folder = tmp_path / "图片"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    upright = four_colours((300, 200)).transpose(Image.Transpose.ROTATE_270)
    exif_only = encode(four_colours((300, 200)), "JPEG", quality=95, exif=exif.tobytes())
    long = four_colours((900, 240))
    files = {
        "竖拍的猫.jpg": (exif_only, upright),
        "十六位 灰度.png": (
            png16(sixteen_bits(four_colours().convert("L")), 0),
            four_colours().convert("L").convert("RGB"),
        ),
        "十六位彩色.png": (png16(sixteen_bits(four_colours()), 2), four_colours()),
        "长卷（山水）#1 100%?.jpg": (encode(long, "JPEG", quality=95), long),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "坏的.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(500))
    names = [*files, "坏的.jpg"]
    captions = [f"第{number}张窗台上的照片" for number in range(len(names))]
    pl.DataFrame({"url": names, "caption": captions}).write_csv(tmp_path / "captions.csv")
    evaluation = tmp_path / "evaluation pictures"
    evaluation.mkdir()
    for number in range(10):
        (evaluation / f"{number}.png").write_bytes(
            encode(Image.new("RGB", (40, 40), (9 * number, 9, 9)), "PNG")
        )
    write_evaluation(tmp_path / "valid", evaluation, 10)
    (tmp_path / "run.toml").write_text(RECIPE.format(root=tmp_path), encoding="utf-8")

    done = cnclip(tmp_path, "run", "--to", "shards")
    assert done.returncode == 0, done.stderr
    dropped = json.loads((tmp_path / "run" / "download" / "manifest.json").read_text())["dropped"]
    assert dropped == {"undecodable": 1}
    stored = {
        address.rsplit("/", 1)[1]: image for address, image in _stored(tmp_path / "run" / "shards").items()
    }
    assert len(stored) == len(files)
    for (name, (_, shown)), image in zip(
        sorted(files.items()), (stored[name] for name in sorted(stored)), strict=True
    ):
        assert image.getexif().get(0x0112) is None
        assert image.width / image.height == pytest.approx(shown.width / shown.height, rel=0.02), name
        gap = np.asarray(image.convert("RGB"), np.int16) - np.asarray(shown.resize(image.size), np.int16)
        assert np.abs(gap).mean() < 6, name
