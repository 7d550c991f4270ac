"""Text tables and region tables become Parquet in the run's folder, with every row accounted for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.drop_table import write_table
from data_prep.guard import GuardedIds
from data_prep.sources import text_file
from data_prep.sources.table import (
    TableSource,
    find_column,
    naming_damage,
    needed_columns,
    open_parquet,
    resolve,
)
from pipeline import store
from pipeline.records import DropReason, InputError

JOINED = DropReason("joined_with_image")  # a caption that became part of its picture's one text
GUARDED_ID = DropReason("guarded_id")  # a picture of an evaluation set, by its COCO or Flickr number
IMAGE_ID_MISSING = DropReason("image_id_missing")

JOINT = "，"  # between the captions of one picture
_MALFORMED_SCHEMA = {"reason": pl.String, "text": pl.String}


@dataclass(frozen=True, slots=True)
class Converted:
    """A table in the run's folder: rows in it, and rows set aside by reason."""

    source: TableSource  # how to read it
    num_rows: int
    dropped: Mapping[str, int]


def convert_text(path: str, source: TableSource, table_path: str, malformed_path: str) -> Converted:
    """Write a CSV, TSV or JSON-lines table as Parquet, columns as strings; memory is that of a block.

    InputError where a column is missing, or no row is well formed.
    """
    columns = needed_columns(path, source, text_file.column_names(path))
    schema = pa.schema([(name, pa.large_string()) for name in columns])
    malformed: list[text_file.Malformed] = []
    num_rows = 0
    with (
        store.publish(table_path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as out,
    ):
        for batch in text_file.read_batches(path, columns):
            malformed += batch.malformed
            num_rows += batch.rows.height
            if batch.rows.height:
                out.write_table(batch.rows.to_arrow().cast(schema))
    if num_rows == 0 and malformed:
        raise InputError(
            f"{path}: none of its {len(malformed)} rows is well formed, the first is"
            f" {malformed[0].reason}: {malformed[0].text[:60]!r}; write it as UTF-8 with its header"
        )
    return Converted(source, num_rows, write_malformed(malformed, malformed_path))


def write_malformed(malformed: Sequence[text_file.Malformed], path: str) -> dict[str, int]:
    """Publish the rows set aside, with the beginning of each; returns rows by reason."""
    rows = [(str(item.reason), item.text) for item in malformed]
    table = pl.DataFrame(rows, schema=_MALFORMED_SCHEMA, orient="row")
    write_table(table, path)
    return dict(table.group_by("reason").len().sort("reason").iter_rows())


def join_regions(
    paths: Sequence[str], source: TableSource, guarded: GuardedIds, table_path: str, malformed_path: str
) -> Converted:
    """Join the captions of each picture into one text, in the order of the tables (paper, section 2.2).

    A caption that repeats another of its picture is not repeated. Pictures of evaluation sets go, by their
    COCO number, or for Visual Genome by the COCO and Flickr numbers of its own `image_data.json`.
    """
    malformed: list[text_file.Malformed] = []
    frames = [_regions(path, source, malformed) for path in paths]
    rows = pl.concat(frames)
    dropped: dict[str, int] = {}
    missing = pl.col("image").is_null() | pl.col("caption").is_null()
    if count := rows.filter(missing).height:
        dropped[IMAGE_ID_MISSING] = count
        rows = rows.filter(~missing)
    removed = rows.filter(_is_guarded(source, guarded, rows))
    if removed.height:
        dropped[GUARDED_ID] = removed.height
        rows = rows.join(removed.select("image").unique(), on="image", how="anti", maintain_order="left")
    joined = rows.group_by("image", maintain_order=True).agg(
        pl.col("url").drop_nulls().first(),
        pl.col("caption").str.strip_chars().unique(maintain_order=True).str.join(JOINT),
        *(pl.col(name).first() for name in source.carry_columns),
    )
    if rows.height > joined.height:
        dropped[JOINED] = rows.height - joined.height
    write_table(joined, table_path)
    dropped |= write_malformed(malformed, malformed_path)
    read_as = replace(source, url_column="url", caption_column="caption", image_id_column="image")
    return Converted(read_as, joined.height, dropped)


def _regions(path: str, source: TableSource, malformed: list[text_file.Malformed]) -> pl.DataFrame:
    """image (as text), url, caption and the carried columns of one file."""
    if text_file.is_text(path):
        found = text_file.column_names(path)
        image = find_column(path, source, "image_id_column", ("image_id", "imageid", "id"), found)
        columns = [*dict.fromkeys((*needed_columns(path, source, found), *([image] if image else [])))]
        batches = []
        for batch in text_file.read_batches(path, columns):
            malformed += batch.malformed
            batches.append(batch.rows)
        frame = pl.concat(batches)
    else:
        with naming_damage(path):
            lazy = open_parquet(path)
            found = lazy.collect_schema().names()
            image = find_column(path, source, "image_id_column", ("image_id", "imageid", "id"), found)
            columns = [*dict.fromkeys((*needed_columns(path, source, found), *([image] if image else [])))]
            frame = lazy.select(columns).collect()
    roles = resolve(path, source, found)
    return frame.select(
        image=pl.col(image or str(roles["url_column"])).cast(pl.String),
        url=pl.col(str(roles["url_column"])).cast(pl.String),
        caption=pl.col(str(roles["caption_column"])).cast(pl.String),
        **{name: pl.col(name) for name in source.carry_columns},
    )


def _is_guarded(source: TableSource, guarded: GuardedIds, rows: pl.DataFrame) -> pl.Series:
    """Whether each row's picture is of an evaluation set, bool [rows]."""
    # COCO_val2014_000000391895.jpg and 391895 are one picture: the last run of digits counts.
    number = rows["image"].str.extract(r"(\d+)\D*$").cast(pl.Int64, strict=False)
    if source.kind == "coco":
        return number.is_in(list(guarded.coco))
    if not guarded.coco and not guarded.flickr:
        return pl.repeat(False, rows.height, dtype=pl.Boolean, eager=True)
    if source.image_table is None:
        raise InputError(
            f"source {source.name}: guards name COCO or Flickr pictures by numbers that are not its own;"
            f" give image_table, its image_data.json"
        )
    own = _evaluation_images(source.image_table, guarded)
    return number.is_in(own)


def _evaluation_images(path: str, guarded: GuardedIds) -> list[int]:
    """Visual Genome's own numbers of the pictures that are guarded under a COCO or Flickr number."""
    try:
        table = pl.read_json(store.read_bytes(path), infer_schema_length=None)
        table = table.select(pl.col("image_id", "coco_id", "flickr_id").cast(pl.Int64, strict=False))
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: no table of Visual Genome's pictures ({str(error).splitlines()[0]}); give"
            f" image_data.json with image_id, coco_id and flickr_id"
        ) from None
    hit = pl.col("coco_id").is_in(list(guarded.coco)) | pl.col("flickr_id").is_in(list(guarded.flickr))
    return table.filter(hit)["image_id"].to_list()
