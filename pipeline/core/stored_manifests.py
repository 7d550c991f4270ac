"""The manifests of a stage's parents as its tasks in other processes see them: read where they are asked for.

A manifest names every file of its stage, some 12 MB for the 86,000 files of 200 million images. Sent along
with each of 28,600 tasks, these would be 340 GB to pack and unpack; most tasks look at none of them.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

from pipeline.core import store
from pipeline.core.records import InputError, Manifest
from pipeline.core.stage import Context

_MOST_READ = 4  # manifests that a process keeps


class StoredManifests(Mapping[str, Manifest]):
    """Manifests by stage, each read once in a process; what travels is the folder and a digest of each."""

    def __init__(self, run_folder: str, digests: Mapping[str, str]) -> None:
        """Take stage → sha256 of its manifest's file."""
        self._run_folder, self._digests = run_folder, dict(digests)

    def __getitem__(self, stage: str) -> Manifest:
        return _read(_path(self._run_folder, stage), self._digests[stage])

    def __contains__(self, stage: object) -> bool:
        return stage in self._digests

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)


def without_manifests(context: Context) -> Context:
    """Return a context to send to other processes: it has some hundred bytes, whatever the parents have."""
    digests = {
        stage: store.digest_bytes(store.read_bytes(_path(context.run_folder, stage)))
        for stage in context.parents
    }
    return dataclasses.replace(context, parents=StoredManifests(context.run_folder, digests))


def _path(run_folder: str, stage: str) -> str:
    return store.join(run_folder, stage, "manifest.json")


@functools.lru_cache(maxsize=_MOST_READ)
def _read(path: str, digest: str) -> Manifest:
    data = store.read_bytes(path)
    if store.digest_bytes(data) != digest:
        raise InputError(f"{path}: changed while a stage was reading it; rerun the same command to resume")
    return Manifest.from_json(data)
