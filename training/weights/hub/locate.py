"""From a name of weights to files on this machine: look up, download what is missing, and bind a run to it.

Nothing here runs code that a model brings: files are fetched, and read as `training.weights.formats` reads
any file.
"""

import sys
from collections.abc import Iterable

from pipeline.core import store
from pipeline.core.processes import say
from pipeline.core.records import InputError
from training.weights.hub.cache import (
    cache_folder,
    cached_commit,
    cached_file,
    cached_names,
    note_commit,
)
from training.weights.hub.choice import choose_weights, files_beside, is_index, parts_of
from training.weights.hub.names import HubId, find_id
from training.weights.hub.pins import Pin, PinnedFile, pins_path, read_pins, write_pins
from training.weights.hub.remote import Listing, RemoteFile, Unreachable, endpoint, is_offline, list_files
from training.weights.hub.transfer import download

_GIVE_PATH = "or give the path of weights that you have"


def local_path(text: str) -> str:
    """Return a path as it is, and for a name the path of its weights, which are downloaded if need be.

    Raises:
        InputError: in one line, if the text is neither, or the hub does not give the files.
    """
    return locate(text)[0]


def locate(text: str) -> tuple[str, str]:
    """Return what `local_path` returns, and its origin: the id of exactly these weights, or the path."""
    wanted = find_id(text)
    if wanted is None:
        return text, text
    if wanted.is_commit and wanted.file is not None and not is_index(wanted.file):
        # Such an id is what ranks are given: no listing and no hash of gigabytes in each of them.
        path = cached_file(wanted.repo, wanted.revision, wanted.file)
        if path is not None:
            return path, str(wanted)
    pin = look_up(wanted)
    return fetch(pin), str(pin)


def look_up(wanted: HubId) -> Pin:
    """Return what a name stands for now; small files are downloaded, weights are not.

    Without a network it is what the cache holds of the commit that was seen last.

    Raises:
        InputError: if neither the hub nor the cache knows.
    """
    if wanted.is_commit and (pin := _in_cache(wanted)) is not None:
        return pin
    if is_offline():
        if (pin := _in_cache(wanted)) is not None:
            return pin
        raise InputError(
            f"{wanted}: HF_HUB_OFFLINE is set, and {cache_folder()} does not hold it: download it once with a"
            f" network, {_GIVE_PATH}"
        )
    try:
        return _at_hub(wanted)
    except Unreachable as error:
        if (pin := _in_cache(wanted)) is not None:
            say(f"{wanted}: {error}: using the cached commit {pin.commit[:12]}", sys.stderr)
            return pin
        raise _unreachable(wanted, error) from None


def fetch(pin: Pin, *, verify: bool = False) -> str:
    """Return the path of the weights of a pin in the cache; what is missing is downloaded.

    `verify` hashes the files that were there already too.

    Raises:
        InputError: if a file has other bytes than the pin says, or cannot be had.
    """
    wanted = HubId(pin.repo, pin.commit, pin.weights)
    missing = {file.name for file in pin.files if cached_file(pin.repo, pin.commit, file.name) is None}
    if missing:
        if is_offline():
            raise InputError(
                f"{wanted}: HF_HUB_OFFLINE is set, and {cache_folder()} lacks {', '.join(sorted(missing))}:"
                f" download it once with a network, {_GIVE_PATH}"
            )
        try:
            listing = list_files(wanted)
            download(wanted, pin.commit, [_listed(wanted, listing, name) for name in sorted(missing)])
        except Unreachable as error:
            raise _unreachable(wanted, error) from None
    for file in pin.files:
        if verify or file.name in missing:
            _check(pin, file)
    path = cached_file(pin.repo, pin.commit, pin.weights)
    assert path is not None  # downloaded or there
    return path


def fetch_file(repo: str, name: str) -> str:
    """Return the path of one file of a model's newest commit, downloaded if need be.

    Raises:
        InputError: in one line, if it cannot be had.
    """
    return fetch(look_up(HubId(repo, file=name)))


def obtain(run_folder: str, texts: Iterable[str], *, download_too: bool) -> None:
    """Pin the names among `texts` that a run has no pin of, and download what the pins of all of them say.

    Raises:
        InputError: if a name means nothing, the hub does not answer, or a file has other bytes than pinned.
    """
    named = {text: wanted for text in texts if (wanted := find_id(text)) is not None}
    if not named:
        return
    pins = read_pins(run_folder)
    new = {text: look_up(wanted) for text, wanted in named.items() if text not in pins}
    for text, pin in new.items():
        say(f"{text}: {pin}", sys.stderr)
    if new:
        pins |= new
        write_pins(run_folder, pins)
    if download_too:
        for text in named:
            _fetch_pinned(run_folder, text, pins[text])


def pinned_path(run_folder: str, text: str) -> str:
    """Return a path as it is, and for a name the path of the weights that the run is bound to."""
    if find_id(text) is None:
        return text
    pin = pin_of(run_folder, text)
    return local_path(text) if pin is None else _fetch_pinned(run_folder, text, pin)


