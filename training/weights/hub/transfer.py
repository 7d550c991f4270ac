"""Download files of a model into Hugging Face's cache: resumed, checked, and once for a machine's processes.

huggingface_hub starts a killed download from the first byte and compares sizes only. Here the bytes so far
stay in `blobs/DIGEST.incomplete`, the next attempt asks for the rest, and only bytes with the digest that the
hub names become part of the cache. Its own function then links them into the snapshot.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.core.progress import make_progress
from pipeline.core.records import InputError
from training.weights.hub.cache import blob_path, cache_folder, cached_file, repo_folder
from training.weights.hub.names import HubId
from training.weights.hub.remote import RemoteFile, Unreachable, asking, endpoint

_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 5  # in a row without a new byte
_MIB = 1 << 20
_ACCEPTED, _PARTIAL_CONTENT, _NO_SUCH_RANGE = 200, 206, 416


def download(wanted: HubId, commit: str, files: Sequence[RemoteFile]) -> None:
    """Bring files of a commit into the cache; small ones first, so that weights never lack their settings.

    Raises:
        InputError: if the bytes are not those that the hub names, or the disk is full.
        Unreachable: if the hub gives no more bytes; what has come stays.
    """
    missing = [file for file in files if cached_file(wanted.repo, commit, file.name) is None]
    missing.sort(key=lambda file: (file.is_large, file.name))
    with asking(wanted):
        _require_space(wanted, missing)
        for file in missing:
            _fetch(wanted, commit, file)
            _link(wanted, commit, file)


def _require_space(wanted: HubId, files: Sequence[RemoteFile]) -> None:
    os.makedirs(cache_folder(), exist_ok=True)
    needed = sum(
        file.num_bytes - _size(_incomplete(blob_path(wanted.repo, file.etag)))
        for file in files
        if not blob_path(wanted.repo, file.etag).exists()
    )
    free = shutil.disk_usage(cache_folder()).free
    if needed > free:
        raise InputError(
            f"{wanted}: {needed / _MIB:,.0f} MiB are to be downloaded, but the disk of {cache_folder()} has"
            f" {free / _MIB:,.0f} MiB free: free space or set HF_HOME"
        )


def _fetch(wanted: HubId, commit: str, file: RemoteFile) -> None:
    """Make a blob of the cache; a second process waits for the first."""
    from huggingface_hub.utils import WeakFileLock

    blob = blob_path(wanted.repo, file.etag)
    lock = Path(cache_folder(), ".locks", repo_folder(wanted.repo).name, f"{file.etag}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        part = _incomplete(blob)
        _complete(wanted, commit, file, part)
        found = _etag_of(part, file)
        if found != file.etag:
            part.unlink()
            raise InputError(
                f"{wanted}: {file.name} arrived with other bytes than {endpoint()} names ({found[:12]}, not"
                f" {file.etag[:12]}), and is not kept: run again, or set HF_ENDPOINT to another mirror"
            )
        os.replace(part, blob)


def _complete(wanted: HubId, commit: str, file: RemoteFile, part: Path) -> None:
    """Append to the bytes so far until the file has its size."""
    if _size(part) > file.num_bytes:
        part.unlink()
    progress = make_progress(f"download {wanted.repo} {file.name}", "MiB") if file.is_large else None
    told, total_mib = -1, -(-file.num_bytes // _MIB)

    def tell(num_bytes: int) -> None:
        nonlocal told
        if progress is not None and told < num_bytes // _MIB < total_mib:
            told = num_bytes // _MIB
            progress(told, total_mib, "MiB")

    part.touch()
    failures = 0
    while (before := _size(part)) < file.num_bytes:
        try:
            with asking(wanted):
                _append(wanted, commit, file, part, tell)
            reason = f"{endpoint()} ends {file.name} after {_size(part):,} of {file.num_bytes:,} bytes"
        except Unreachable as error:
            reason = str(error)
        if _size(part) > file.num_bytes:
            return  # the digest will say so
        if _size(part) < file.num_bytes:
            failures = failures + 1 if _size(part) <= before else 0
            if failures >= _ATTEMPTS:
                raise Unreachable(reason)
            time.sleep(min(failures, 3))
    if progress is not None:
        progress(total_mib, total_mib, "MiB")


def _append(wanted: HubId, commit: str, file: RemoteFile, part: Path, tell: Callable[[int], None]) -> None:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(wanted.repo, file.name, revision=commit, endpoint=endpoint())
    start = _size(part)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    ) as response:
        if response.status_code == _NO_SUCH_RANGE:
            part.unlink()
            part.touch()
            return
        hf_raise_for_status(response)
        with part.open("ab") as out:
            if response.status_code != _PARTIAL_CONTENT:  # a server without ranges starts over
                out.truncate(0)
            for chunk in response.iter_bytes():  # as they come: what is gathered is lost in a cut
                out.write(chunk)
                if out.tell() > file.num_bytes:
                    return
                out.flush()
                tell(out.tell())


def _etag_of(path: Path, file: RemoteFile) -> str:
    """Return the entity tag that the bytes have: sha256, or git's sha1, which counts a header too."""
    digest = hashlib.sha256() if file.is_large else hashlib.sha1(f"blob {_size(path)}\0".encode())
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _link(wanted: HubId, commit: str, file: RemoteFile) -> None:
    """Let huggingface_hub put the blob into the snapshot, which it finds there."""
    from huggingface_hub import hf_hub_download

    path = Path(
        hf_hub_download(
            wanted.repo, file.name, revision=commit, cache_dir=cache_folder(), endpoint=endpoint()
        )
    )
    blob = blob_path(wanted.repo, file.etag)
    if not (blob.exists() and path.samefile(blob)) and _etag_of(path, file) != file.etag:
        path.unlink()
        raise InputError(
            f"{wanted}: {endpoint()} names two digests of {file.name}: set HF_ENDPOINT to another mirror"
        )


def _incomplete(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
