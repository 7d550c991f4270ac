"""What a name of weights stood for when it was looked up: the commit, and the digests of the files.

A run keeps its pins in `weights.json` of its folder. So its stages stay done without a network, a name that
moves on at the hub changes nothing in them, and other bytes under the same commit are noticed.
No heavy imports here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.core import store
from pipeline.core.config import build
from pipeline.core.files.sealed import seal, unseal
from pipeline.core.records import ConfigError, InputError

_FILE = "weights.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedFile:
    """A file of a model with its digest."""

    name: str  # within the model's repository
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """The files of a model at a commit that are read together."""

    repo: str
    commit: str
    weights: str  # name of the file that is opened; its index if the weights are in several files
    files: tuple[PinnedFile, ...]  # in order of their names

    @property
    def digest(self) -> str:
        """sha256, hex, of the files' names and digests: what `store.digest_tree` gives of a folder."""
        listing = "".join(f"{file.name}\0{file.sha256}\n" for file in self.files)
        return store.digest_bytes(listing.encode("utf-8"))

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def sha256_of(self, name: str) -> str | None:
        """Return the digest of one of the files; None if the model has no such file."""
        return next((file.sha256 for file in self.files if file.name == name), None)

    def __str__(self) -> str:
        """Return the id of exactly these weights, which every place that takes weights reads."""
        return f"{self.repo}@{self.commit}:{self.weights}"


def pins_path(run_folder: str) -> str:
    """Return the path of the file in which a run keeps its pins."""
    return store.join(run_folder, _FILE)


def read_pins(run_folder: str) -> dict[str, Pin]:
    """Return a run's pins by the texts in its configuration.

    Raises:
        InputError: if the file is damaged.
    """
    path = pins_path(run_folder)
    if not store.exists(path):
        return {}
    try:
        fields = unseal(store.read_bytes(path))
        return {text: build(Pin, fields[text], path) for text in fields}
    except (ValueError, TypeError, ConfigError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it, and the names are looked up again") from None


def write_pins(run_folder: str, pins: Mapping[str, Pin]) -> None:
    """Write a run's pins."""
    store.write_text(
        pins_path(run_folder), seal({text: dataclasses.asdict(pin) for text, pin in sorted(pins.items())})
    )
