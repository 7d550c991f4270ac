"""`cnclip eval`: measure one model on every set under a folder, next to the paper's tables.

It writes into the output folder:

    eval.txt  eval.json  eval.csv  eval.tex  eval.html  card.md   the tables
    <set>/…                                                       features, indices, official files
    submission/<set>.json, submission.zip                         ELEVATER's files for the sets of ICinW
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.datasets.cnclip_tsv import RetrievalSet
from eval.datasets.discover import RetrievalSource, Sources
from eval.datasets.readable import UnreadableImage, readable_subset
from eval.datasets.retrieval_set import read_retrieval_set
from eval.features.encoder import EvaluationEncoder, ModelSource, load_encoder
from eval.features.evaluation_set import embed_evaluation
from eval.features.layout import Side, read_side, vectors_path
from eval.index.flat import build_index
from eval.paper.comparison import Comparison, compare_classification, compare_retrieval
from eval.paper.published import PAPER_MODELS, Setup, mismatch, retrieval_protocol
from eval.paper.render import to_card, to_csv, to_json, to_latex, to_text
from eval.report.page import render_tables
from eval.retrieval.measure import RetrievalResult
from eval.retrieval.official_files import write_features
from eval.retrieval.predictions import retrieve
from eval.zeroshot.classifier import Ensemble, write_submission
from eval.zeroshot.measure import ClassificationResult, evaluate_classification, open_classification
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.files.lock import one_at_a_time
from pipeline.core.records import InputError
from pipeline.core.stage import Show, show_nothing

Say = Callable[[str], None]

_NOT_COMPARABLE = "not comparable"  # in every note that forbids a published figure


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure."""

    setup: Setup = "zero-shot"
    paper_model: str | None = None  # the published row to compare with; unset: that of the model's size
    ensemble: Ensemble = "features"
    templates: str = "own"  # own, general, paper, or a file
    json_features: bool = False  # also write features as CN-CLIP's JSON lines


@one_at_a_time("out_folder")
def evaluate(
    checkpoint: ModelSource,
    sources: Sources,
    out_folder: str,
    options: Options,
    say: Say,
    show: Show = show_nothing,
) -> list[Comparison]:
    """Measure every set and write every file; return the tables.

    `show` draws how far each set is.

    Raises:
        InputError: for an unknown `paper_model`, and from a set's reader or the model.
    """
    encoder = load_encoder(checkpoint)
    store.remove(store.join(out_folder, "submission"))  # of another model perhaps: never mixed
    paper_model = options.paper_model or PAPER_MODELS.get(encoder.name)
    if options.paper_model is not None and options.paper_model not in PAPER_MODELS.values():
        raise InputError(
            f"--as {options.paper_model}: no such row; choose from {', '.join(PAPER_MODELS.values())}"
        )
    # A set that cannot be read ends the work before hours of embedding, not after them.
    classification = {
        folder: open_classification(folder, templates=options.templates) for folder in sources.classification
    }
    tables = []
    written = []
    for release in sources.releases:
        say(f"{release.protocol}: written in Chinese-CLIP's layout")
        folder = store.join(out_folder, "releases")
        release.write(folder)
        written.append(RetrievalSource(release.protocol, folder, release.protocol))
    for source in (*sources.retrieval, *written):
        say(f"{source.protocol}: retrieval")
        shown = _showing(encoder, source.protocol, show)
        tables.append(_retrieval(source, shown, out_folder, options, paper_model))
        for note in tables[-1].notes:
            if _NOT_COMPARABLE in note:
                say(f"note: {note}")
    sets = list[ClassificationResult]()
    for folder, (data, metric) in classification.items():
        name = Path(folder).resolve().name
        say(f"{name}: classification")
        sets.append(
            evaluate_classification(
                _showing(encoder, name, show),
                data,
                metric,
                ensemble=options.ensemble,
                templates=options.templates,
            )
        )
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
        by_elevater={item.name: item.by_elevater for item in sets if item.by_elevater is not None},
    )
    _write(tables, checkpoint, encoder, out_folder, options)
    return tables


def _showing(encoder: EvaluationEncoder, name: str, show: Show) -> EvaluationEncoder:
    """Return the encoder with bars that have a set's name."""
    return replace(encoder, show=lambda label, unit: show(f"{name}: {unit}s", unit))


def _retrieval(
    source: RetrievalSource,
    encoder: EvaluationEncoder,
    out_folder: str,
    options: Options,
    paper_model: str | None,
) -> Comparison:
    evaluation = read_retrieval_set(source.folder, source.name)
    folder = store.join(out_folder, source.protocol)
    unreadable = list[str]()
    try:
        embed_evaluation(encoder, evaluation, folder)
    except UnreadableImage:
        evaluation, note = readable_subset(evaluation, encoder.base.decode)
        unreadable.append(note)
        embed_evaluation(encoder, evaluation, folder)
    sides: tuple[tuple[Side, str, Int64Array], ...] = (
        ("image", "imgs.img", evaluation.image_ids),
        ("text", "texts.txt", evaluation.text_ids),
    )
    for side, middle, ids in sides:
        if options.json_features:
            path = store.join(folder, f"{source.name}_{middle}_feat.jsonl")
            write_features(path, f"{side}_id", ids, read_side(folder, side))
        build_index(vectors_path(folder, side), store.join(folder, f"{side}.index"))
    result = retrieve(evaluation, folder, folder, folder)
    return compare_set(
        evaluation,
        source.protocol,
        result,
        setup=options.setup,
        model=encoder.name,
        paper_model=paper_model,
        notes=unreadable,
    )


def compare_set(
    evaluation: RetrievalSet,
    protocol_id: str,
    result: RetrievalResult,
    *,
    setup: Setup,
    model: str,
    paper_model: str | None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare a set's recalls with its table of the paper.

    A set whose counts are not the protocol's, or whose id is no protocol's, has no published figure next to
    it.
    """
    protocol = retrieval_protocol(protocol_id)
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
        result.intervals(),
        protocol=None if differs else protocol_id,
        setup=setup,
        model=model,
        paper_model=paper_model,
        notes=remarks,
    )


def _write(
    tables: Sequence[Comparison],
    checkpoint: ModelSource,
    encoder: EvaluationEncoder,
    out_folder: str,
    options: Options,
) -> None:
    facts: dict[str, Any] = {
        "model": encoder.name,
        "checkpoint": checkpoint.origin or checkpoint.path,
        "checkpoint_sha256": store.digest_tree(checkpoint.path),
        "setup": options.setup,
        "context_length": checkpoint.context_length,
        "ensemble": options.ensemble,
        "templates": options.templates,
        "decode": checkpoint.decode,
        "precision": checkpoint.precision,
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
