"""Tars of images: webdataset's by themselves, img2dataset's output, and the shards of a run.

img2dataset's tables come with a tar, with a folder of files, or hold the images themselves.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

import polars as pl

from data_prep.corpus_facts import with_exemptions
from data_prep.formats.tar_images import EXTENSIONS, image_members, is_gzipped, samples_of
from data_prep.sources.json_rows import refuse_list
from data_prep.sources.readers.columns import Columns
from data_prep.sources.readers.copies import Copies
from data_prep.sources.readers.huggingface import read_rows
from data_prep.sources.readers.places import folder_of, served_path
from data_prep.sources.readers.source import (
    IMAGE_AT,
    IMAGE_MISSING,
    NOT_DOWNLOADED,
    PackedSource,
    Part,
    address,
    known_by,
)
from data_prep.sources.readers.texts import texts_of
from data_prep.sources.table import EXEMPT_COLUMN, naming_damage
from data_prep.sources.text_rows import BETWEEN, ListCaptions, Malformed
from pipeline.core.files.columns import is_pattern
from pipeline.core.records import InputError
from pipeline.core.shard_format import all_captions, with_each_caption

_FORMATS = ("jpg", "png", "webp")  # img2dataset's encode_format


def read_img2dataset(source: PackedSource, files: list[str], copies: Copies) -> Iterator[Part]:
    """Yield the rows of one of img2dataset's tables, whose images are in a tar, in files or in the table."""
    table_path = files[-1]
    with naming_damage(table_path):
        schema = pl.read_parquet_schema(table_path)
    if missing := [name for name in ("url", "key", "status", "caption") if name not in schema]:
        raise InputError(
            f"{table_path}: no column {', '.join(missing)}; found {', '.join(schema)}; give"
            f" img2dataset's output made with a caption column"
        )
    if inside := image_column(table_path):
        columns = Columns(image=inside, caption="caption", url="url", status="status")
        yield from read_rows(source, table_path, columns, copies)
        return
    with naming_damage(table_path):
        table = pl.read_parquet(table_path)
    has_numbers = table.schema["key"].is_integer()  # of the names, which have zeros before them
    table = table.with_columns(pl.col("key", "url", "caption").cast(pl.String))
    is_done = (pl.col("status") == "success").fill_null(False)
    found = _in_tar(source, files[0]) if len(files) > 1 else _in_folder(source, folder_beside(table_path))
    places = pl.DataFrame(
        [(str(int(key)) if has_numbers and key.isdecimal() else key, at) for key, at in found.items()],
        schema={"key": pl.String, IMAGE_AT: pl.String},
        orient="row",
    )
    done = table.filter(is_done)
    rows = done.join(places, on="key", how="inner", maintain_order="left")
    dropped = {
        NOT_DOWNLOADED: table.filter(~is_done),
        IMAGE_MISSING: done.join(places, on="key", how="anti", maintain_order="left"),
    }
    yield Part(rows.select("url", "caption", IMAGE_AT), dropped)


def folder_beside(table_path: str) -> str:
    """Return the folder in which img2dataset's `files` output keeps the images of a table."""
    return table_path.removesuffix(".parquet")


def image_column(table_path: str) -> str | None:
    """Return the column of images of img2dataset's `parquet` output, which is named by their format."""
    with naming_damage(table_path):
        schema = pl.read_parquet_schema(table_path)
    return next((name for name in _FORMATS if schema.get(name) == pl.Binary), None)


def _in_tar(source: PackedSource, tar_path: str) -> dict[str, str]:
    """Return key → address of the images of a tar."""
    end = os.path.getsize(tar_path)
    return {
        key: address(source, served_path(source.path, tar_path), offset=offset, size=size)
        for key, (offset, size) in image_members(tar_path).items()
        if offset + size <= end  # a tar that was cut off ends inside its last image
    }


