"""Converts text tables and region tables to Parquet in the run's folder and accounts for every row.

Memory use is one block, however long a table is: malformed rows are written as they are found, and captions
to be joined are first partitioned into files by a digest of their image, each small enough for memory.
A drop table lists the rows that a source has and its table lacks, as in later stages.
"""

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl
import polars_hash as plh
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.accounting.drop_table import DETAIL, DropsAsTheyCome, drops_as_they_come
from data_prep.decontamination import GuardedIds
from data_prep.formats.keys import with_key
from data_prep.sources import text_file
from data_prep.sources.parquet_text import read_text_safely
from data_prep.sources.table import (
    TableSource,
    find_column,
    found_text,
    naming_damage,
    needed_columns,
    open_parquet,
    resolve,
    text_layout,
)
from data_prep.sources.text_rows import Malformed, TextLayout
from pipeline.core import store
from pipeline.core.files.columns import column
from pipeline.core.files.foreign import foreign
from pipeline.core.files.written import ParquetRows, check_parquet, naming, parquet_rows
from pipeline.core.records import DropReason, InputError

JOINED = DropReason("joined_with_image")  # a caption that became part of its image's one text
GUARDED_ID = DropReason("guarded_id")  # an evaluation image, recognised by its COCO or Flickr number
IMAGE_ID_MISSING = DropReason("image_id_missing")

JOINT = "，"  # between the captions of one image
_MALFORMED_SCHEMA = pa.schema([("reason", pa.large_string()), ("text", pa.large_string())])
_MALFORMED_AT_ONCE = 10_000
# Input bytes of the regions that are joined at once; the number of piles, and so the order of rows,
# depends only on the input.
PILE_BYTES = 64 << 20
_MOST_PILES = 1024  # files open at once


@dataclass(frozen=True, slots=True)
class Converted:
    """A table in the run's folder: rows in it, and rows set aside by reason."""

    source: TableSource  # how to read it
    num_rows: int
    dropped: Mapping[str, int]
    num_drops: int = 0  # rows of the drop table; 0: no drop table
    num_copies: int = 0  # files of images that were copied; 0: there is no tar of copies


@dataclass(frozen=True, slots=True)
class Places:
    """Where a converted source goes: its table, its malformed rows, its drop table, copies of its images."""

    table: str
    malformed: str
    drops: str
    copies: str = ""  # of sources whose images can't be read where they are


class MalformedRows:
    """Writes the start of each row that is set aside, as soon as it is found."""

    def __init__(self, writer: ParquetRows) -> None:
        self.counts: Counter[str] = Counter()
        self.first: Malformed | None = None
        self._writer = writer
        self._waiting: list[Malformed] = []

    def add(self, rows: Sequence[Malformed]) -> None:
        if rows and self.first is None:
            self.first = rows[0]
        self.counts.update(str(row.reason) for row in rows)
        self._waiting += rows
        if len(self._waiting) >= _MALFORMED_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        columns = [[str(row.reason) for row in self._waiting], [row.text for row in self._waiting]]
        self._writer.write_table(pa.table(columns, schema=_MALFORMED_SCHEMA))
        self._waiting = []


@contextlib.contextmanager
def malformed_rows(path: str) -> Iterator[MalformedRows]:
    """Publish a table of the rows that the `with` block adds."""
    with parquet_rows(path, _MALFORMED_SCHEMA) as writer:
        rows = MalformedRows(writer)
        yield rows
        rows.flush()


def convert_text(path: str, source: TableSource, to: Places) -> Converted:
    """Write a CSV, TSV or JSON-lines table as Parquet with string columns; memory use is one block.

    Raises:
        InputError: if a column is missing, or no row is well formed.
    """
    names, layout = text_layout(path, source)
    columns = needed_columns(path, source, names)
    schema = pa.schema([(name, pa.large_string()) for name in columns])
    num_rows = 0
    with malformed_rows(to.malformed) as malformed, parquet_rows(to.table, schema) as out:
        for batch in text_file.read_batches(path, columns, layout):
            malformed.add(batch.malformed)
            num_rows += batch.rows.height
            if batch.rows.height:
                out.write_table(batch.rows.to_arrow().cast(schema))
    if num_rows == 0 and malformed.first is not None:
        raise InputError(
            f"{path}: none of its {malformed.counts.total()} rows is well formed, the first is"
            f" {malformed.first.reason}: {malformed.first.text[:60]!r}; write it as UTF-8 with its header"
        )
    return Converted(source, num_rows, dict(sorted(malformed.counts.items())))


