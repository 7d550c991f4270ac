"""Where the files of a source are, and which of them its folder holds."""

import glob
import os
import re
from collections.abc import Iterator, Sequence

import braceexpand

from pipeline.core import store
from pipeline.core.files.image_files import is_hidden
from pipeline.core.records import InputError

_MAGIC = re.compile(r"[*?\[{]")


def folder_of(path: str) -> str:
    """Return the folder that a source's files are named from.

    That is the path itself, the folder of a file, or what a pattern has before its first sign.
    """
    if os.path.isdir(path):
        return path
    found = None if os.path.exists(path) else _MAGIC.search(path)
    return os.path.dirname(path[: found.start()] if found else path) or "."


def served_folder(path: str) -> str:
    """Return the folder that the run's own server needs for a source's images, an absolute path.

    A snapshot in the cache of `huggingface_hub` holds links to `blobs`, which lies next to `snapshots`.
    """
    folder = store.absolute(folder_of(path))
    place = folder
    while (above := os.path.dirname(place)) != place:
        if os.path.basename(above) == "snapshots" and os.path.isdir(os.path.join(above, "..", "blobs")):
            return os.path.dirname(above)
        place = above
    return folder


def served_path(path: str, file: str) -> str:
    """Return a file's path below the folder that the server needs for a source's images."""
    return os.path.relpath(os.path.abspath(file), served_folder(path))


def find_files(path: str, endings: Sequence[str], source: str) -> list[str]:
    """Return the files with one of the endings: the path itself, those below a folder, or those of a pattern.

    A pattern knows `*`, `**`, `?`, `[a-c]`, `{a,b}` and `{00..99}`. Hidden files and folders are passed over.

    Raises:
        InputError: if a part of a pattern matches nothing, or a file by itself has another ending.
    """
    if os.path.isdir(path):
        return sorted(file for file in files_below(path) if file.endswith(tuple(endings)))
    if os.path.exists(path):
        if not path.endswith(tuple(endings)):
            raise InputError(f"{path}: neither a folder nor a {' or '.join(endings)} (source {source})")
        return [path]
    found = dict[str, None]()
    for pattern in _alternatives(path):
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise InputError(f"{pattern}: no such file (source {source}); correct `path` in [corpus]")
        for match in matches:
            files = files_below(match) if os.path.isdir(match) else [match]
            found |= dict.fromkeys(file for file in files if file.endswith(tuple(endings)))
    return sorted(found)


def files_below(folder: str) -> Iterator[str]:
    """Yield the files in a folder and below it, in order, without hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (os.path.join(place, name) for name in sorted(names) if not is_hidden(name))


def inside(folder: str, path: str) -> str | None:
    """Return a file's path relative to an absolute folder; None if it lies elsewhere, by a link as well."""
    root = os.path.realpath(folder)
    real = os.path.realpath(path)
    return os.path.relpath(real, root) if real.startswith(root.rstrip(os.sep) + os.sep) else None


def _alternatives(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError:  # UnbalancedBracesError
        raise InputError(f"{pattern}: its braces do not match; write {{a,b}} or {{00..99}}") from None
