"""Guards: lists that keep an evaluation set out of training, by image id and by perceptual hash.

`cnclip guard` makes one from a set in Chinese-CLIP's layout, from a folder of images, or from a text file
of ids such as COCO-CN's `coco-cn_test.txt` and Flickr30K-CN's `ImageSets/*.txt`. A guard is a Parquet file
with columns family (`coco`, `flickr` or `own`), id, perceptual_hash (48 bytes; null: only ids known).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from data_prep.formats.base64_image import decode_base64_image
from data_prep.formats.image import SIGNATURES, BadImageError, decode_upright
from data_prep.formats.parquet import write_table
from data_prep.rules import image as image_rules
from pipeline.core import store
from pipeline.core.evaluation_sets import shard_stems
from pipeline.core.records import InputError
from pipeline.core.shard_format import read_sidecar_frame

Family = Literal["coco", "flickr", "own"]
FAMILIES: tuple[Family, ...] = ("coco", "flickr", "own")
MAX_PIXELS = 100_000_000

_SCHEMA = {"family": pl.String, "id": pl.String, "perceptual_hash": pl.Binary}
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class GuardedIds:
    """Numbers of images that stay out of training, in the two numberings that sources share."""

    coco: frozenset[int]
    flickr: frozenset[int]


def make_guard(evaluation_set: str, family: Family, out: str) -> int:
    """Write the guard of an evaluation set; returns how many images it names.

    `evaluation_set` is a `<name>_imgs.tsv` or the folder that holds one, a folder of shards, a folder of
    images (searched below too; ids are file names without their ending), or a `.txt` file with one id a
    line. InputError where it is none of these, empty, or holds an image that does not decode.
    """
    rows = [(family, name, hashed) for name, hashed in _members(evaluation_set)]
    if not rows:
        raise InputError(f"{evaluation_set}: no images and no ids; give the evaluation set's own files")
    table = pl.DataFrame(rows, schema=_SCHEMA, orient="row").unique(maintain_order=True)
    write_table(table, out)
    return table.height


def read_guard(path: str) -> pl.DataFrame:
    """A guard's table; InputError where the file is none."""
    try:
        table = pl.read_parquet(path)
        return table.select(pl.col(name).cast(dtype) for name, dtype in _SCHEMA.items())
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise InputError(
            f"{path}: not a guard ({str(error).splitlines()[0]}); make it with cnclip guard"
        ) from None


def guarded_ids(paths: Sequence[str]) -> GuardedIds:
    """Numbers that the guards name; ids count by their last run of digits (`COCO_val2014_000000391895`)."""
    numbers: dict[str, frozenset[int]] = {family: frozenset() for family in FAMILIES}
    for path in paths:
        table = read_guard(path).with_columns(
            pl.col("id").str.extract(r"(\d+)\D*$").cast(pl.Int64, strict=False)
        )
        for family in ("coco", "flickr"):
            numbers[family] |= frozenset(table.filter(family=family)["id"].drop_nulls())
    return GuardedIds(numbers["coco"], numbers["flickr"])


def guarded_hashes(paths: Sequence[str]) -> list[bytes]:
    """Perceptual hashes that the guards name."""
    return [hashed for path in paths for hashed in read_guard(path)["perceptual_hash"].drop_nulls()]


def tsv_hashes(path: str) -> Iterator[tuple[str, bytes]]:
    """(id, perceptual hash) of each image of a `<name>_imgs.tsv`; InputError names a line that is none."""
    with store.open_read(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                name, encoded = line.split(b"\t", 1)
                image = decode_upright(decode_base64_image(encoded.strip()), MAX_PIXELS)
            except (ValueError, BadImageError) as error:
                raise InputError(
                    f"{path}: line {number}: no image in base64 ({error}); repair the line"
                ) from None
            yield name.decode("utf-8", "replace"), image_rules.perceptual_hash(np.asarray(image))


def set_hashes(folder: str, name: str) -> Iterator[tuple[str, bytes]]:
    """(id, perceptual hash) of each image of an evaluation set: of its TSV, or as its shards say."""
    path = store.join(folder, f"{name}_imgs.tsv")
    stems = [] if store.exists(path) else shard_stems(folder)
    yield from (
        (pair for stem in stems for pair in _sidecar_hashes(f"{stem}.parquet")) if stems else tsv_hashes(path)
    )


def _sidecar_hashes(path: str) -> Iterator[tuple[str, bytes]]:
    table = read_sidecar_frame(path, ("key", "perceptual_hash"))
    missing = table.filter(pl.col("perceptual_hash").is_null())
    if missing.height:
        raise InputError(f"{path}: {missing['key'][0]}: no perceptual hash; build the shards again")
    yield from table.iter_rows()


def _members(path: str) -> Iterator[tuple[str, bytes | None]]:
    if path.endswith(".tsv"):
        yield from tsv_hashes(path)
    elif path.endswith(".txt") and os.path.isfile(path):
        for line in store.read_text(path).splitlines():
            if line.strip():
                yield line.split("\t")[0].split("#")[0].strip(), None
    elif os.path.isdir(path):
        tables = sorted(Path(path).glob("*_imgs.tsv"))
        for table in tables:
            yield from tsv_hashes(str(table))
        stems = [] if tables else shard_stems(path)
        for stem in stems:
            yield from _sidecar_hashes(f"{stem}.parquet")
        if not tables and not stems:
            yield from _images(Path(path))
    else:
        raise InputError(
            f"{path}: no evaluation set; give NAME_imgs.tsv, a folder with it, shards or images, or a .txt"
            " of ids"
        )


def _images(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and _is_image(path):
            try:
                image = decode_upright(path.read_bytes(), MAX_PIXELS)
            except BadImageError as error:
                raise InputError(f"{path}: {error}; repair or remove the file") from None
            yield path.stem, image_rules.perceptual_hash(np.asarray(image))


def _is_image(path: Path) -> bool:
    """By its name, or by its first bytes: an image under another name is one of the set all the same."""
    if path.suffix.lower() in _IMAGE_ENDINGS:
        return True
    with open(path, "rb") as file:
        return file.read(max(map(len, SIGNATURES))).startswith(SIGNATURES)
