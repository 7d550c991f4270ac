"""Folders of Hugging Face `datasets`: Parquet and Arrow with the images inside, or imagefolder.

Formats: `Dataset.push_to_hub`, `Dataset.save_to_disk`, and `load_dataset("imagefolder")` with a metadata
file, as the documentation of `datasets` has them.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.sources.list_columns import with_one_caption, with_one_text
from data_prep.sources.parquet_text import as_text
from data_prep.sources.readers.columns import Columns, find_columns
from data_prep.sources.readers.copies import Copies
from data_prep.sources.readers.places import (
    files_below,
    find_files,
    folder_of,
    inside,
    served_folder,
    served_path,
)
from data_prep.sources.readers.source import (
    IMAGE_AT,
    IMAGE_MISSING,
    IMAGE_OUTSIDE,
    NOT_DOWNLOADED,
    PackedSource,
    Part,
    address,
    known_by,
)
from data_prep.sources.readers.tables import Batch, read_batches, read_schema, values_of
from data_prep.sources.text_file import without_damaged
from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.files.image_files import TOO_LARGE
from pipeline.core.records import DropReason, InputError
from pipeline.core.shard_format import MAX_IMAGE_BYTES

TABLES = (".parquet", ".arrow")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # of save_to_disk
_SHARD = re.compile(r"([\w.]+)-\d{5}-of-\d{5}")  # at the end of the name, as push_to_hub writes it
# Words that name a split in a file's or folder's name, as `datasets` knows them.
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_TEXT_COLUMNS = ("caption", "url")

# What an image's row becomes, in order: its place is one of the first three.
_IN_FILE, _COPIED, _BY_PATH, _MISSING, _OUTSIDE, _TOO_LARGE = range(6)
_REASONS: dict[int, DropReason] = {_MISSING: IMAGE_MISSING, _OUTSIDE: IMAGE_OUTSIDE, _TOO_LARGE: TOO_LARGE}


def pieces(source: PackedSource) -> list[list[str]]:
    """Return the files of a split, each a piece: tables, or the metadata files of imagefolder.

    Raises:
        InputError: if there is none; it says what is there.
    """
    found = find_files(source.path, (*TABLES, *METADATA), source.name)
    found = [file for file in found if file.endswith(TABLES) or is_metadata(file)]  # and no own_metadata.csv
    files = [file for folder, names in _by_folder(found) for file in _named_by_state(folder, names)]
    if not files:
        raise InputError(
            f"{source.path}: no .parquet, .arrow or metadata.jsonl in it or below it (source"
            f" {source.name}); {_what_else(source.path)}"
        )
    splits = {file: _split_of(file, folder_of(source.path)) for file in files}
    wanted = _WORDS.get(source.split, source.split)
    chosen = [file for file in files if splits[file] == wanted]
    if not chosen:
        listed = ", ".join(sorted(set(splits.values())))
        raise InputError(
            f"{source.path}: no split {source.split!r} (source {source.name}); found {listed}; set split to"
            " one of these"
        )
    return [[file] for file in chosen]


def is_metadata(path: str) -> bool:
    """Return whether a file is the table of an imagefolder."""
    return os.path.basename(path) in METADATA


def read_table(source: PackedSource, path: str, copies: Copies) -> Iterator[Part]:
    """Yield the rows of a Parquet or Arrow table with images."""
    return read_rows(source, path, find_columns(path, read_schema(path), source), copies)


def read_rows(source: PackedSource, path: str, columns: Columns, copies: Copies) -> Iterator[Part]:
    """Yield the rows of a table whose columns are known.

    Images that do not lie in the file as they are go to `copies`.
    """
    first = 0
    relative = os.path.relpath(path, folder_of(source.path))
    for batch in read_batches(path, columns.names, columns.image):
        rows = _frame(source, columns, batch)
        places = _places(source, path, batch, copies)
        number = pl.int_range(first, first + rows.height).cast(pl.String)
        own = pl.concat_str(pl.lit(f"{known_by(source, quote(relative))}/"), number)
        is_address = pl.col("url").str.starts_with("http")
        rows = rows.hstack(places).with_columns(pl.when(is_address).then("url").otherwise(own).alias("url"))
        first += rows.height
        yield _part(source, columns, rows)
    if first == 0:
        names = ("url", "caption", IMAGE_AT, *columns.carried)
        yield Part(pl.DataFrame(schema=dict.fromkeys(names, pl.String)))


def _part(source: PackedSource, columns: Columns, rows: pl.DataFrame) -> Part:
    if source.list_captions == "random":
        rows = with_one_text(rows.lazy(), "caption").collect()
    else:
        rows = with_one_caption(rows.lazy(), "caption", source.list_captions).collect()
    whole = without_damaged(
        rows, [*_TEXT_COLUMNS, *(n for n in columns.carried if rows[n].dtype == pl.String)]
    )
    rows, dropped = whole.rows, dict[DropReason, pl.DataFrame]()
    if columns.status is not None:
        is_done = (pl.col("_status") == "success").fill_null(False)
        dropped[NOT_DOWNLOADED] = rows.filter(~is_done).select(*_TEXT_COLUMNS)
        rows = rows.filter(is_done)
    dropped |= {
        reason: rows.filter(_place=place).select(*_TEXT_COLUMNS) for place, reason in _REASONS.items()
    }
    stays = rows.filter(pl.col(IMAGE_AT).is_not_null())
    return Part(stays.select("url", "caption", IMAGE_AT, *columns.carried), dropped, whole.malformed)


def _frame(source: PackedSource, columns: Columns, batch: Batch) -> pl.DataFrame:
    names = {"caption": columns.caption, "url": columns.url, "_status": columns.status}
    found = {
        name: as_text(values_of(batch.columns, column))
        for name, column in {**names, **{name: name for name in columns.carried}}.items()
        if column is not None
    }
    frame: Any = pl.from_arrow(pa.table(list(found.values()), names=list(found)))
    rows = pl.DataFrame(frame)
    return rows if "url" in found else rows.with_columns(url=pl.lit(None, pl.String))


def _places(source: PackedSource, path: str, batch: Batch, copies: Copies) -> pl.DataFrame:
    """Return the columns _place and picture_at of a batch; the second is null where there is no image."""
    root = served_folder(source.path)
    size_bytes = pc.fill_null(pc.binary_length(batch.images), 0).to_numpy().astype(np.int64)
    offset_bytes = batch.offset_bytes.copy()
    place = np.where(offset_bytes >= 0, _IN_FILE, _COPIED)
    place[size_bytes == 0] = _MISSING
    place[size_bytes > MAX_IMAGE_BYTES] = _TOO_LARGE
    for row in np.flatnonzero(place == _COPIED):
        offset_bytes[row] = copies.add(batch.images[row].as_py())
    by_path: list[str | None] = [None] * len(place)
    if batch.paths is not None:
        for row in np.flatnonzero(
            (place == _MISSING) & batch.paths.is_valid().to_numpy(zero_copy_only=False)
        ):
            place[row], by_path[row] = _by_path(source, root, path, batch.paths[row].as_py())
    begins = [
        pl.lit(f"{prefix}offset=")
        for prefix in (address(source, served_path(source.path, path)), copies.prefix)
    ]
    range_of = (pl.col("offset").cast(pl.String), pl.lit("&size="), pl.col("size").cast(pl.String))
    table = pl.DataFrame(
        {"_place": place, "offset": offset_bytes, "size": size_bytes, "path": by_path},
        schema_overrides={"path": pl.String},
    )
    return table.select(
        "_place",
        pl.when(_place=_IN_FILE)
        .then(pl.concat_str(begins[0], *range_of))
        .when(_place=_COPIED)
        .then(pl.concat_str(begins[1], *range_of))
        .otherwise("path")
        .alias(IMAGE_AT),
    )


def _by_path(source: PackedSource, root: str, table: str, path: str) -> tuple[int, str | None]:
    """Return the place and address of an image that a row names: from its table's folder, or the source's."""
    folders = (os.path.dirname(table), folder_of(source.path))
    candidates = [os.path.join(folder, path) for folder in folders] if "\0" not in path else []
    found = next((name for name in candidates if os.path.isfile(name)), None)
    if found is None:
        return _MISSING, None
    if (relative := inside(root, found)) is None:
        return _OUTSIDE, None
    size_bytes = os.path.getsize(found)
    if size_bytes > MAX_IMAGE_BYTES:
        return _TOO_LARGE, None
    return (
        (_BY_PATH, address(source, relative, offset=0, size=size_bytes)) if size_bytes else (_MISSING, None)
    )


def _by_folder(files: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    for folder, names in itertools.groupby(files, os.path.dirname):
        yield folder, [os.path.basename(name) for name in names]


def _named_by_state(folder: str, names: list[str]) -> list[str]:
    """Return the files of a folder; only those that `save_to_disk` lists, if it wrote the folder.

    Others there are caches, such as `cache-0123.arrow`.
    """
    path = os.path.join(folder, _STATE)
    if not os.path.isfile(path):
        return [os.path.join(folder, name) for name in names]
    wrong = InputError(f"{path}: not what save_to_disk writes; save the data set again, or remove this file")
    try:
        state = parse_json(store.read_text(path))
        listed = [str(item["filename"]) for item in state["_data_files"]]
        is_reordered = bool(state.get("_indices_data_files"))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise wrong from None
    if is_reordered:
        raise InputError(f"{path}: rows were chosen or reordered; call flatten_indices() and save it again")
    if any(os.path.basename(name) != name for name in listed):
        raise wrong
    if missing := sorted({*listed} - {*names}):
        if any(os.path.exists(os.path.join(folder, name)) for name in missing):
            return [os.path.join(folder, name) for name in listed if name in names]  # a pattern left it out
        raise InputError(
            f"{os.path.join(folder, missing[0])}: no such file, but {_STATE} lists it; copy it too"
        )
    return [os.path.join(folder, name) for name in listed]


def _split_of(path: str, root: str) -> str:
    """Return the split of a file; `train` if nothing names one, as `datasets` has it."""
    folder, name = os.path.split(path)
    if os.path.isfile(os.path.join(os.path.dirname(folder), _SPLITS)):
        return _WORDS.get(os.path.basename(folder), os.path.basename(folder))
    stem = os.path.splitext(name)[0]
    shard = _SHARD.search(stem)
    if shard is not None and os.path.basename(folder) == "data":
        return _WORDS.get(shard[1], shard[1])
    places = os.path.relpath(folder, root).split(os.sep)
    for part in (stem, *reversed(places)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _WORDS:
                return _WORDS[word]
    return "train"


def _what_else(path: str) -> str:
    """Return what a folder without tables holds, and what to do."""
    folder = folder_of(path)
    endings = Counter(os.path.splitext(file)[1].lower() or "no ending" for file in files_below(folder))
    if not endings:
        return "it is empty; correct `path` in [corpus]"
    listed = ", ".join(f"{count:,} with {ending}" for ending, count in endings.most_common(5))
    return (
        f'found {listed}; tars are read with kind = "webdataset", images with a text file each with kind ='
        ' "folder", and archives have to be unpacked first'
    )
