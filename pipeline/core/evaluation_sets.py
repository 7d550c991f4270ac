"""Evaluation sets of a run: given by `[[evaluation]]`, made by the corpus stage, or set aside by `[split]`.

A set is a folder in Chinese-CLIP's layout: `<name>_imgs.tsv` (id, base64 image) and `<name>_texts.jsonl`;
or a folder of this project's shards.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Any

from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.records import InputError, Manifest
from pipeline.core.shard_format import MAX_IMAGE_BASE64_BYTES, SIDECAR, TAR, num_rows
from pipeline.core.stage import Context

FEWEST_ITEMS = 10  # images and texts of a set; recall at 10 of fewer is meaningless
_MOST_LINE_BYTES = MAX_IMAGE_BASE64_BYTES + 1024
SUFFIXES = ("_imgs.tsv", "_texts.jsonl")
SET_ASIDE = "validation"  # the stage that packs the rows of [split], and the name of its set
# Words in a name that denote a part of a set, not a set.
_SPLITS = frozenset({"mr", "train", "val", "valid", "validation", "dev", "test"})


def is_scored_image_to_text(name: str, folder: str = "") -> bool:
    """Return whether a set's mean recall covers both directions; MUGE's covers only text-to-image (Table 2).

    A set is MUGE's if its name contains MUGE, such as `muge-valid`, or if its name is a split and its
    folder's name contains MUGE, as in Chinese-CLIP's `MUGE/valid`.
    """
    words = _words(name)
    if words <= _SPLITS:
        words |= _words(PurePath(folder).name)
    return "muge" not in words


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+", name.lower()))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSource:
    """An evaluation set: `<name>_imgs.tsv` and `<name>_texts.jsonl` in a folder, or a folder of shards."""

    name: str
    """Name of the set, and of its files `<name>_imgs.tsv` and `<name>_texts.jsonl`."""
    folder: str
    """Folder of those files, or a folder of shards."""


@dataclass(frozen=True)
class EvaluationSet:
    """A set's name and folder; the digest is computed on first use, because that reads the files."""

    name: str
    folder: str
    known_digest: str | None = field(default=None, compare=False)  # for a set that a stage of the run made

    @property
    def scored_by(self) -> dict[str, str]:
        """Return the additional task inputs of stages whose output depends on the scored directions.

        Empty for both directions, so that older finished stages stay up to date.
        """
        if is_scored_image_to_text(self.name, self.folder):
            return {}
        return {f"directions of {self.name}": "text-to-image"}

    @cached_property
    def digest(self) -> str:
        """Return the digest of the set's files.

        Raises:
            InputError: if a file is missing.
        """
        if self.known_digest is not None:
            return self.known_digest
        return digest_of(EvaluationSource(name=self.name, folder=self.folder))


@dataclass(frozen=True, slots=True)
class EvaluationFacts:
    """The evaluation sets that the corpus stage records in its receipts."""

    made: Mapping[str, str]  # name → folder, relative to the corpus stage's
    given: Mapping[str, str]  # name → absolute folder

    @classmethod
    def of(cls, made: Mapping[str, str], given: Iterable[EvaluationSource]) -> "EvaluationFacts":
        """Record sets that the corpus stage made (folders relative to its own) and sets of the run."""
        return cls(made, {item.name: store.absolute(item.folder) for item in given})

    def to_json(self) -> dict[str, dict[str, str]]:
        """Return the facts under their keys in the receipt."""
        return {"evaluations": dict(self.made), "own_evaluations": dict(self.given)}

    @classmethod
    def from_json(cls, extra: Mapping[str, Any]) -> "EvaluationFacts":
        """Read the facts from a receipt's extra; a receipt without them names no set."""
        return cls(extra.get("evaluations", {}), extra.get("own_evaluations", {}))

    @classmethod
    def all_of(cls, corpus: Manifest) -> "Iterator[EvaluationFacts]":
        """Yield the facts of each of the corpus stage's tasks."""
        return map(cls.from_json, corpus.extra.values())


