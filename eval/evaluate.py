"""`cnclip eval`: every set under a folder with one model, and the paper's tables beside it.

Written into the output folder:

    eval.txt  eval.json  eval.csv  eval.tex  eval.html  card.md   the tables
    <set>/…                                                       features, indices, official files
    submission/<set>.json, submission.zip                         ELEVATER's files for the sets of ICinW
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.datasets.classification import SPLITS, is_classification_set
from eval.datasets.cnclip_tsv import RetrievalSet
from eval.datasets.readable import UnreadableImage, readable_subset
from eval.datasets.releases import Release, find_releases
from eval.datasets.retrieval_set import read_retrieval_set
from eval.features.encoder import EvaluationEncoder, ModelSource, load_encoder
from eval.features.evaluation_set import embed_evaluation
from eval.index.flat import EMBEDDING_FOLDERS, build_index, read_vectors
from eval.metrics.bootstrap import Measured, recall_intervals
from eval.metrics.recall import Positives, ranks_from_features
from eval.paper.comparison import (
    Comparison,
    compare_classification,
    compare_retrieval,
    to_card,
    to_csv,
    to_json,
    to_latex,
    to_text,
)
from eval.paper.published import PAPER_MODELS, Setup, classification_protocol, mismatch, retrieval_protocol
from eval.report.page import render_tables
from eval.retrieval.official_files import write_features
from eval.retrieval.predictions import retrieve
from eval.zeroshot.classifier import Ensemble, write_submission
from eval.zeroshot.measure import MeasuredSet, measure_set
from pipeline.core import store
from pipeline.core.evaluation_sets import EvaluationFacts, shard_stems
from pipeline.core.records import InputError, Manifest

Say = Callable[[str], None]

_NOT_COMPARABLE = "not comparable"  # in every note that forbids a published figure


@dataclass(frozen=True, slots=True)
class RetrievalSource:
    """A set in Chinese-CLIP's layout: its files' name, their folder, and the protocol that it claims."""

    name: str
    folder: str
    protocol: str


@dataclass(frozen=True, slots=True)
class Sources:
    """What an evaluation found to measure."""

    retrieval: tuple[RetrievalSource, ...]
    classification: tuple[str, ...]  # folders
    releases: tuple[Release, ...] = ()  # raw ones, to be written in Chinese-CLIP's layout first


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure."""

    setup: Setup = "zero-shot"
    paper_model: str | None = None  # the published row to stand beside; unset: that of the model's size
    ensemble: Ensemble = "features"
    templates: str = "own"  # own, general, or a file
    json_features: bool = False  # also write features as CN-CLIP's JSON lines


def find_sets(folder: str) -> Sources:
    """Sets in a folder or one level below it, in order of their names.

    `<prefix>_imgs.tsv` with `<prefix>_texts.jsonl` is a retrieval set; its protocol is `<prefix>` where that
    is a protocol's id, else `<folder>-<prefix>` in lower case, so that Chinese-CLIP's own `MUGE/valid` and
    `COCO-CN/test` are recognised. A folder of this project's shards is one of the folder's name. Raw releases
    and LMDB are recognised by `eval.datasets.releases`.

    Raises InputError where there is nothing.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds the evaluation sets")
    retrieval, classification, releases = list[RetrievalSource](), list[str](), list[Release]()
    below = sorted(path for path in root.iterdir() if path.is_dir())
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
    """Are the images at or below `place` files of a release, and not classes of a set with names?"""
    is_theirs = any(item.has_loose_images and Path(item.folder) in (place, place.parent) for item in releases)
    return is_theirs and not (
        (place / "label_cn.txt").is_file() or classification_protocol(place.resolve().name)
    )


def reported_splits(sources: Sources) -> tuple[Sources, list[str]]:
    """Without the other splits of sets of which the paper reports one, and a line for each set left out.

    An owner's release comes with all its splits, of which some are large, some without pairs. Of a set that
    lies beside its own LMDB the files are taken. Raises InputError for two sets of the same name: their
    results would go into one folder.
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
                f"{item.protocol}: left out, as the paper reports {taken}; put it into a folder of its own to"
                " measure it"
            )
        elif (twin := kept.get(item.protocol)) is None:
            kept[item.protocol] = item
        elif isinstance(item, Release) and isinstance(twin, RetrievalSource) and item.folder == twin.folder:
            notes.append(f"{item.protocol}: read from its files, not from the LMDB beside them")
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
    """The evaluation sets that a run was given or made itself."""
    path = store.join(run_folder, "corpus", "manifest.json")
    if not store.exists(path):
        raise InputError(f"{path}: no such file; the run's corpus stage is not done: cnclip run it first")
    found = dict[str, str]()
    for noted in EvaluationFacts.all_of(Manifest.from_json(store.read_text(path))):
        found |= {name: store.join(run_folder, "corpus", folder) for name, folder in noted.made.items()}
        found |= noted.given
    return Sources(tuple(RetrievalSource(name, found[name], name) for name in sorted(found)), ())