def _in_folder(source: PackedSource, folder: str) -> dict[str, str]:
    """Return key → address of the image files in a folder."""
    relative = served_path(source.path, folder)
    return {
        os.path.splitext(entry.name)[0]: address(
            source, f"{relative}/{entry.name}", offset=0, size=entry.stat().st_size
        )
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if entry.name.rpartition(".")[2].lower() in EXTENSIONS and entry.is_file()
    }


def read_webdataset(source: PackedSource, files: list[str], copies: Copies) -> Iterator[Part]:
    """Yield the samples of a tar: the caption is in the text next to the image, or in its JSON."""
    (tar_path,) = files
    relative = os.path.relpath(tar_path, folder_of(source.path))
    is_copied = is_gzipped(tar_path)
    plain_path = copies.unpack(tar_path) if is_copied else tar_path
    found = samples_of(plain_path, with_folders=True, shown=tar_path)
    end, place = os.path.getsize(plain_path), served_path(source.path, tar_path)
    rows, missing, malformed = [], [], list[Malformed]()
    for key in dict.fromkeys((*found.images, *found.texts)):
        texts = texts_of(tar_path, key, found.texts.get(key, {}), source)
        if isinstance(texts, Malformed):
            malformed.append(texts)
            continue
        url = texts.url or f"{known_by(source, relative)}/{quote(key)}"
        offset, size = found.images.get(key, (end, 1))
        if offset + size > end:
            missing += [(url, caption) for caption in texts.captions]
            continue
        at = (
            f"{copies.prefix}offset={offset}&size={size}"
            if is_copied
            else address(source, place, offset=offset, size=size)
        )
        rows += [(url, caption, at) for caption in texts.captions]
    pair = {"url": pl.String, "caption": pl.String}
    dropped = {IMAGE_MISSING: pl.DataFrame(missing, schema=pair, orient="row")}
    yield Part(pl.DataFrame(rows, schema={**pair, IMAGE_AT: pl.String}, orient="row"), dropped, malformed)


def read_shards(
    source: PackedSource, files: list[str], exemptions: Mapping[str, Sequence[str]]
) -> Iterator[Part]:
    """What a run has packed: addresses stay those of the web, and scores stay behind, to be made anew."""
    tar_path, table_path = files
    if named := [name for name in source.carry_columns if is_pattern(name)]:
        raise InputError(
            f"{table_path}: column {named[0]!r} cannot be carried: its name is a pattern; rename it"
        )
    columns = ["url", "caption", "offset_bytes", "size_bytes", *source.carry_columns]
    with naming_damage(table_path):
        table = with_exemptions(pl.scan_parquet(table_path), exemptions).collect()
    if EXEMPT_COLUMN in table.columns and EXEMPT_COLUMN not in columns:
        columns.append(EXEMPT_COLUMN)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"{table_path}: no column {', '.join(missing)}; found {', '.join(table.columns)}; give the folder"
            f" of a run's shards"
        )
    table = _with_chosen_captions(table_path, table, source.list_captions)
    end = pl.col("offset_bytes") + pl.col("size_bytes")
    is_whole = (end <= os.path.getsize(tar_path)).fill_null(False)
    whole = table.filter(is_whole)
    at = pl.concat_str(
        pl.lit(address(source, served_path(source.path, tar_path)) + "offset="),
        pl.col("offset_bytes").cast(pl.String),
        pl.lit("&size="),
        pl.col("size_bytes").cast(pl.String),
    )
    rows = whole.select("url", "caption", at.alias(IMAGE_AT), *columns[4:])
    yield Part(rows, {IMAGE_MISSING: table.filter(~is_whole)})


def _with_chosen_captions(path: str, table: pl.DataFrame, list_captions: ListCaptions | None) -> pl.DataFrame:
    """Return rows that keep several captions as a row for each, for the first, or with all as one text."""
    several = all_captions("caption")
    if several not in table.columns or list_captions == "first":
        return table
    if list_captions is None:
        raise refuse_list(path, several)
    if list_captions == "each":
        return with_each_caption(table)
    joined = pl.col(several).list.drop_nulls().list.join(BETWEEN).replace("", None)
    return table.with_columns(pl.coalesce(joined, "caption").alias("caption"))
