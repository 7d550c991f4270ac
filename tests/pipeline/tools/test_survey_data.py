"""`cnclip init` knows folders of Chinese-CLIP, img2dataset and finished shards by what lies in them."""

import base64
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import lmdb
import polars as pl
import pytest

from data_prep.formats.tar import TarWriter
from data_prep.sources.readers.recognise import recognise
from data_prep.sources.readers.source import PackedKind
from pipeline.core.records import InputError
from pipeline.tools.survey_data import look_at_data
from tests.helpers.sources import cn_clip_set, picture

CAPTIONS = ["左边红色的图片", "没有下载的图片", "右边白色的图片"]
ROWS = {
    "url": [f"http://a.cn/{number}.jpg" for number in range(3)],
    "caption": CAPTIONS,
    "key": ["000000000", "000000001", "000000002"],
    "status": ["success", "failed_to_download", "success"],
}


def _lmdb(folder: Path) -> None:
    for name, items in {
        "pairs": {"0": pickle.dumps((5, 1, CAPTIONS[0])), "1": pickle.dumps((6, 2, CAPTIONS[1]))}
        | {"num_samples": b"2"},
        "imgs": {"5": base64.b64encode(picture()), "num_images": b"1"},
    }.items():
        place = folder / "lmdb" / "train" / name
        place.mkdir(parents=True)
        with lmdb.open(str(place), map_size=1 << 20) as environment, environment.begin(write=True) as out:
            for key, value in items.items():
                out.put(key.encode(), value)


def _images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for key in (ROWS["key"][0], ROWS["key"][2]):
        (folder / f"{key}.jpg").write_bytes(picture())
        (folder / f"{key}.txt").write_text(CAPTIONS[0])


def _img2dataset_tars(folder: Path) -> None:
    _images(folder.parent / "unpacked")
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for path in sorted((folder.parent / "unpacked").iterdir()):
            tar.add(path, path.name)
    pl.DataFrame(ROWS).write_parquet(folder / "00000.parquet")


def _img2dataset_files(folder: Path) -> None:
    _images(folder / "00000")
    pl.DataFrame(ROWS).write_parquet(folder / "00000.parquet")


def _img2dataset_parquet(folder: Path) -> None:
    folder.mkdir()
    pl.DataFrame(ROWS | {"jpg": [picture(), None, picture()]}).write_parquet(folder / "00000.parquet")


def _shards(folder: Path) -> None:
    folder.mkdir(parents=True)
    with TarWriter(str(folder / "00000.tar")) as tar:
        places = [tar.add(f"{number}.jpg", picture()) for number in range(2)]
    rows = {name: ROWS[name][:2] for name in ("key", "url", "caption")} | {
        "offset_bytes": [place.offset_bytes for place in places],
        "size_bytes": [place.size_bytes for place in places],
        "image_sha256": [place.sha256 for place in places],
    }
    pl.DataFrame(rows).write_parquet(folder / "00000.parquet")
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("write", "kind", "num_rows", "num_usable"),
    [
        (cn_clip_set, "cn_clip_tsv", 6, 2),
        (_lmdb, "cn_clip_lmdb", 2, 1),
        (_img2dataset_tars, "img2dataset", 3, 2),
        (_img2dataset_files, "img2dataset", 3, 2),
        (_img2dataset_parquet, "img2dataset", 3, 2),
        (_shards, "shards", 2, 2),
    ],
)
def test_folders_of_other_tools_are_recognised_and_read(
    tmp_path: Path, write: Callable[[Path], None], kind: PackedKind, num_rows: int, num_usable: int
) -> None:
    folder = tmp_path / "set"
    write(folder)
    assert recognise(str(folder)) == kind
    found = look_at_data(str(folder), None)
    assert (found.kind, found.path, found.images) == (kind, str(folder), None)
    assert (found.num_rows, found.num_usable) == (num_rows, num_usable)
    assert found.shortest_side_px == 20
    assert found.settings == {}
    with pytest.raises(InputError, match=f"--images: {folder} is read with kind = '{kind}', which has its"):
        look_at_data(str(folder), str(tmp_path))


def test_what_is_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    pl.DataFrame(ROWS).write_csv(tmp_path / "tables" / "a.csv")
    assert recognise(str(tmp_path / "tables")) is None
    assert recognise(str(tmp_path / "tables" / "a.csv")) is None
    assert recognise(str(tmp_path / "none")) is None
    (tmp_path / "train_imgs.tsv").touch()  # without its texts
    assert recognise(str(tmp_path)) is None
    _shards(tmp_path / "run" / "shards")
    with pytest.raises(InputError, match=r"run: the folder of a run; give its shards: .*run/shards$"):
        recognise(str(tmp_path / "run"))
