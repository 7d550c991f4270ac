"""Hugging Face's cache on disk, whose layout its documentation describes.

`models--OWNER--NAME/` holds `blobs/` (files by digest), `snapshots/COMMIT/` (links to them by name) and
`refs/` (the commit of each branch and tag, as last seen). transformers and open_clip share it.
"""

import contextlib
import os
import re
from pathlib import Path

from training.weights.hub.names import HubId

_SNAPSHOT = re.compile(r"/models--[^/]+/snapshots/[0-9a-f]{40}/")


def cache_folder() -> str:
    """Return the cache: HF_HUB_CACHE, else `hub/` in HF_HOME."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def repo_folder(repo: str) -> Path:
    """Return the folder of a model in the cache."""
    return Path(cache_folder(), f"models--{repo.replace('/', '--')}")


def blob_path(repo: str, etag: str) -> Path:
    """Return the place of a file by its entity tag: sha256 of large files, git's sha1 of the others."""
    return repo_folder(repo) / "blobs" / etag


def cached_file(repo: str, commit: str, name: str) -> str | None:
    """Return the path of a file that the cache holds whole; None if it does not."""
    path = repo_folder(repo) / "snapshots" / commit / name
    return str(path) if path.is_file() else None


def cached_commit(wanted: HubId) -> str | None:
    """Return the commit that a revision was when the hub was last asked; None if it was not recorded."""
    if wanted.is_commit:
        return wanted.revision
    path = repo_folder(wanted.repo) / "refs" / wanted.revision
    return path.read_text(encoding="ascii").strip() if path.is_file() else None


def cached_names(repo: str, commit: str) -> list[str]:
    """Return the names of the files of a commit that the cache holds whole."""
    snapshot = repo_folder(repo) / "snapshots" / commit
    return sorted(
        str(Path(folder, name).relative_to(snapshot))
        for folder, _, names in os.walk(snapshot)
        for name in names
        if Path(folder, name).is_file()
    )


def is_snapshot(path: str) -> bool:
    """Return whether a path is in a snapshot of the cache, where what lies next to a file belongs to it."""
    return _SNAPSHOT.search(path) is not None


def note_commit(wanted: HubId, commit: str) -> None:
    """Note which commit a branch or tag is, for those who have no network later."""
    if wanted.is_commit or cached_commit(wanted) == commit:
        return
    path = repo_folder(wanted.repo) / "refs" / wanted.revision
    with contextlib.suppress(OSError):  # a cache that others fill may be mounted read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(commit, encoding="ascii")
        os.replace(partial, path)
