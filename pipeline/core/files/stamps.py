"""What tells a file from what it was before, without reading it."""

import os

from pipeline.core import store


def stamps(folder: str) -> dict[str, str]:
    """Return name → stamp of the files directly inside a folder, from one listing; empty without a folder.

    A stamp changes whenever a file is written. It is empty where a store does not say enough for one.
    """
    if store.is_local(folder):
        if not os.path.isdir(folder):
            return {}
        with os.scandir(folder) as entries:
            return {entry.name: _of_stat(entry.stat()) for entry in entries if entry.is_file()}
    fs, name = store.remote(folder)
    try:
        found = fs.ls(name, detail=True)
    except FileNotFoundError:
        return {}
    return {
        info["name"].rsplit("/", 1)[-1]: f"{info['size']} {tag}" if tag else ""
        for info in found
        if info["type"] == "file"
        for tag in [info.get("ETag") or info.get("etag")]
    }


def _of_stat(found: os.stat_result) -> str:
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
