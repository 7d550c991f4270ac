"""Unfolds list columns of Parquet tables if a setting says how, and refuses structs by name."""

import polars as pl

from data_prep.sources.json_rows import refuse_list, refuse_nested
from data_prep.sources.text_rows import BETWEEN, ListCaptions
from pipeline.core.files.columns import column

ALL_CAPTIONS = "_captions"  # every caption of a row, where a source keeps them


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


def with_one_text(frame: pl.LazyFrame, caption: str) -> pl.LazyFrame:
    """Return lists of captions as one text each, as tables of the run hold them; null for an empty list."""
    dtype = frame.collect_schema()[caption]
    if not isinstance(dtype, pl.List | pl.Array):
        return frame
    captions = column(caption)
    if isinstance(dtype, pl.Array):
        captions = captions.arr.to_list()
    text = captions.list.drop_nulls().cast(pl.List(pl.String)).list.join(BETWEEN)
    return frame.with_columns(text.replace("", None).alias(caption))


def becomes_rows(schema: pl.Schema, caption: str, list_captions: ListCaptions | None) -> bool:
    """Return whether each caption of a list becomes a row of its own."""
    return isinstance(schema[caption], pl.List | pl.Array) and list_captions not in ("random", "first")


def with_one_caption(frame: pl.LazyFrame, caption: str, list_captions: ListCaptions | None) -> pl.LazyFrame:
    """Return a row for each caption of a list, or for its first; an empty list is no caption.

    With `random` ALL_CAPTIONS has the list, which a table of the run may also hold as one text.
    """
    dtype = frame.collect_schema()[caption]
    if not isinstance(dtype, pl.List | pl.Array):
        if list_captions == "random":
            captions = column(caption).cast(pl.String).str.split(BETWEEN)
            return frame.with_columns(captions.alias(ALL_CAPTIONS)).with_columns(
                captions.list.first().alias(caption)
            )
        return frame
    captions = column(caption)
    if isinstance(dtype, pl.Array):
        captions = captions.arr.to_list()
    if list_captions == "random":
        captions = captions.list.drop_nulls().cast(pl.List(pl.String))
        return frame.with_columns(captions.alias(ALL_CAPTIONS)).with_columns(
            pl.col(ALL_CAPTIONS).list.first().alias(caption)
        )
    if list_captions == "first":
        return frame.with_columns(captions.list.first().alias(caption))
    return frame.with_columns(captions.alias(caption)).explode(caption, empty_as_null=True)
