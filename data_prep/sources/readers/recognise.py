"""Which kind of source a path is, by what lies there."""

import os
from collections.abc import Callable, Mapping
from itertools import islice

import pyarrow as pa

from data_prep.formats.tar_images import EXTENSIONS, TEXTS
from data_prep.sources.readers.columns import holds_images
from data_prep.sources.readers.huggingface import METADATA, TABLES
from data_prep.sources.readers.places import files_below, find_files
from data_prep.sources.readers.source import PackedKind
from data_prep.sources.readers.tables import read_schema
from pipeline.core.records import InputError

_MOST_LOOKED_AT = 10_000  # files of a folder


def recognise(path: str) -> PackedKind | None:
    """Return the kind of source that reads a folder, file or pattern; None for tables and the unknown.

    Raises:
        InputError: if it is the folder of a run, in which several stages keep tars.
    """
    if os.path.isfile(manifest := os.path.join(path, "shards", "manifest.json")):
        raise InputError(f"{path}: the folder of a run; give its shards: {os.path.dirname(manifest)}")
    if os.path.isdir(path):
        files = [os.path.relpath(file, path) for file in islice(files_below(path), _MOST_LOOKED_AT)]
        folder = path
    else:
        try:
            files, folder = find_files(path, (".tar", ".tar.gz", ".tgz", *TABLES), "data"), ""
        except InputError:
            return None
    names = set(files)
    is_there: Mapping[PackedKind, Callable[[], bool]] = {
        "cn_clip_tsv": lambda: {"train_imgs.tsv", "train_texts.jsonl"} <= names,
        "cn_clip_lmdb": lambda: bool({"lmdb/train/imgs/data.mdb", "train/imgs/data.mdb"} & names),
        "shards": lambda: _has_columns(folder, names, "offset_bytes", "image_sha256"),
        "img2dataset": lambda: _has_columns(folder, names, "key", "status", "url", "caption"),
        "webdataset": lambda: any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in names),
        "huggingface": lambda: _is_huggingface(folder, files),
        "folder": lambda: _is_image_folder(names),
    }
    return next((kind for kind, is_it in is_there.items() if is_it()), None)


def _has_columns(folder: str, names: set[str], *columns: str) -> bool:
    """Return whether the first table directly in the folder has these columns, among others."""
    table = min((name for name in names if name.endswith(".parquet") and os.sep not in name), default=None)
    return bool(folder and table) and {*columns} <= {*_schema(os.path.join(folder, str(table))).names}


def _is_huggingface(folder: str, files: list[str]) -> bool:
    if any(os.path.basename(name) in METADATA for name in files):
        return True
    table = next((name for name in files if name.endswith(TABLES)), None)
    return table is not None and holds_images(_schema(os.path.join(folder, table)))


def _is_image_folder(names: set[str]) -> bool:
    stems = {os.path.splitext(name)[0] for name in names if name.rpartition(".")[2] in TEXTS}
    images = (name for name in names if name.rpartition(".")[2].lower() in EXTENSIONS)
    return any(name in stems or os.path.splitext(name)[0] in stems for name in images)


def _schema(path: str) -> pa.Schema:
    """Return a table's columns; none if it cannot be read: its reader says why."""
    try:
        return read_schema(path)
    except InputError:
        return pa.schema([])
