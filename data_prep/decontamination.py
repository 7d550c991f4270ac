"""Guards: lists that keep an evaluation set out of training, by image id and by appearance.

`cnclip guard` makes one from a set in Chinese-CLIP's layout, from a folder of images, or from a text file
of ids such as COCO-CN's `coco-cn_test.txt` and Flickr30K-CN's `ImageSets/*.txt`. A guard is a Parquet file
with columns family (`coco`, `flickr` or `own`), id, perceptual_hash (48 bytes) and image_signature (384
bytes), both null if only ids are known.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from data_prep.formats.base64_image import decode_base64_image
from data_prep.formats.parquet import write_table
from data_prep.rules.copies import Marks, marks_of
from pipeline.core import store
from pipeline.core.evaluation_sets import shard_stems
from pipeline.core.files.foreign import foreign
from pipeline.core.files.image_files import IMAGE_ENDINGS, find_images, read_image, summary
from pipeline.core.files.image_formats import LONGEST_START, begins_as_image
from pipeline.core.files.images import BadImageError, decode_upright
from pipeline.core.records import InputError
from pipeline.core.shard_format import (
    TAR,
    ByteRanges,
    read_sidecar_frame,
    sidecar_of,
)

Family = Literal["coco", "flickr", "own"]
FAMILIES: tuple[Family, ...] = ("coco", "flickr", "own")

_SCHEMA = {
    "family": pl.String, "id": pl.String, "perceptual_hash": pl.Binary, "image_signature": pl.Binary,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GuardedIds:
    """Numbers of images to exclude from training, in the two numberings that sources share."""

    coco: frozenset[int]
    flickr: frozenset[int]


def make_guard(
    evaluation_set: str, family: Family, out: str, *, say: Callable[[str], None] = lambda _: None
) -> int:
    """Write the guard of an evaluation set and return the number of its images.

    `say` gets a line on skipped files.

    `evaluation_set` is a `<name>_imgs.tsv` or the folder that holds one, a folder of shards, a folder of
    images (searched below too; ids are file names without their ending), or a `.txt` file with one id a line.

    Raises:
        InputError: if it is none of these, empty, or holds an image that does not decode.
    """
    rows = [(family, name, *(marks or (None, None))) for name, marks in _members(evaluation_set, say)]
    if not rows:
        raise InputError(f"{evaluation_set}: no images and no ids; give the evaluation set's own files")
    table = pl.DataFrame(rows, schema=_SCHEMA, orient="row").unique(maintain_order=True)
    write_table(table, out)
    return table.height


def read_guard(path: str) -> pl.DataFrame:
    """Return a guard's table.

    Raises:
        InputError: if the file is not a guard.
    """
    with foreign(path, "guard", "make it with cnclip guard"):
        store.refuse_special(path)
        table = pl.read_parquet(path)
        if "perceptual_hash" in table.columns and "image_signature" not in table.columns:
            if table["perceptual_hash"].null_count() < table.height:
                raise InputError(
                    f"{path}: has hashes but no column image_signature, without which plain images of another"
                    f" kind count as copies; make it again with cnclip guard"
                )
            table = table.with_columns(image_signature=pl.lit(None, pl.Binary))
        return table.select(pl.col(name).cast(dtype) for name, dtype in _SCHEMA.items())


def guarded_ids(paths: Sequence[str]) -> GuardedIds:
    """Return the numbers that the guards name.

    Ids count by their last run of digits (`COCO_val2014_000000391895`).
    """
    numbers: dict[str, frozenset[int]] = {family: frozenset() for family in FAMILIES}
    for path in paths:
        table = read_guard(path).with_columns(
            pl.col("id").str.extract(r"(\d+)\D*$").cast(pl.Int64, strict=False)
        )
        for family in ("coco", "flickr"):
            numbers[family] |= frozenset(table.filter(family=family)["id"].drop_nulls())
    return GuardedIds(numbers["coco"], numbers["flickr"])


def guarded_marks(path: str) -> Iterator[tuple[str, Marks]]:
    """Yield (id, hash and signature) of each image for which a guard has them."""
    table = read_guard(path).drop_nulls(["perceptual_hash", "image_signature"])
    for name, *marks in table.select("id", "perceptual_hash", "image_signature").iter_rows():
        yield name, Marks(*marks)


def tsv_marks(path: str) -> Iterator[tuple[str, Marks]]:
    """Yield (id, hash and signature) of each image of a `<name>_imgs.tsv`.

    Raises:
        InputError: if a line is malformed; it names the line.
    """
    with store.open_read(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                name, encoded = line.split(b"\t", 1)
                image = decode_upright(decode_base64_image(encoded.strip()))
            except (ValueError, BadImageError) as error:
                raise InputError(
                    f"{path}: line {number}: not an image in base64 ({error}); repair the line"
                ) from None
            yield name.decode("utf-8", "replace"), marks_of(np.asarray(image))


def set_marks(folder: str, name: str) -> Iterator[tuple[str, Marks]]:
    """Yield (id, hash and signature) of each image in an evaluation set's TSV or shards."""
    path = store.join(folder, f"{name}_imgs.tsv")
    stems = [] if store.exists(path) else shard_stems(folder)
    yield from (
        (pair for stem in stems for pair in _shard_marks(f"{stem}{TAR}")) if stems else tsv_marks(path)
    )


