"""Stands in for the download: the files that `data_prep.download.stage` publishes, without a network."""

import io
from collections.abc import Callable

import polars as pl
from PIL import Image

from data_prep.accounting.drop_table import drops_path, write_drops
from data_prep.download.retry import DownloadTask
from data_prep.formats.parquet import write_table
from data_prep.formats.tar import TarWriter
from data_prep.rules.copies import marks_of
from pipeline.core import store
from pipeline.core.files.images import decode_pixels
from pipeline.core.stage import Context, Outcome, Task


def publish_images(context: Context, task: Task, image_of: Callable[[str], bytes]) -> Outcome:
    """Publish one partition whose URLs all answer; `image_of` gives the bytes at a URL."""
    rows = pl.read_parquet(context.path_in("dedup", DownloadTask.from_json(task.arguments).path))
    tar_path, table_path = f"pictures/{task.name}.tar", f"pictures/{task.name}.parquet"
    images = [image_of(url) for url in rows["url"]]
    places = []
    with store.publish(context.path(tar_path)) as temporary, TarWriter(temporary) as tar:
        for key, caption, data in zip(rows["key"], rows["caption"], images, strict=True):
            places.append(tar.add(f"{key}.jpg", data))
            tar.append(f"{key}.txt", caption.encode("utf-8"))
    marks = [marks_of(decode_pixels(data)) for data in images]
    sizes = [Image.open(io.BytesIO(data)).size for data in images]
    table = rows.drop("width_px", "height_px").with_columns(
        pl.Series("width_px", [size[0] for size in sizes], dtype=pl.Int32),
        pl.Series("height_px", [size[1] for size in sizes], dtype=pl.Int32),
        pl.Series("offset_bytes", [place.offset_bytes for place in places], dtype=pl.Int64),
        pl.Series("size_bytes", [place.size_bytes for place in places], dtype=pl.Int64),
        pl.Series("image_sha256", [place.sha256 for place in places], dtype=pl.String),
        pl.Series("perceptual_hash", [item.perceptual_hash for item in marks], dtype=pl.Binary),
        pl.Series("image_signature", [item.image_signature for item in marks], dtype=pl.Binary),
    )
    write_table(table, context.path(table_path))
    write_drops(rows.head(0).with_columns(reason=pl.lit("")), context.path(drops_path(task.name)))
    outputs = {tar_path: rows.height, table_path: rows.height, drops_path(task.name): 0}
    return Outcome(outputs, rows.height, rows.height, digests={tar_path: tar.sha256})
