"""Reads shards (`data_prep.shards.stage`) as an evaluation set, and their images by offset in the tar.

Images with the same bytes are one image, and equal captions are one text, whose correct images are all those
that carry it. A sample that keeps several captions gives a text for each. The id of an image is the position
of its first sample among all samples; that of a text is its first position among all captions. Memory holds
the captions and 24 bytes an image; images stay in the tars.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from eval.datasets.cnclip_tsv import RetrievalSet
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.evaluation_sets import shard_stems
from pipeline.core.records import InputError
from pipeline.core.shard_format import (
    SIDECAR,
    TAR,
    ByteRanges,
    all_captions,
    num_rows,
    read_sidecar_frame,
    sidecar_of,
    tar_of,
    with_each_caption,
)


@dataclass(frozen=True, slots=True)
class TarImages:
    """Images of several tars by offset."""

    stems: tuple[str, ...]  # paths of the shards without their ending
    shards: Int64Array  # [num_images], index into `stems`
    offsets_bytes: Int64Array  # [num_images]
    sizes_bytes: Int64Array  # [num_images]

    def read(self, rows: Sequence[int] | Int64Array) -> Iterator[bytes]:
        """Yield encoded images in the order of `rows`.

        Raises:
            InputError: if a tar ends before its image.
        """
        rows = np.asarray(rows, dtype=np.int64)
        starts = np.flatnonzero(np.diff(self.shards[rows], prepend=-1))  # of runs in one tar
        for run in np.split(rows, starts[1:]):
            if len(run):
                with ByteRanges(self.stems[self.shards[run[0]]] + TAR) as images:
                    pairs = zip(self.offsets_bytes[run].tolist(), self.sizes_bytes[run].tolist(), strict=True)
                    for offset, size in pairs:
                        yield images.read(offset, size, f"the image at {offset}")


def whole_shards(folder: str) -> list[str]:
    """Return `shard_stems` after checking that each has both files.

    Raises:
        InputError: if the folder has no shards, or a tar or a sidecar lacks the other.
    """
    stems = shard_stems(folder)
    if not stems:
        raise InputError(f"{folder}: holds no shards (<name>.tar with <name>.parquet)")
    names = set(store.list_files(folder))
    for name in sorted(names):
        other = sidecar_of(name) if name.endswith(TAR) else tar_of(name) if name.endswith(SIDECAR) else name
        if other not in names:
            raise InputError(f"{folder}: has {name}, but no {other}; the shards are incomplete")
    return stems


def read_shards(folder: str, name: str) -> RetrievalSet:
    """Read the shards of a folder as one evaluation set.

    Raises:
        InputError: for a folder without shards, a sidecar that is damaged or lacks a column, and a sample
            without a caption.
    """
    stems = whole_shards(folder)
    columns = ("key", "caption", "image_sha256", "offset_bytes", "size_bytes")
    tables, num_samples = [], 0
    for number, stem in enumerate(stems):
        table = read_sidecar_frame(stem + SIDECAR, columns, (all_captions("caption"),))
        table = with_each_caption(table.with_row_index("place")).with_columns(
            pl.col("place").cast(pl.Int64) + num_samples, shard=pl.lit(number, pl.Int64)
        )
        num_samples = num_rows(stem + SIDECAR) + num_samples
        blank = table.filter(pl.col("caption").str.strip_chars().fill_null("") == "")
        if blank.height:
            raise InputError(
                f"{stem}{SIDECAR}: {blank['key'][0]}: an empty caption ({blank.height} such samples);"
                " leave them out of the evaluation"
            )
        tables.append(table)
    samples = pl.concat(tables).with_row_index("text").with_columns(pl.col("text").cast(pl.Int64))
    if not samples.height:
        raise InputError(f"{folder}: its shards hold no samples")
    samples = samples.with_columns(
        image_id=pl.col("place").min().over("image_sha256"), text_id=pl.col("text").min().over("caption")
    )
    images = samples.filter(pl.col("place") == pl.col("image_id")).unique("place", maintain_order=True)
    texts = samples.filter(pl.col("text") == pl.col("text_id"))
    image_ids, text_ids = images["image_id"].to_numpy(), texts["text_id"].to_numpy()
    pairs = samples.select("text_id", "image_id").unique().sort("text_id", "image_id")
    image_rows = np.searchsorted(image_ids, pairs["image_id"].to_numpy())
    bounds = np.searchsorted(pairs["text_id"].to_numpy(), text_ids[1:])
    return RetrievalSet(
        name=name,
        images_path=folder,
        texts_path=folder,
        image_ids=image_ids,
        text_ids=text_ids,
        texts=tuple(texts["caption"].to_list()),
        images_of_text=tuple(np.split(image_rows, bounds)),
        images=TarImages(
            tuple(stems),
            images["shard"].to_numpy(),
            images["offset_bytes"].to_numpy(),
            images["size_bytes"].to_numpy(),
        ),
    )
