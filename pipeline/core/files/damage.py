"""Finds missing and truncated files of a finished stage; listings of files that no receipt names.

`pipeline.executors.checks` also reads the files.
"""

import concurrent.futures
from collections.abc import Iterable, Mapping, Sequence

from pipeline.core import store
from pipeline.core.files.sealed import seal, unseal
from pipeline.core.records import Shard

LISTING = ".files"  # suffix of the listing of a task's further files
_READERS = 64  # listings read at once


class ListedSizes:
    """The sizes of a folder's files; each folder below it is listed once, when it is first asked for."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._sizes: dict[str, dict[str, int]] = {}

    def of(self, path: str) -> int | None:
        """Return the size of a file by its path in the folder; None if there is no such file."""
        place, _, name = path.rpartition("/")
        if place not in self._sizes:
            self._sizes[place] = store.sizes(store.join(self._folder, place) if place else self._folder)
        return self._sizes[place].get(name)


def find_damage(folder: str, files: Iterable[Shard]) -> list[str]:
    """Return a line for each file of a stage's folder that is missing or has another size; reads no data."""
    sizes = ListedSizes(folder)
    damage = []
    for file in files:
        found = sizes.of(file.path)
        if found != file.num_bytes:
            size = "missing" if found is None else f"{found:,} bytes"
            damage.append(f"{store.join(folder, file.path)}: {size}, not {file.num_bytes:,} bytes")
    return damage


def summarise(damage: Sequence[str]) -> str:
    """Return the first finding and the number of further ones."""
    return damage[0] + (f", and {len(damage) - 1:,} more" if len(damage) > 1 else "")


def listing_path(receipt: str) -> str:
    """Return the path of the listing of a task's further files, given the path of its receipt."""
    return receipt.removesuffix(".json") + LISTING


def make_listing(folder: str, paths: Iterable[str]) -> str:
    """Return the listing of a task's further files by their paths in the stage's folder."""
    facts: Mapping[str, Sequence[int | str]] = {
        path: [store.num_bytes(full), store.digest_file(full)]
        for path in sorted(paths)
        for full in [store.join(folder, path)]
    }
    return seal({"files": facts})


def parse_listing(data: bytes) -> list[Shard]:
    """Return the files in a task's listing.

    Raises:
        ValueError: if the listing is damaged.
    """
    try:
        files: Mapping[str, tuple[int, str]] = unseal(data)["files"]
        return [Shard(name, 0, size, sha256) for name, (size, sha256) in files.items()]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(repr(error)) from None


def read_listings(receipts: str) -> dict[str, bytes]:
    """Return what the listings in a folder of receipts hold, by name; many are read at once."""
    names = [name for name in store.list_files(receipts) if name.endswith(LISTING)]
    paths = [store.join(receipts, name) for name in names]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(names, pool.map(store.read_bytes, paths), strict=True))


def listed_files(folder: str) -> list[Shard]:
    """Return the further files of all tasks of a stage.

    Raises:
        ValueError: if a listing is damaged; it names the listing.
    """
    files = []
    receipts = store.join(folder, "receipts")
    for name, data in read_listings(receipts).items():
        try:
            files += parse_listing(data)
        except ValueError as error:
            raise ValueError(f"{store.join(receipts, name)}: damaged: {error}") from None
    return files
