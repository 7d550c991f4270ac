"""Tables in folders, as Spark and Hive write them."""

import os

from data_prep.sources import text_file
from pipeline.core import store
from pipeline.core.records import InputError


def parts_of(path: str, source: str) -> list[str]:
    """Return a file itself, or the sorted tables in and below a folder without `_SUCCESS` and hidden files.

    Raises:
        InputError: if a folder holds no tables.
    """
    if store.is_local(path):
        if not os.path.isdir(path):
            return [path]
        files = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names]
        found = {os.path.relpath(file, path).replace(os.sep, "/"): file for file in files}
    else:
        fs, inside = store.remote(path)
        if not fs.isdir(inside):
            return [path]
        found = {name[len(inside) :].lstrip("/"): fs.unstrip_protocol(name) for name in fs.find(inside)}
    parts = [
        found[name]
        for name in sorted(found)
        if not any(part.startswith(("_", ".")) for part in name.split("/"))
        and (name.lower().endswith(".parquet") or text_file.is_text(name))
    ]
    if not parts:
        raise InputError(
            f"{path}: a folder without tables (source {source}); give one with .parquet, .csv, .tsv,"
            " .jsonl or .json files, or correct `path` in [corpus]"
        )
    return parts
