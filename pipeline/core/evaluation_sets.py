"""Evaluation sets of a run: given by `[[evaluation]]` or made by the corpus stage.

A set is a folder in Chinese-CLIP's layout: `<name>_imgs.tsv` (id, base64 image) and `<name>_texts.jsonl`;
or a folder of this project's shards.
"""

from dataclasses import dataclass

from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.records import InputError
from pipeline.core.stage import Context

SUFFIXES = ("_imgs.tsv", "_texts.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSource:
    """`[[evaluation]]`: `<name>_imgs.tsv` and `<name>_texts.jsonl` in a folder, or a folder of shards."""

    name: str
    folder: str


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Where a set lies, and the digests of its files."""

    name: str
    folder: str
    digest: str


def digest_of(source: EvaluationSource) -> str:
    """Digest of a given set's files, of shards their sidecars (which have each image's digest).

    InputError where a file is missing.
    """
    paths = [store.join(source.folder, source.name + suffix) for suffix in SUFFIXES]
    if not any(store.exists(path) for path in paths) and (stems := shard_stems(source.folder)):
        return digest([store.digest_file(f"{stem}.parquet") for stem in stems])
    for path in paths:
        if not store.exists(path):
            raise InputError(
                f"{path}: no such file; [[evaluation]] {source.name} needs {source.name}_imgs.tsv and"
                f" {source.name}_texts.jsonl in its folder, or shards (<name>.tar with <name>.parquet)"
            )
    return ":".join(store.digest_file(path) for path in paths)


def shard_stems(folder: str) -> list[str]:
    """Paths without their ending of the shards directly in a folder: each has a `.tar` and a `.parquet`."""
    names = set(store.list_files(folder))
    stems = sorted(name.removesuffix(".tar") for name in names if name.endswith(".tar"))
    return [store.join(folder, stem) for stem in stems if f"{stem}.parquet" in names]


def facts(made: dict[str, str], given: tuple[EvaluationSource, ...]) -> dict[str, dict[str, str]]:
    """What the corpus stage notes in its receipt: folders of made sets (relative) and of given ones."""
    return {
        "evaluations": made,
        "own_evaluations": {item.name: store.absolute(item.folder) for item in given},
    }


def evaluations_of(context: Context) -> list[EvaluationSet]:
    """The run's evaluation sets in order of their names; `corpus` must be among the stage's parents."""
    corpus = context.parents["corpus"]
    digests = {shard.path: shard.digest for shard in corpus.shards}
    found: dict[str, EvaluationSet] = {}
    for extra in corpus.extra.values():
        for name, folder in extra.get("evaluations", {}).items():
            members = [digests[f"{folder}/{name}{suffix}"] for suffix in SUFFIXES]
            found[name] = EvaluationSet(name, context.path_in("corpus", folder), ":".join(members))
        for name, folder in extra.get("own_evaluations", {}).items():
            source = EvaluationSource(name=name, folder=folder)
            found[name] = EvaluationSet(name, folder, digest_of(source))
    return [found[name] for name in sorted(found)]