def evaluate(
    checkpoint: ModelSource, sources: Sources, out_folder: str, options: Options, say: Say
) -> list[Comparison]:
    """Measure every set and write every file; returns the tables.

    Raises InputError for unknown `paper_model`, and whatever a set's reader or the model raises.
    """
    encoder = load_encoder(checkpoint)
    store.remove(store.join(out_folder, "submission"))  # of another model perhaps: never mixed
    paper_model = options.paper_model or PAPER_MODELS.get(encoder.name)
    if options.paper_model is not None and options.paper_model not in PAPER_MODELS.values():
        raise InputError(
            f"--as {options.paper_model}: no such row; choose from {', '.join(PAPER_MODELS.values())}"
        )
    tables = []
    written = []
    for release in sources.releases:
        say(f"{release.protocol}: written in Chinese-CLIP's layout")
        folder = store.join(out_folder, "releases")
        release.write(folder)
        written.append(RetrievalSource(release.protocol, folder, release.protocol))
    for source in (*sources.retrieval, *written):
        say(f"{source.protocol}: retrieval")
        tables.append(_retrieval(source, checkpoint, encoder.name, out_folder, options, paper_model))
        for note in tables[-1].notes:
            if _NOT_COMPARABLE in note:
                say(f"note: {note}")
    sets = list[MeasuredSet]()
    for folder in sources.classification:
        say(f"{Path(folder).resolve().name}: classification")
        sets.append(measure_set(folder, encoder, ensemble=options.ensemble, templates=options.templates))
        if sets[-1].submission is not None:
            path = store.join(out_folder, "submission", f"{sets[-1].name}.json")
            store.write_text(path, json.dumps(sets[-1].submission))
            sets[-1] = replace(sets[-1], submission=None)  # tens of megabytes each
    tables += compare_classification(
        {item.name: item.measured for item in sets},
        model=encoder.name,
        paper_model=paper_model,
        notes={item.name: item.notes for item in sets},
        differing=[item.name for item in sets if item.differs],
    )
    _write(tables, checkpoint, encoder, out_folder, options)
    return tables


def _retrieval(
    source: RetrievalSource,
    checkpoint: ModelSource,
    model: str,
    out_folder: str,
    options: Options,
    paper_model: str | None,
) -> Comparison:
    evaluation = read_retrieval_set(source.folder, source.name)
    protocol = retrieval_protocol(source.protocol)
    both = protocol is None or protocol.image_to_text
    folder = store.join(out_folder, source.protocol)
    embed = partial(
        embed_evaluation,
        checkpoint.path,
        checkpoint.vocabulary,
        out_folder=folder,
        context_length=checkpoint.context_length,
    )
    unreadable = list[str]()
    try:
        embed(evaluation)
    except UnreadableImage:
        evaluation, note = readable_subset(evaluation)
        unreadable.append(note)
        embed(evaluation)
    if options.json_features:
        for side, ids in (("img", evaluation.image_ids), ("text", evaluation.text_ids)):
            long, short = {"img": ("imgs", "img"), "text": ("texts", "txt")}[side]
            path = store.join(folder, f"{source.name}_{long}.{short}_feat.jsonl")
            vectors_ND = read_vectors(store.join(folder, f"{side}_emb", f"{side}_emb_0.npy"))
            write_features(path, "image_id" if side == "img" else "text_id", ids, vectors_ND)
    for side, name in EMBEDDING_FOLDERS.items():
        build_index(store.join(folder, name, f"{name}_0.npy"), store.join(folder, f"{side}.index"))
    retrieve(evaluation, folder, folder, folder, image_to_text=both)
    return compare_set(
        evaluation,
        source.protocol,
        folder,
        setup=options.setup,
        model=model,
        paper_model=paper_model,
        notes=unreadable,
    )