def _shard_marks(tar: str) -> Iterator[tuple[str, Marks]]:
    """Yield the hashes and signatures of a shard's images.

    They are computed, because a sidecar has no signatures and may be older than hashes.
    """
    table = read_sidecar_frame(sidecar_of(tar), ("key", "offset_bytes", "size_bytes"))
    with ByteRanges(tar) as images:
        for key, offset, size in table.iter_rows():
            try:
                image = decode_upright(images.read(offset, size, f"{key}.jpg"))
            except BadImageError as error:
                raise InputError(f"{tar}: {key}.jpg: {error}; build the shard again") from None
            yield key, marks_of(np.asarray(image))


def _members(path: str, say: Callable[[str], None]) -> Iterator[tuple[str, Marks | None]]:
    if path.endswith(".tsv"):
        yield from tsv_marks(path)
    elif path.endswith(".txt") and os.path.isfile(path):
        try:
            lines = store.read_text(path).removeprefix("\ufeff").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
        for line in lines:
            if line.strip():
                yield line.split("\t")[0].split("#")[0].strip(), None
    elif os.path.isdir(path):
        tables = sorted(Path(path).glob("*_imgs.tsv"))
        for table in tables:
            yield from tsv_marks(str(table))
        stems = [] if tables else shard_stems(path)
        for stem in stems:
            yield from _shard_marks(f"{stem}{TAR}")
        if not tables and not stems:
            yield from _images(path, say)
    else:
        raise InputError(
            f"{path}: not an evaluation set; give NAME_imgs.tsv, a folder with it, shards or images, or a"
            " .txt of ids"
        )


def _images(folder: str, say: Callable[[str], None]) -> Iterator[tuple[str, Marks]]:
    found = find_images(folder, IMAGE_ENDINGS)
    # An image under another name still belongs to the set.
    for path in sorted(map(Path, [*found.paths, *filter(_begins_as_image, found.others)])):
        try:
            image = decode_upright(read_image(str(path)))
        except BadImageError as error:
            raise InputError(f"{path}: {error}; repair or remove the file") from None
        yield path.stem, marks_of(np.asarray(image))
    if passed_over := sorted(found.passed_over):
        say(f"{folder}: {len(passed_over)} are not image files and are skipped: {summary(passed_over)}")


def _begins_as_image(path: str) -> bool:
    with store.open_read(path) as file:
        return begins_as_image(bytes(file.read(LONGEST_START)))
