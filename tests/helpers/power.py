"""What the disk may hold after a power cut: every moment of some work, and what each may have lost.

A file system owes nothing for what was not synced. Here bytes that nobody synced are lost or cut, and a name
in a folder is there, gone or still of the file before, each name for itself, until the folder is synced.
"""

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.files import durability

LOSSES = ("lost", "emptied", "cut", "mixed")
_DRAWS = 3  # of what a mixed loss takes and leaves
Tree = Mapping[str, bytes | None]  # path → bytes; None: a folder
# Calls after which the disk may be in another state; what is written in between shows at the next one.
_CALLS = ("fsync", "rename", "replace", "remove", "unlink", "mkdir", "rmdir")


@dataclass(frozen=True, slots=True)
class DiskState:
    """What may be on the disk after a power cut."""

    moment: int
    before: str  # the call that the cut came before
    loss: str  # one of LOSSES
    tree: Tree

    def write(self, root: Path) -> None:
        """Put it into a folder in place of what is there."""
        shutil.rmtree(root, ignore_errors=True)
        for path, data in sorted(self.tree.items()):
            if data is None:
                (root / path).mkdir(parents=True, exist_ok=True)
            else:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(data)


class PowerRecorder:
    """Watches the calls that change a folder; `states` are what power cuts between them may leave."""

    def __init__(self, root: Path) -> None:
        self.states: list[DiskState] = []
        self.moment = 0
        self._root = root
        self._is_on_disk = False  # the root's own name
        # By the number of a folder or file, which a renaming does not change: what is on disk of it.
        self._listings: dict[int, _Listing] = {}
        self._synced: dict[int, bytes] = {}
        self._held: dict[int, int] = {}  # opened, so that no number is used for another file
        self._seen: set[bytes] = set()

    def record(self, work: Callable[[], object]) -> None:
        """Do some work and note the states of every moment; nothing is really synced."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            patch.setattr(durability, "_sync_file_system", self._sync_all)
            work()
        self._look("the end")
        for descriptor in self._held.values():
            os.close(descriptor)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            target = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else arguments[0]
            self._look(f"{name} {target}")
            return self._sync(Path(target)) if name == "fsync" else call(*arguments, **options)

        return watched

    def _sync(self, place: Path) -> None:
        if place == self._root.parent:
            self._is_on_disk = True
        elif place == self._root or self._root in place.parents:
            number = place.stat().st_ino
            if number not in self._held:
                self._held[number] = os.open(place, os.O_RDONLY)
            if place.is_dir():
                self._listings[number] = _list(place)
            else:
                self._synced[number] = place.read_bytes()

    def _sync_all(self, folder: str) -> None:
        for place in (self._root.parent, self._root, *self._root.rglob("*")):
            self._sync(place)

    def _look(self, before: str) -> None:
        if self._root.is_dir():
            places = [self._root, *self._root.rglob("*")]
            listings = {place.stat().st_ino: _list(place) for place in places if place.is_dir()}
            data = {place.stat().st_ino: place.read_bytes() for place in places if place.is_file()}
            for number, loss in enumerate((*LOSSES, *("mixed" for _ in range(_DRAWS - 1)))):
                draw = random.Random(f"{self.moment}/{number}")
                tree = dict(self._below(self._root.stat().st_ino, "", loss, listings, data, draw))
                mark = hashlib.sha256(repr(sorted(tree.items())).encode()).digest()
                if mark not in self._seen:
                    self._seen.add(mark)
                    self.states.append(DiskState(self.moment, before, loss, tree))
        self.moment += 1

    def _below(
        self,
        folder: int,
        path: str,
        loss: str,
        listings: Mapping[int, "_Listing"],
        data: Mapping[int, bytes],
        draw: random.Random,
    ) -> Iterator[tuple[str, bytes | None]]:
        now, on_disk = listings.get(folder, {}), self._listings.get(folder, {})
        if (
            path == ""
            and not self._is_on_disk
            and (loss == "lost" or (loss == "mixed" and draw.random() < 0.5))
        ):
            return
        for name in sorted(now.keys() | on_disk.keys()):
            is_lost = loss == "lost" or (loss == "mixed" and draw.random() < 0.5)
            found = (on_disk if is_lost else now).get(name)
            if found is None:
                continue
            number, is_folder = found
            place = f"{path}{name}"
            if is_folder:
                yield place, None
                yield from self._below(number, f"{place}/", loss, listings, data, draw)
                continue
            safe = self._synced.get(number, b"")
            whole = data.get(number, safe)
            how = draw.choice(("emptied", "cut", "whole")) if loss == "mixed" else loss
            cut = whole[: (len(safe) + len(whole)) // 2]
            yield place, {"lost": safe, "emptied": safe, "cut": cut, "whole": whole}[how]


_Listing = Mapping[str, tuple[int, bool]]  # name → number of the file or folder, whether it is a folder


def _list(folder: Path) -> _Listing:
    return {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(folder)}