def digest_of(source: EvaluationSource) -> str:
    """Return the digest of a set's files; for shards, that of the sidecars, which have each image's digest.

    Raises:
        InputError: if a file is missing or empty.
    """
    paths = [store.join(source.folder, source.name + suffix) for suffix in SUFFIXES]
    if not any(store.exists(path) for path in paths) and (stems := shard_stems(source.folder)):
        return digest([store.digest_file(stem + SIDECAR) for stem in stems])
    for path in paths:
        if not store.exists(path):
            raise InputError(
                f"{path}: no such file; [[evaluation]] {source.name} needs {source.name}_imgs.tsv and"
                f" {source.name}_texts.jsonl in its folder, or shards (<name>.tar with <name>.parquet)"
            )
        if not store.num_bytes(path):
            raise InputError(
                f"{path}: empty; give [[evaluation]] {source.name} images and texts, or leave it out"
            )
    return ":".join(store.digest_file(path) for path in paths)


def check_size(source: EvaluationSource | EvaluationSet) -> None:
    """Refuse a set that cannot be scored before training begins, reading as little as possible.

    Raises:
        InputError: if it has fewer images than FEWEST_ITEMS, or texts if it is scored image-to-text.
    """
    kinds = ("images", "texts") if is_scored_image_to_text(source.name, source.folder) else ("images",)
    for kind, suffix in zip(kinds, SUFFIXES, strict=False):
        path = store.join(source.folder, source.name + suffix)
        if store.exists(path):
            count = _first_lines(path)
        elif stems := shard_stems(source.folder):
            path, count = source.folder, sum(num_rows(stem + SIDECAR) for stem in stems)
        else:
            continue  # `digest_of` reports what is missing
        if count < FEWEST_ITEMS:
            remedy = "give [[evaluation]] " + source.name
            if isinstance(source, EvaluationSet):  # of [split]: the run's own table names the others
                remedy = "raise [split] share or count, to set aside"
            raise InputError(
                f"{path}: {count} {kind} are too few for recall at {FEWEST_ITEMS}; {remedy}"
                f" at least {FEWEST_ITEMS} {kind}"
            )


def _first_lines(path: str) -> int:
    """Count the non-empty lines of a file, up to FEWEST_ITEMS."""
    count = 0
    with store.open_read(path) as file:
        while count < FEWEST_ITEMS and (line := file.readline(_MOST_LINE_BYTES)):
            count += bool(line.strip())
    return count


def shard_stems(folder: str) -> list[str]:
    """Return the paths, without their ending, of the folder's shards: each has a `.tar` and a `.parquet`."""
    names = set(store.list_files(folder))
    stems = sorted(name.removesuffix(TAR) for name in names if name.endswith(TAR))
    return [store.join(folder, stem) for stem in stems if stem + SIDECAR in names]


def evaluations_of(context: Context) -> list[EvaluationSet]:
    """Return the run's evaluation sets by name; `corpus` must be one of the stage's parents.

    A run that names no set is measured on the rows that [split] sets aside, if `validation` is a parent.
    """
    found = sets_of(context.parents, context.run_folder)
    return [found[name] for name in sorted(found)]


def evaluation_named(context: Context, name: str) -> EvaluationSet:
    """Return the run's evaluation set of that name, without reading its files.

    Raises:
        InputError: if the corpus has no such set.
    """
    found = sets_of(context.parents, context.run_folder)
    if name not in found:
        raise InputError(f"{name}: the corpus has no such evaluation set; it has {', '.join(sorted(found))}")
    return found[name]


def sets_of(manifests: Mapping[str, Manifest], run_folder: str) -> dict[str, EvaluationSet]:
    """Return a run's evaluation sets by name, from the manifests of `corpus` and of SET_ASIDE, if any."""
    corpus = manifests["corpus"]
    digests = {shard.path: shard.digest for shard in corpus.shards}
    found: dict[str, EvaluationSet] = {}
    for noted in EvaluationFacts.all_of(corpus):
        for name, folder in noted.made.items():
            members = [digests.get(f"{folder}/{name}{suffix}", "") for suffix in SUFFIXES]
            known = ":".join(members) if all(members) else None
            found[name] = EvaluationSet(name, store.join(run_folder, "corpus", folder), known)
        for name, folder in noted.given.items():
            found[name] = EvaluationSet(name, folder)
    if not found and (packed := manifests.get(SET_ASIDE)) is not None:
        whole = digest({shard.path: shard.digest for shard in packed.shards})
        found[SET_ASIDE] = EvaluationSet(SET_ASIDE, store.join(run_folder, SET_ASIDE), whole)
    return found
