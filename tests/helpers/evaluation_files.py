"""Small evaluation sets on disk, for the tests of this folder."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from data_prep.formats.tar import TarWriter
from pipeline.core.arrays import Float32Array


@dataclass(frozen=True)
class ArrayEncoder:
    """Features of a set that a test made itself."""

    image_ND: Float32Array
    text_ND: Float32Array

    def encode(self, evaluation: object) -> tuple[Float32Array, Float32Array]:
        return self.image_ND, self.text_ND


def png_bytes(seed: int, size_px: int = 20) -> bytes:
    """Return an image of random blocks, different for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((size_px, size_px), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def write_evaluation(
    folder: Path, name: str, images: Mapping[int, bytes], texts: Sequence[tuple[int, str, Sequence[int]]]
) -> str:
    """Write CN-CLIP's two files, rows in the order given; returns the folder as a string."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}_imgs.tsv", "w", encoding="ascii") as file:
        for image_id, data in images.items():
            file.write(f"{image_id}\t{base64.b64encode(data).decode()}\n")
    with open(folder / f"{name}_texts.jsonl", "w", encoding="utf-8") as file:
        for text_id, text, image_ids in texts:
            record = {"text_id": text_id, "text": text, "image_ids": list(image_ids)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return str(folder)


def small_evaluation(folder: Path, name: str = "small", count: int = 12) -> str:
    """Write `count` images with ids 100, 101, … and one text each; text 0 also names the last image."""
    images = {100 + row: png_bytes(row) for row in range(count)}
    texts = [(row, f"第{row}张图片", [100 + row]) for row in range(count)]
    texts[0] = (0, "第零张图片", [100, 100 + count - 1])
    return write_evaluation(folder, name, images, texts)


def shard_key(sample: int) -> str:
    return f"{sample * 7919 % 104729:032x}"


def write_shards(folder: Path, samples: Sequence[tuple[bytes, str]], per_shard: int) -> str:
    """Write shards of (image, caption) as the stage does, with the sidecar columns that are read here."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(samples), per_shard)):
        part = samples[start : start + per_shard]
        keys = [shard_key(start + row) for row in range(len(part))]
        with TarWriter(str(folder / f"{number:05d}.tar")) as tar:
            places = []
            for key, (data, caption) in zip(keys, part, strict=True):
                places.append(tar.add(f"{key}.jpg", data))
                tar.add(f"{key}.txt", caption.encode())
        pl.DataFrame(
            {
                "key": keys,
                "offset_bytes": [place.offset_bytes for place in places],
                "size_bytes": [place.size_bytes for place in places],
                "caption": [caption for _, caption in part],
                "source": ["mine"] * len(part),
                "url": [f"https://pictures.example/{key}" for key in keys],
                "image_sha256": [place.sha256 for place in places],
                "perceptual_hash": [hashlib.sha384(data).digest() for data, _ in part],
            }
        ).write_parquet(folder / f"{number:05d}.parquet")
    return str(folder)
