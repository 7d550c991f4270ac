"""The pixel baseline on corpora where its answer is known, and chance on cases without simulation."""

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.datasets.cnclip_tsv import RetrievalSet, read_evaluation
from eval.retrieval.baseline import PixelBaseline, chance, thumbnail
from pipeline.core.records import InputError
from tests.helpers.evaluation_files import png_bytes, write_evaluation


def write_shard(folder: Path, name: str, samples: list[tuple[str, bytes]]) -> str:
    """A tar with its sidecar, as training reads them."""
    tar_path = folder / f"{name}.tar"
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, (_, data) in enumerate(samples):
            info = tarfile.TarInfo(f"{row:032x}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(tar_path) as tar:
        offsets = [member.offset_data for member in tar.getmembers()]
    table = {
        "key": [f"{row:032x}" for row in range(len(samples))],
        "offset_bytes": offsets,
        "size_bytes": [len(data) for _, data in samples],
        "caption": [caption for caption, _ in samples],
        "caption_en": [None if row == 0 else f"thing {row}" for row in range(len(samples))],
    }
    pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return str(tar_path)


def evaluation_of(folder: Path, texts: list[str]) -> RetrievalSet:
    images = {row: png_bytes(row) for row in range(len(texts))}
    write_evaluation(folder, "e", images, [(row, text, [row]) for row, text in enumerate(texts)])
    return read_evaluation(str(folder), "e")


def test_solves_a_memorised_corpus_both_ways(tmp_path: Path) -> None:
    texts = [f"编号{chr(0x4E00 + 7 * row)}的{chr(0x5000 + 11 * row)}图" for row in range(14)]
    samples = [(text, png_bytes(row)) for row, text in enumerate(texts)]
    shards = [write_shard(tmp_path, "00000", samples[:8]), write_shard(tmp_path, "00001", samples[8:])]
    scores = PixelBaseline.from_shards(shards).evaluate(evaluation_of(tmp_path, texts)).scores
    assert scores["t2i"]["r1"] == 100.0
    assert scores["i2t"] is not None
    assert scores["i2t"]["r1"] == 100.0
    assert scores["mean_recall"] == 100.0


def test_text_to_image_only_leaves_the_other_direction_out(tmp_path: Path) -> None:
    texts = [f"编号{chr(0x4E00 + 7 * row)}的图" for row in range(14)]
    evaluation = dataclasses.replace(evaluation_of(tmp_path, texts), image_to_text=False)
    shard = write_shard(tmp_path, "00000", [(text, png_bytes(row)) for row, text in enumerate(texts)])
    for scores in (PixelBaseline.from_shards([shard]).evaluate(evaluation).scores, chance(evaluation)):
        assert scores["i2t"] is None
        assert scores["mean_recall"] == pytest.approx(sum(scores["t2i"].values()) / 3)


def test_equal_images_are_ordered_by_id(tmp_path: Path) -> None:
    write_evaluation(
        tmp_path,
        "e",
        {row: png_bytes(1) for row in range(12)},
        [(row, "同一张图", [row]) for row in range(12)],
    )
    baseline = PixelBaseline.from_shards([write_shard(tmp_path, "00000", [("同一张图", png_bytes(2))])])
    scores = baseline.evaluate(read_evaluation(str(tmp_path), "e")).scores
    assert scores["t2i"] == pytest.approx({"r1": 100 / 12, "r5": 500 / 12, "r10": 1000 / 12})
    assert scores["t2i"] == scores["i2t"]


def test_answers_with_the_mean_of_the_captions_images(tmp_path: Path) -> None:
    def plain(level: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (20, 20), (level, level, level)).save(file, "PNG")
        return file.getvalue()

    levels = [0, 25, 50, 75, 100, 125, 150, 175, 200, 225]
    write_evaluation(
        tmp_path, "e", {row: plain(level) for row, level in enumerate(levels)}, [(0, "灰色方块", [4])]
    )
    shard = write_shard(
        tmp_path, "0", [("灰色方块", plain(0)), ("灰色方块", plain(200)), ("其他", plain(50))]
    )
    scores = PixelBaseline.from_shards([shard]).evaluate(read_evaluation(str(tmp_path), "e")).scores
    assert scores["t2i"]["r1"] == 100.0  # the mean of 0 and 200 is row 4's 100


def test_carried_captions_may_have_gaps(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, "0", [("一", png_bytes(0)), ("二", png_bytes(1))])
    assert PixelBaseline.from_shards([shard], caption_column="caption_en").captions == ("thing 1",)


def test_bad_shards_are_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, "0", [("一", png_bytes(0)), ("二", png_bytes(1))])
    with pytest.raises(InputError, match=r"0\.parquet: has no column title"):
        PixelBaseline.from_shards([shard], caption_column="title")
    Path(shard).write_bytes(b"\0" * 3000)
    with pytest.raises(InputError, match=r"0\.tar: 0+\.jpg: cannot be decoded"):
        PixelBaseline.from_shards([shard])
    (tmp_path / "0.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(InputError, match=r"0\.parquet: not a readable sidecar"):
        PixelBaseline.from_shards([shard])
    with pytest.raises(InputError, match="no training image"):
        PixelBaseline.from_shards([])


def test_thumbnail_averages_what_it_covers() -> None:
    left_half = np.zeros((32, 32, 3), np.uint8)
    left_half[:, :16] = 200
    file = io.BytesIO()
    Image.fromarray(left_half).save(file, "PNG")
    pixels = thumbnail(file.getvalue(), "x").reshape(16, 16, 3)
    assert (pixels[:, :8] == 200).all()
    assert (pixels[:, 8:] == 0).all()


def test_chance_of_one_positive_each(tmp_path: Path) -> None:
    scores = chance(evaluation_of(tmp_path, [f"图{row}" for row in range(20)]))
    assert scores["t2i"] == pytest.approx({"r1": 5.0, "r5": 25.0, "r10": 50.0})
    assert scores["i2t"] == scores["t2i"]
