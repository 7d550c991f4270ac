"""Finds missing, truncated and altered files of a finished stage by size or by digest."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from pipeline.core import store
from pipeline.core.files.sealed import seal, unseal
from pipeline.core.records import Shard


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


def find_altered(folder: str, files: Iterable[Shard]) -> Iterator[str]:
    """Yield a line for each file of a stage that is missing or altered, reading them one by one."""
    for file in files:
        path = store.join(folder, file.path)
        if not is_whole(path, file):
            yield f"{path}: not the bytes that were written"


def summarise(damage: Sequence[str]) -> str:
    """Return the first finding and the number of further ones."""
    return damage[0] + (f", and {len(damage) - 1:,} more" if len(damage) > 1 else "")


def is_whole(path: str, file: Shard) -> bool:
    """Return whether a file has the recorded size and digest; this reads all of it."""
    return (
        store.exists(path)
        and store.num_bytes(path) == file.num_bytes
        and store.digest_file(path) == file.digest
    )


def listing_path(receipt: str) -> str:
    """Return the path of the listing of a task's further files, given the path of its receipt."""
    return receipt.removesuffix(".json") + ".files"


def make_listing(folder: str, paths: Iterable[str]) -> str:
    """Return the listing of a task's further files by their paths in the stage's folder."""
    facts: Mapping[str, Sequence[int | str]] = {
        path: [store.num_bytes(full), store.digest_file(full)]
        for path in sorted(paths)
        for full in [store.join(folder, path)]
    }
    return seal({"files": facts})


def read_listing(path: str) -> list[Shard]:
    """Return the files in a task's listing; empty if it has no listing.

    Raises:
        ValueError: if the listing is damaged.
    """
    if not store.exists(path):
        return []
    try:
        files: Mapping[str, tuple[int, str]] = unseal(store.read_bytes(path))["files"]
        return [Shard(name, 0, size, sha256) for name, (size, sha256) in files.items()]
    except (TypeError, KeyError, AttributeError, IsADirectoryError) as error:
        raise ValueError(repr(error)) from None


def listed_files(folder: str) -> list[Shard]:
    """Return the further files of all tasks of a stage.

    Raises:
        ValueError: if a listing is damaged; it names the listing.
    """
    files = []
    receipts = store.join(folder, "receipts")
    for name in store.list_files(receipts):
        if name.endswith(".files"):
            path = store.join(receipts, name)
            try:
                files += read_listing(path)
            except ValueError as error:
                raise ValueError(f"{path}: damaged: {error}") from None
    return files
