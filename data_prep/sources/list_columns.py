"""Unfolds list columns of Parquet tables if a setting says how, and refuses structs by name."""

import polars as pl

from data_prep.sources.json_rows import refuse_list, refuse_nested
from data_prep.sources.text_rows import ListCaptions
from pipeline.core.files.columns import column


def refuse_nested_columns(
    path: str, url: str, caption: str, schema: pl.Schema, list_captions: ListCaptions | None
) -> None:
    """Raise InputError if addresses or captions are structs, or lists that no setting unfolds."""
    for name, what in ((url, "address"), (caption, "caption")):
        dtype = schema[name]
        inside = dtype.inner if isinstance(dtype, pl.List | pl.Array) else None
        if isinstance(dtype, pl.Struct):
            raise refuse_nested(path, name, what, {part.name: None for part in dtype.fields})
        if isinstance(inside, pl.Struct):
            raise refuse_nested(path, name, what, [{part.name: None for part in inside.fields}])
        if inside is not None and (what == "address" or isinstance(inside, pl.List | pl.Array)):
            raise refuse_nested(path, name, what, [])
        if inside is not None and list_captions is None:
            raise refuse_list(path, name)


def with_one_caption(frame: pl.LazyFrame, caption: str, list_captions: ListCaptions | None) -> pl.LazyFrame:
    """Return a row for each caption of a list, or for its first; an empty list gives a null caption."""
    dtype = frame.collect_schema()[caption]
    if not isinstance(dtype, pl.List | pl.Array):
        return frame
    captions = column(caption)
    if isinstance(dtype, pl.Array):
        captions = captions.arr.to_list()
    if list_captions == "first":
        return frame.with_columns(captions.list.first().alias(caption))
    return frame.with_columns(captions.alias(caption)).explode(caption, empty_as_null=True)
