"""Ask a hub what a model holds, and say in one line why it does not answer."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.core.files.foreign import first_line
from pipeline.core.records import InputError
from training.weights.hub.cache import cache_folder
from training.weights.hub.names import HubId

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_BUSY = (408, 429, 500, 502, 503, 504)


class Unreachable(Exception):
    """The hub gives no answer now; asked again later it may."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a model as the hub describes it."""

    name: str
    num_bytes: int
    etag: str  # sha256 of a large file's bytes, git's sha1 of another's
    is_large: bool  # kept by its sha256 (Git LFS)


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of a model at a commit, by name."""

    commit: str
    files: dict[str, RemoteFile]


def endpoint() -> str:
    """Return the hub that is asked: HF_ENDPOINT, else Hugging Face's own."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Return whether no hub may be asked: HF_HUB_OFFLINE, or `--offline`."""
    from huggingface_hub import constants

    # The library reads its variables when it is first imported; `--offline` may come later.
    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return bool(constants.HF_HUB_OFFLINE) or asked


def list_files(wanted: HubId) -> Listing:
    """Ask the hub for the commit of a revision and its files.

    Raises:
        InputError: if there is no such model or revision, or access to it is restricted.
        Unreachable: if the hub does not answer.
    """
    from huggingface_hub import HfApi, constants

    with asking(wanted):
        info = HfApi(endpoint=endpoint()).model_info(
            wanted.repo,
            revision=wanted.revision,
            files_metadata=True,
            timeout=float(constants.HF_HUB_ETAG_TIMEOUT),
        )
    files = {}
    for item in info.siblings or []:
        large = item.lfs
        etag, size = (large.sha256, large.size) if large is not None else (item.blob_id, item.size)
        # Both become names of files in the cache.
        if not (_DIGEST.fullmatch(str(etag)) and _DIGEST.fullmatch(str(info.sha))) or size is None:
            raise InputError(
                f"{wanted}: {endpoint()} names no digest of {item.rfilename}, so that a download cannot be"
                " checked: set HF_ENDPOINT to another mirror"
            )
        files[item.rfilename] = RemoteFile(item.rfilename, int(size), str(etag), large is not None)
    return Listing(str(info.sha), files)


@contextlib.contextmanager
def asking(wanted: HubId) -> Iterator[None]:
    """Turn what goes wrong between here and the hub into one line, or into `Unreachable`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{wanted}: gated: accept its owner's conditions at {endpoint()}/{wanted.repo}, then run `hf auth"
            " login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{wanted}: no such file or folder here, and no model of this name at {endpoint()}, or a private"
            " one: correct the name, or run `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{wanted}: no revision {wanted.revision} at {endpoint()}: give a branch, tag or commit"
        ) from None
    except errors.LocalEntryNotFoundError as error:  # huggingface_hub's words for no network
        raise Unreachable(f"{endpoint()} cannot be reached: {first_line(error)}") from None
    except errors.EntryNotFoundError:
        raise InputError(
            f"{wanted}: {endpoint()} lists a file that it does not give: set HF_ENDPOINT to another mirror"
        ) from None
    except errors.HFValidationError as error:
        raise InputError(f"{wanted}: not an id of a hub ({first_line(error)}): give owner/name") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in _BUSY:
            raise Unreachable(f"{endpoint()} answers with status {status}") from None
        raise InputError(
            f"{wanted}: {endpoint()} answers with status {status}: check HF_ENDPOINT and HF_TOKEN"
        ) from None
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
            raise Unreachable(f"{endpoint()} cannot be reached: {first_line(error)}") from None
        raise InputError(f"{wanted}: {of_disk(error)}") from None
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # huggingface_hub's client, httpx or httpx2
            raise
        raise Unreachable(f"{endpoint()} cannot be reached: {first_line(error)}") from None


def of_disk(error: OSError) -> str:
    """Return what is wrong with the cache's disk and what to do."""
    if error.errno in _FULL:
        return f"the disk of {cache_folder()} is full: free space or set HF_HOME, then run the command again"
    if error.errno in _READ_ONLY:
        return f"{cache_folder()} cannot be written: make it writable or set HF_HOME"
    return f"{cache_folder()}: {error.strerror or first_line(error)}: repair it or set HF_HOME"
