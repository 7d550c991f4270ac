"""Does a filter's own accuracy predict that of the model trained on what it keeps (DFN, Fang et al. 2023)?

    make pictures                                   # the corpus, once
    python benchmarks/training/findings/filter_strength.py   # trains for 270 s; call again to resume

Filters are models that learned two emoji styles for FILTER_EPOCHS. The pool is four other styles, in which
half of the images have another image's name. Each filter scores the pool ([score]) and keeps its better
half ([filter_score]); a model is trained on that from random weights, and for comparison on the whole pool
and on only the good pairs, all for about the same number of samples. The report has each filter's recall
on a style never seen, its accuracy on the planted pairs, and the trained model's recall on that style.

Small: small-vit, one caption an image, 10 epochs of half of the pool. Every call adds
the finished arms to benchmarks/results/filter_strength.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import argparse
import json
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.training.arms import Experiment, OutOfTime, is_finished, parser, report_arms, train_arms
from benchmarks.training.findings.styles import add_pictures_options, styles_experiment, whole_training
from pipeline.core.shard_format import read_sidecar, sidecar_of
from pipeline.law.grid import recalls_at_the_end
from training.config.job import TrainJob

FILTER_STYLES = ("emoji-noto", "emoji-twemoji")
POOL = ("emoji-openmoji", "emoji-openmoji-lines", "emoji-two", "emoji-one")
SCORED = ("emoji-fluent-flat",)
FILTER_EPOCHS = (2, 5, 12)
CAPTIONS = ("name_zh", "keywords_zh", "name_en", "keywords_en")  # what a bad pair has from another image


def main() -> int:
    flags = parser(__doc__, "runs/filter_strength")
    add_pictures_options(flags, epochs=10)
    options = flags.parse_args()
    truth = write_pool(Path(options.corpus), Path(options.folder))
    try:
        # An exchanged name would be a positive of all images that have it.
        apart = {"several_positives": False, "exclude_duplicates": True}
        judges = styles_experiment(options, "judges", train=FILTER_STYLES, evaluate=SCORED)
        filters = {
            f"filter of {epochs} epochs": judges.leg(
                f"filter_{epochs}", 0, whole_training(judges, epochs, **apart), tower=False
            )
            for epochs in FILTER_EPOCHS
        }
        for job in filters.values():
            judges.train(job)
        kept = {
            "all pairs": experiment_on(options, "pool"),
            "good pairs": experiment_on(options, "good"),
            **{name: experiment_on(options, "pool", job) for name, job in filters.items()},
        }
    except OutOfTime:
        print(
            "the filters are not trained yet, or their corpora not packed: rerun the same command to resume"
        )
        return 0
    pairs = {
        name: sum(shard.num_samples for shard in experiment.first_job.shards)
        for name, experiment in kept.items()
    }
    arms: dict[tuple[str, int], list[TrainJob]] = {}
    for seed in options.seeds:
        for name, experiment in kept.items():
            epochs = max(1, round(options.epochs * pairs["all pairs"] / 2 / pairs[name]))
            leg = experiment.leg(
                name.replace(" ", "_"), seed, whole_training(experiment, epochs, **apart), tower=False
            )
            arms[name, seed] = [leg]
    train_arms(judges, arms)
    report_arms(
        options,
        "filter_strength",
        f"mean recall (%) on {SCORED[0]} of small-vit from random weights, 24 pixels and Muon, trained on"
        " what a filter keeps of a pool with half of the names exchanged; all see the samples of"
        f" {options.epochs} epochs of half of the pool",
        arms,
        filters={
            name: {"recall": recalls_at_the_end(job.folder)[SCORED[0]], **accuracy(kept[name], truth)}
            for name, job in filters.items()
            if is_finished(job)
        },
        pairs=pairs,
    )
    return 0


def write_pool(corpus: Path, out: Path) -> set[tuple[str, str]]:
    """Write the folders `pool` and `good`; return style and number of the images with another one's name."""
    bad: set[tuple[str, str]] = set()
    for folder in ("pool", "good"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for style in POOL:
        table = pq.read_table(corpus / f"{style}.parquet")
        order = Random(style).sample(range(table.num_rows), table.num_rows)
        exchanged = order[: table.num_rows // 2]
        source = list(range(table.num_rows))
        for row, other in zip(exchanged, exchanged[1:] + exchanged[:1], strict=True):
            source[row] = other  # a cycle: nobody keeps its own
        names = table["name_zh"].to_pylist()
        is_bad = [names[row] != names[other] for row, other in enumerate(source)]
        bad |= {(style, f"{row:05d}") for row, found in enumerate(is_bad) if found}
        shown = table
        for column in CAPTIONS:
            index = table.schema.get_field_index(column)
            shown = shown.set_column(index, table.field(index), table[column].take(pa.array(source)))
        pq.write_table(shown, out / "pool" / f"{style}.parquet")
        pq.write_table(table.take(pa.array([r for r, found in enumerate(is_bad) if not found])),
                       out / "good" / f"{style}.parquet")  # fmt: skip
    for style in SCORED:
        for folder in ("pool", "good"):
            pq.write_table(pq.read_table(corpus / f"{style}.parquet"), out / folder / f"{style}.parquet")
    return bad


def experiment_on(options: argparse.Namespace, corpus: str, judge: TrainJob | None = None) -> Experiment:
    """Return a run on the pool or its good pairs; with a judge, on the half that it likes best."""
    tables = ""
    if judge is not None:
        model, vocabulary = json.dumps(judge.output_model), json.dumps(judge.vocabulary)
        tables = f'[score]\nmodel = {model}\nvocabulary = {vocabulary}\nrows = "all"\n'
        tables += "[filter_score]\ndrop_share = 0.5\n"
    return styles_experiment(
        options,
        corpus if judge is None else f"kept_by_{Path(judge.folder).name}",
        train=POOL,
        evaluate=SCORED,
        corpus=str(Path(options.folder) / corpus),
        tables=tables,
    )


def accuracy(experiment: Experiment, bad: set[tuple[str, str]]) -> dict[str, Any]:
    """Return the share of good pairs among those that a filter kept, in percent, and how many it kept."""
    urls = [
        str(url)
        for shard in experiment.first_job.shards
        for url in read_sidecar(sidecar_of(shard.path), ["url"])["url"].to_pylist()
    ]
    is_good = [(url.split("/")[-2], Path(url).stem) not in bad for url in urls]
    return {"good among kept": round(100 * sum(is_good) / len(is_good), 2), "kept": len(is_good)}


if __name__ == "__main__":
    sys.exit(main())