def convert_damaged(path: str, source: TableSource, to: Places) -> Converted:
    """Rewrite a Parquet table without the rows that hold text that is not UTF-8."""
    columns = needed_columns(path, source, open_parquet(path).collect_schema().names())
    num_rows = 0
    schema: pa.Schema | None = None
    with malformed_rows(to.malformed) as malformed, contextlib.ExitStack() as stack:
        for rows in read_text_safely(path, columns):
            if schema is None:
                schema = _schema_of(rows)
                out = stack.enter_context(parquet_rows(to.table, schema))
            batch = text_file.without_damaged(rows, found_text(rows.schema))
            malformed.add(batch.malformed)
            num_rows += batch.rows.height
            out.write_table(batch.rows.to_arrow().cast(schema))
    return Converted(source, num_rows, dict(sorted(malformed.counts.items())))


def join_regions(paths: Sequence[str], source: TableSource, guarded: GuardedIds, to: Places) -> Converted:
    """Join the captions of each image into one text, in the order of the tables (paper, section 2.2).

    A caption that repeats another of its image is not repeated. The images of evaluation sets are dropped by
    their COCO number, or for Visual Genome by the COCO and Flickr numbers in `image_data.json`.
    """
    own = _guarded_numbers(source, guarded)
    num_piles = min(_MOST_PILES, 1 + sum(store.num_bytes(path) for path in paths) // PILE_BYTES)
    num_rows = 0
    with (
        malformed_rows(to.malformed) as malformed,
        drops_as_they_come(to.drops) as drops,
        tempfile.TemporaryDirectory(dir=_folder_of(to.table)) as folder,
        contextlib.ExitStack() as stack,
    ):
        piles = [os.path.join(folder, f"{number}.parquet") for number in range(num_piles)]
        schema = _deal(paths, source, piles, own, malformed, drops)
        out = stack.enter_context(parquet_rows(to.table, schema))
        for pile in piles:
            rows = pl.read_parquet(pile)
            joined = rows.group_by("image", maintain_order=True).agg(
                pl.col("url").drop_nulls().first(),
                pl.col("caption").str.strip_chars().unique(maintain_order=True).str.join(JOINT),
                *(pl.col(name).first() for name in source.carry_columns),
            )
            _note_joined(rows, joined, drops)
            num_rows += joined.height
            out.write_table(joined.to_arrow().cast(schema))
            os.remove(pile)
    read_as = replace(source, url_column="url", caption_column="caption", image_id_column="image")
    counts = dict(sorted((drops.counts + malformed.counts).items()))
    return Converted(read_as, num_rows, counts, num_drops=drops.counts.total())


def take_captions(path: str, source: TableSource, guarded: GuardedIds, to: Places) -> Converted:
    """Write each caption of one file as a separate row, dropping images of evaluation sets by number."""
    own = _guarded_numbers(source, guarded)
    num_rows = 0
    schema: pa.Schema | None = None
    with (
        malformed_rows(to.malformed) as malformed,
        drops_as_they_come(to.drops) as drops,
        contextlib.ExitStack() as stack,
    ):
        for rows in _regions(path, source, malformed):
            if schema is None:
                schema = _schema_of(rows)
                out = stack.enter_context(parquet_rows(to.table, schema))
            stays = _outside_evaluations(rows, own, drops, pl.col("image").is_null())
            num_rows += stays.height
            out.write_table(stays.to_arrow().cast(schema))
        if schema is None:  # an empty file
            with store.publish(to.table) as temporary, naming(to.table):
                pq.write_table(_empty_schema(source).empty_table(), temporary)
                check_parquet(temporary, to.table, 0)
    read_as = replace(source, url_column="url", caption_column="caption", image_id_column="image")
    counts = dict(sorted((drops.counts + malformed.counts).items()))
    return Converted(read_as, num_rows, counts, num_drops=drops.counts.total())


def _outside_evaluations(
    rows: pl.DataFrame, own: frozenset[int], drops: DropsAsTheyCome, missing: pl.Expr
) -> pl.DataFrame:
    """Return the complete rows of unguarded images and add the others to `drops`."""
    # COCO_val2014_000000391895.jpg and 391895 are one image: the last run of digits counts.
    number = pl.col("image").str.extract(r"(\d+)\D*$").cast(pl.Int64, strict=False)
    drops.add(rows.filter(missing), IMAGE_ID_MISSING)
    whole = rows.filter(~missing)
    is_guarded = number.is_in(list(own)).fill_null(False)
    drops.add(whole.filter(is_guarded), GUARDED_ID)
    return whole.filter(~is_guarded)


def _schema_of(rows: pl.DataFrame) -> pa.Schema:
    found = rows.to_arrow().schema
    return pa.schema([(name, _plain_type(found.field(name).type)) for name in rows.columns])


def _empty_schema(source: TableSource) -> pa.Schema:
    names = ("image", "url", "caption", *source.carry_columns)
    return pa.schema([(name, pa.large_string()) for name in names])


def _note_joined(rows: pl.DataFrame, joined: pl.DataFrame, drops: DropsAsTheyCome) -> None:
    """Return every caption except its image's first, with the key of the text that it became part of."""
    texts = with_key(joined.lazy()).select("image", url_of_text="url", key_of_text="key").collect()
    further = rows.filter(~pl.col("image").is_first_distinct()).join(texts, on="image")
    further = further.with_columns(url=pl.coalesce("url", "url_of_text"))
    drops.add(further, JOINED, pl.col("key_of_text").alias(DETAIL))


def _deal(
    paths: Sequence[str],
    source: TableSource,
    piles: Sequence[str],
    own: frozenset[int],
    malformed: MalformedRows,
    drops: DropsAsTheyCome,
) -> pa.Schema:
    """Write the kept regions to their images' piles in the order of the tables, and return their schema."""
    hashed = plh.col("image").chash.sha2_256().str.slice(0, 8).str.to_integer(base=16)
    missing = pl.col("image").is_null() | pl.col("caption").is_null()
    writers: list[pq.ParquetWriter] = []
    schema: pa.Schema | None = None
    with contextlib.ExitStack() as stack:
        for path in paths:
            for rows in _regions(path, source, malformed):
                if schema is None:
                    schema = _schema_of(rows)
                    writers = [stack.enter_context(pq.ParquetWriter(pile, schema)) for pile in piles]
                stays = _outside_evaluations(rows, own, drops, missing)
                dealt = stays.with_columns(_pile=hashed % len(piles)).partition_by(
                    "_pile", as_dict=True, include_key=False
                )
                for (pile,), part in dealt.items():
                    writers[int(pile)].write_table(part.to_arrow().cast(schema))
    if schema is None:  # every table is empty
        schema = _empty_schema(source)
        for pile in piles:
            pq.write_table(schema.empty_table(), pile)
    return schema


def _plain_type(dtype: pa.DataType) -> pa.DataType:
    return pa.large_string() if pa.types.is_string_view(dtype) else dtype


def _folder_of(path: str) -> str | None:
    """Return the piles' folder: next to a local table, since its disk must have room anyway."""
    if not store.is_local(path):
        return None
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    return folder


def _regions(path: str, source: TableSource, malformed: MalformedRows) -> Iterator[pl.DataFrame]:
    """Yield image (as text), url, caption and the carried columns of one file in blocks."""
    is_text = text_file.is_text(path)
    with naming_damage(path):
        found = (
            text_file.column_names(path, source.layout)
            if is_text
            else open_parquet(path).collect_schema().names()
        )
    image = find_column(path, source, "image_id_column", ("image_id", "imageid", "id"), found)
    columns = [*dict.fromkeys((*needed_columns(path, source, found), *([image] if image else [])))]
    roles = resolve(path, source, found)
    layout = replace(source.layout, url=roles["url_column"], caption=roles["caption_column"])
    blocks = (
        _text_blocks(path, columns, layout, malformed)
        if is_text
        else _parquet_blocks(path, columns, malformed)
    )
    for block in blocks:
        yield block.select(
            image=column(image or str(roles["url_column"])).cast(pl.String),
            url=column(str(roles["url_column"])).cast(pl.String),
            caption=column(str(roles["caption_column"])).cast(pl.String),
            **{name: pl.col(name) for name in source.carry_columns},
        )


def _text_blocks(
    path: str, columns: Sequence[str], layout: TextLayout, malformed: MalformedRows
) -> Iterator[pl.DataFrame]:
    for batch in text_file.read_batches(path, columns, layout):
        malformed.add(batch.malformed)
        yield batch.rows


def _parquet_blocks(path: str, columns: Sequence[str], malformed: MalformedRows) -> Iterator[pl.DataFrame]:
    for rows in read_text_safely(path, columns):
        batch = text_file.without_damaged(rows, found_text(rows.schema))
        malformed.add(batch.malformed)
        yield batch.rows


def _guarded_numbers(source: TableSource, guarded: GuardedIds) -> frozenset[int]:
    """Return the source's numbers of images that are in evaluation sets."""
    if source.kind == "coco":
        return guarded.coco
    is_foreign = source.kind != "visual_genome" and source.image_table is None
    if is_foreign or (not guarded.coco and not guarded.flickr):
        return frozenset()
    if source.image_table is None:
        raise InputError(
            f"source {source.name}: guards name COCO or Flickr images, and this source has other numbers;"
            f" give image_table, its image_data.json"
        )
    return frozenset(_evaluation_images(source.image_table, guarded))


def _evaluation_images(path: str, guarded: GuardedIds) -> list[int]:
    """Return Visual Genome's numbers of the images that are guarded under a COCO or Flickr number."""
    remedy = "give image_data.json with image_id, coco_id and flickr_id"
    with foreign(path, "table of Visual Genome's images", remedy):
        table = pl.read_json(store.read_bytes(path), infer_schema_length=None)
        table = table.select(pl.col("image_id", "coco_id", "flickr_id").cast(pl.Int64, strict=False))
    hit = pl.col("coco_id").is_in(list(guarded.coco)) | pl.col("flickr_id").is_in(list(guarded.flickr))
    return table.filter(hit)["image_id"].to_list()