def pinned_id(run_folder: str, text: str) -> str:
    """Return a path as it is, and for a name the id of the weights that the run is bound to."""
    if find_id(text) is None:
        return text
    pin = pin_of(run_folder, text)
    return text if pin is None else str(pin)


def is_pinned(run_folder: str, text: str) -> bool:
    """Return whether a run knows which weights a text means: a path, or a name that it has looked up."""
    return find_id(text) is None or text in read_pins(run_folder)


def pin_of(run_folder: str, text: str) -> Pin | None:
    """Return what a name stands for in a run, without asking a hub; None if the run has not looked it up."""
    pin = read_pins(run_folder).get(text) if run_folder else None
    if pin is None and (wanted := find_id(text)) is not None:
        pin = _in_cache(wanted)
    return pin


def digest_of(run_folder: str, text: str) -> str:
    """Return the digest of weights that a run is given by path or name: what binds a stage to them.

    A name that was never looked up has none yet: it gets one before the stage begins.
    """
    if find_id(text) is None:
        return store.digest_tree(text)
    pin = pin_of(run_folder, text)
    return f"not looked up: {text}" if pin is None else pin.digest


def missing_bytes(run_folder: str, text: str) -> tuple[HubId, int | None] | None:
    """Return what a run would download for a text, with the bytes if a pin says; None if nothing."""
    wanted = find_id(text)
    if wanted is None:
        return None
    pin = pin_of(run_folder, text)
    if pin is None:
        return wanted, None
    missing = [file for file in pin.files if cached_file(pin.repo, pin.commit, file.name) is None]
    return (wanted, sum(file.num_bytes for file in missing)) if missing else None


def _fetch_pinned(run_folder: str, text: str, pin: Pin) -> str:
    try:
        return fetch(pin, verify=True)
    except _OtherBytes as error:
        raise InputError(
            f"{text}: {error.path} has other bytes than {pins_path(run_folder)} says (sha256"
            f" {error.found[:12]}, not {error.pinned[:12]}): remove the first to download it again, or the"
            " second to take it as it is"
        ) from None


class _OtherBytes(InputError):
    def __init__(self, path: str, found: str, pinned: str) -> None:
        super().__init__(
            f"{path}: other bytes than before (sha256 {found[:12]}, not {pinned[:12]}): remove it"
        )
        self.path, self.found, self.pinned = path, found, pinned


def _check(pin: Pin, file: PinnedFile) -> None:
    path = cached_file(pin.repo, pin.commit, file.name)
    assert path is not None
    found = store.digest_file(path)
    if found != file.sha256:
        raise _OtherBytes(path, found, file.sha256)


def _at_hub(wanted: HubId) -> Pin:
    listing = list_files(wanted)
    weights = choose_weights(wanted, listing.files)
    names = [weights, *files_beside(weights, listing.files)]
    found = [listing.files[name] for name in names]
    small = [file for file in found if not file.is_large or is_index(file.name)]
    download(wanted, listing.commit, small)
    if is_index(weights):
        index = cached_file(wanted.repo, listing.commit, weights)
        assert index is not None
        names += parts_of(index, weights)
    note_commit(wanted, listing.commit)
    files = []
    for name in sorted(names):
        remote = _listed(wanted, listing, name)
        path = None if remote.is_large else cached_file(wanted.repo, listing.commit, name)
        sha256 = remote.etag if path is None else store.digest_file(path)
        files.append(PinnedFile(name=name, num_bytes=remote.num_bytes, sha256=sha256))
    return Pin(repo=wanted.repo, commit=listing.commit, weights=weights, files=tuple(files))


def _in_cache(wanted: HubId) -> Pin | None:
    """Return what the cache holds of a name, hashed; None if it lacks the weights or a part of them."""
    commit = cached_commit(wanted)
    if commit is None:
        return None
    names = cached_names(wanted.repo, commit)
    try:
        weights = choose_weights(wanted, names)
    except InputError:
        return None
    needed = [weights, *files_beside(weights, names)]
    if is_index(weights):
        index = cached_file(wanted.repo, commit, weights)
        assert index is not None
        needed += parts_of(index, weights)
    if not set(needed) <= set(names):
        return None
    files = []
    for name in sorted(needed):
        path = cached_file(wanted.repo, commit, name)
        assert path is not None
        files.append(PinnedFile(name=name, num_bytes=store.num_bytes(path), sha256=store.digest_file(path)))
    return Pin(repo=wanted.repo, commit=commit, weights=weights, files=tuple(files))


def _listed(wanted: HubId, listing: Listing, name: str) -> RemoteFile:
    if name not in listing.files:
        raise InputError(
            f"{wanted}: {endpoint()} lacks {name}, which the weights need: give another revision"
        )
    return listing.files[name]


def _unreachable(wanted: HubId, error: Unreachable) -> InputError:
    return InputError(
        f"{wanted}: {error}, and {cache_folder()} does not hold it: check the network, set HF_ENDPOINT to a"
        f" mirror, {_GIVE_PATH}"
    )