def compare_set(
    evaluation: RetrievalSet,
    protocol_id: str,
    folder: str,
    *,
    setup: Setup,
    model: str,
    paper_model: str | None,
    notes: Sequence[str] = (),
) -> Comparison:
    """A set's recalls with intervals beside its table of the paper, from the features in `folder`.

    Counts that are not the protocol's, and ids that are no protocol's, are not compared.
    """
    protocol = retrieval_protocol(protocol_id)
    both = protocol is None or protocol.image_to_text
    scores = retrieval_intervals(evaluation, folder, image_to_text=both)
    remarks = list(notes)
    if protocol is not None:
        counts = (
            ("images", protocol.images, evaluation.num_images),
            ("texts", protocol.texts, evaluation.num_texts),
        )
        remarks += [
            note for what, pinned, found in counts if (note := mismatch(protocol.id, what, pinned, found))
        ]
        if protocol.images is None:
            remarks.append(
                f"{protocol.id}: the paper prints no counts, so {evaluation.num_images} images and"
                f" {evaluation.num_texts} texts are unchecked"
            )
    differs = protocol is None or any(_NOT_COMPARABLE in note for note in remarks)
    return compare_retrieval(
        protocol_id,
        scores,
        protocol=None if differs else protocol_id,
        setup=setup,
        model=model,
        paper_model=paper_model,
        notes=remarks,
    )


def retrieval_intervals(evaluation: RetrievalSet, folder: str, *, image_to_text: bool) -> dict[str, Measured]:
    """Recalls with intervals from the features that `embed_evaluation` wrote into `folder`."""
    image_ND, text_ND = (
        read_vectors(store.join(folder, name, f"{name}_0.npy")) for name in ("img_emb", "text_emb")
    )
    t2i = ranks_from_features(text_ND, image_ND, Positives.of(evaluation.images_of_text))
    i2t = None
    if image_to_text:
        texts_of_image = evaluation.texts_of_image
        named = np.flatnonzero([len(rows) > 0 for rows in texts_of_image])
        i2t = ranks_from_features(
            image_ND[named], text_ND, Positives.of([texts_of_image[row] for row in named])
        )
    return recall_intervals(t2i, i2t)


def _write(
    tables: Sequence[Comparison],
    checkpoint: ModelSource,
    encoder: EvaluationEncoder,
    out_folder: str,
    options: Options,
) -> None:
    facts: dict[str, Any] = {
        "model": encoder.name,
        "checkpoint": checkpoint.path,
        "checkpoint_sha256": store.digest_tree(checkpoint.path),
        "setup": options.setup,
        "context_length": checkpoint.context_length,
        "ensemble": options.ensemble,
        "templates": options.templates,
        "published": "Chinese CLIP, arXiv 2211.01335v3",
    }
    for name, text in (
        ("eval.txt", to_text(tables) + "\n"),
        ("eval.json", to_json(tables, facts)),
        ("eval.csv", to_csv(tables)),
        ("eval.tex", to_latex(tables)),
        ("card.md", to_card(tables, facts)),
        ("eval.html", render_tables(tables, {name: str(value) for name, value in facts.items()})),
    ):
        store.write_text(store.join(out_folder, name), text)
    folder = store.join(out_folder, "submission")
    records = [
        json.loads(store.read_text(store.join(folder, name)))
        for name in store.list_files(folder)
        if name.endswith(".json")
    ]
    if records:
        write_submission(store.join(out_folder, "submission.zip"), records)
