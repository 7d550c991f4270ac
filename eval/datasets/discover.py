"""Finds the evaluation sets in a folder or of a run by file names, without reading the files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.datasets.classification import SPLITS, is_classification_set
from eval.datasets.releases import Release, find_releases
from eval.paper.published import classification_protocol, retrieval_protocol
from pipeline.core import store
from pipeline.core.evaluation_sets import SET_ASIDE, sets_of, shard_stems
from pipeline.core.files.image_files import is_hidden
from pipeline.core.records import InputError, Manifest


@dataclass(frozen=True, slots=True)
class RetrievalSource:
    """A set in Chinese-CLIP's layout: the name of its files, their folder, and the protocol it claims."""

    name: str
    folder: str
    protocol: str


@dataclass(frozen=True, slots=True)
class Sources:
    """The sets that an evaluation found."""

    retrieval: tuple[RetrievalSource, ...]
    classification: tuple[str, ...]  # folders
    releases: tuple[Release, ...] = ()  # raw ones, to be converted to Chinese-CLIP's layout first


def find_sets(folder: str) -> Sources:
    """Return the sets in a folder or one level below it, in order of their names.

    `<prefix>_imgs.tsv` with `<prefix>_texts.jsonl` is a retrieval set; its protocol is `<prefix>` if that is
    a protocol's id, otherwise `<folder>-<prefix>` in lower case, so that Chinese-CLIP's `MUGE/valid` and
    `COCO-CN/test` are recognised. A folder of this project's shards is a set with the folder's name.
    `eval.datasets.releases` recognises raw releases and LMDB.

    Raises:
        InputError: if the folder holds no set.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds the evaluation sets")
    retrieval, classification, releases = list[RetrievalSource](), list[str](), list[Release]()
    below = sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name))
    if (
        is_classification_set(folder)
        and not _holds_loose_images(find_releases(folder), root)
        and not any(
            path.name not in (*SPLITS, "train") and is_classification_set(str(path)) for path in below
        )
    ):
        classification.append(folder)
        below = []
    for place in (root, *below):
        releases += find_releases(str(place))
        for images in sorted(place.glob("*_imgs.tsv")):
            prefix = images.name.removesuffix("_imgs.tsv")
            if (place / f"{prefix}_queries.jsonl").is_file():
                continue  # MUGE's raw release
            joined = re.sub(r"[ _]", "-", f"{place.resolve().name}-{prefix}").lower()
            protocol = prefix if retrieval_protocol(prefix) else joined
            retrieval.append(RetrievalSource(prefix, str(place), protocol))
        if shard_stems(str(place)):
            name = place.resolve().name
            retrieval.append(RetrievalSource(name, str(place), name.lower()))
        if (
            place is not root
            and is_classification_set(str(place))
            and not _holds_loose_images(releases, place)
        ):
            classification.append(str(place))
    if not retrieval and not classification and not releases:
        raise InputError(
            f"{folder}: holds no evaluation set: neither <name>_imgs.tsv with <name>_texts.jsonl, nor shards,"
            " nor class folders with images, here or one level below"
        )
    return Sources(tuple(retrieval), tuple(classification), tuple(releases))


def _holds_loose_images(releases: Sequence[Release], place: Path) -> bool:
    """Return whether the images in or below `place` belong to a release and not to classes of a named set."""
    is_theirs = any(item.has_loose_images and Path(item.folder) in (place, place.parent) for item in releases)
    return is_theirs and not (
        (place / "label_cn.txt").is_file() or classification_protocol(place.resolve().name)
    )


def reported_splits(sources: Sources) -> tuple[Sources, list[str]]:
    """Leave out splits that the paper does not report; return the rest, and a line for each omitted set.

    A release contains all its splits, some of which are large or have no pairs. If a set lies next to its
    own LMDB, its files are used.

    Raises:
        InputError: if two sets have the same name, because their results would go into one folder.
    """
    found: list[RetrievalSource | Release] = [*sources.retrieval, *sources.releases]
    reported = {
        item.protocol.rpartition("-")[0]: item.protocol for item in found if retrieval_protocol(item.protocol)
    }
    kept, notes = dict[str, RetrievalSource | Release](), list[str]()
    for item in found:
        family, _, split = item.protocol.rpartition("-")
        taken = reported.get(family, item.protocol)
        if split in ("train", "val", "valid", "test") and taken != item.protocol:
            notes.append(
                f"{item.protocol}: left out, as the paper reports {taken}; put it into a separate folder to"
                " measure it"
            )
        elif (twin := kept.get(item.protocol)) is None:
            kept[item.protocol] = item
        elif isinstance(item, Release) and isinstance(twin, RetrievalSource) and item.folder == twin.folder:
            notes.append(f"{item.protocol}: read from its files, not from the LMDB next to them")
        else:
            raise InputError(
                f"{item.folder}: {item.protocol} lies in {twin.folder} too; give one of them another name"
            )
    remaining = replace(
        sources,
        retrieval=tuple(item for item in kept.values() if isinstance(item, RetrievalSource)),
        releases=tuple(item for item in kept.values() if isinstance(item, Release)),
    )
    return remaining, notes


def sets_of_run(run_folder: str) -> Sources:
    """Return the evaluation sets that a run was given, made or set aside.

    Raises:
        InputError: if there is none, or none yet.
    """
    paths = {name: store.join(run_folder, name, "manifest.json") for name in ("corpus", SET_ASIDE)}
    if not store.exists(paths["corpus"]):
        raise InputError(
            f"{paths['corpus']}: no such file; the run's corpus stage is not done: cnclip run it first"
        )
    manifests = {
        name: Manifest.from_json(store.read_text(path)) for name, path in paths.items() if store.exists(path)
    }
    found = sets_of(manifests, run_folder)
    if not found:
        raise InputError(f"{run_folder}: the run has no evaluation set; name a folder of sets")
    return Sources(tuple(RetrievalSource(name, found[name].folder, name) for name in sorted(found)), ())
