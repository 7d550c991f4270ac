"""Does balancing by concepts lift the rare ones?

    make pictures                                # the corpus, once
    python benchmarks/training/findings/balancing.py      # trains for 270 s; call again to resume

Concepts are emoji that exist in six styles. In `zipf` the r-th has HEAD images up to rank HEAD_RANKS and
then fewer, as 1/r, down to one; `capped` is the same corpus through [concepts] and [balance] with cap = 2;
`uniform` has as many pairs as `zipf`, equally many for each concept. All train from random weights, for
about the same number of samples. Recall is that on a style never seen, of concepts with one image in `zipf`
(`rare`), with HEAD images (`frequent`), and of those between (`middle`); each set is searched by itself.

Small: small-vit, one caption an image, 12 epochs of `zipf`. Every call adds the
finished arms to benchmarks/results/balancing.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import json
from collections import defaultdict
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.training.arms import Experiment, OutOfTime, parser, report_arms, train_arms
from benchmarks.training.findings.styles import add_pictures_options, styles_experiment, whole_training
from data_prep.corpora.emoji import UNSCORED_CATEGORY
from training.config.job import TrainJob

STYLES = ("emoji-noto", "emoji-twemoji", "emoji-openmoji", "emoji-openmoji-lines", "emoji-two", "emoji-one")
SCORED = "emoji-fluent-flat"
HEAD, HEAD_RANKS, CAP = 6, 100, 2


def main() -> int:
    flags = parser(__doc__, "runs/balancing")
    add_pictures_options(flags, epochs=12)
    options = flags.parse_args()
    folder = Path(options.folder)
    sizes = write_corpora(Path(options.corpus), folder)
    entries = json.dumps(str(folder / "concepts.txt"))
    balanced = f"[concepts]\nfiles = [{entries}]\nmin_characters = 1\n[balance]\ncap = {CAP}\n"
    experiments: dict[str, Experiment] = {}
    try:
        for arm, corpus, tables in (
            ("zipf", "zipf", ""),
            ("capped", "zipf", balanced),
            ("uniform",) * 2 + ("",),
        ):
            experiments[arm] = styles_experiment(
                options,
                arm,
                train=sorted(path.stem for path in (folder / corpus).glob("emoji-*.parquet")),
                evaluate=("rare", "middle", "frequent"),
                corpus=str(folder / corpus),
                tables=tables,
            )
    except OutOfTime:
        print("the corpora are not packed yet: rerun the same command to resume")
        return 0
    pairs = {
        arm: sum(shard.num_samples for shard in experiment.first_job.shards)
        for arm, experiment in experiments.items()
    }
    arms: dict[tuple[str, int], list[TrainJob]] = {}
    for seed in options.seeds:
        for arm, experiment in experiments.items():
            epochs = max(1, round(options.epochs * pairs["zipf"] / pairs[arm]))
            config = whole_training(experiment, epochs)
            arms[arm, seed] = [experiment.leg(arm, seed, config, tower=False)]
    train_arms(experiments["zipf"], arms)
    report_arms(
        options,
        "balancing",
        "mean recall (%) of small-vit from random weights, 24 pixels and Muon, on an emoji style never seen,"
        f" by how many images a concept has in `zipf`: one (rare), {HEAD} (frequent) or between; all see the"
        f" samples of {options.epochs} epochs of `zipf`",
        arms,
        pairs=pairs,
        concepts=sizes,
    )
    return 0


def write_corpora(corpus: Path, out: Path) -> dict[str, int]:
    """Write the folders `zipf` and `uniform`, each with the sets to score, and the list of concepts.

    Returns the number of concepts in each set.
    """
    tables = {style: pq.read_table(corpus / f"{style}.parquet") for style in (*STYLES, SCORED)}
    rows: dict[str, list[tuple[str, int]]] = defaultdict(list)  # of each concept: style and row
    for style in STYLES:
        seen = set()
        for row, (name, category) in enumerate(_names(tables[style])):
            if category != UNSCORED_CATEGORY and name not in seen:
                rows[name].append((style, row))
                seen.add(name)
    scored = [name for name, _ in _names(tables[SCORED])]
    concepts = sorted(name for name in set(scored) if len(rows[name]) == len(STYLES))
    Random("ranks").shuffle(concepts)
    count = {
        name: max(1, min(HEAD, round(HEAD * HEAD_RANKS / rank)))
        for rank, name in enumerate(concepts, start=1)
    }
    total = sum(count.values())
    share = {
        name: total * (rank + 1) // len(concepts) - total * rank // len(concepts)
        for rank, name in enumerate(concepts)
    }
    bands = {
        "rare": {name for name in concepts if count[name] == 1},
        "middle": {name for name in concepts if 1 < count[name] < HEAD},
        "frequent": {name for name in concepts if count[name] == HEAD},
    }
    if empty := [band for band, names in bands.items() if not names]:
        raise SystemExit(
            f"{corpus}: {len(concepts)} concepts in all styles, none of them {empty[0]}: build it whole"
        )
    for folder, wanted in (("zipf", count), ("uniform", share)):
        chosen: dict[str, list[int]] = defaultdict(list)
        for name, number in wanted.items():
            for style, row in Random(name).sample(rows[name], number):
                chosen[style].append(row)
        (out / folder).mkdir(parents=True, exist_ok=True)
        for style, numbers in chosen.items():
            pq.write_table(tables[style].take(pa.array(sorted(numbers))), out / folder / f"{style}.parquet")
        for band, names in bands.items():
            numbers = [row for row, name in enumerate(scored) if name in names]
            pq.write_table(tables[SCORED].take(pa.array(numbers)), out / folder / f"{band}.parquet")
    (out / "concepts.txt").write_text("".join(f"{name}\n" for name in sorted(concepts)), encoding="utf-8")
    return {band: len(names) for band, names in bands.items()}


def _names(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["name_zh"].to_pylist(), table["category_en"].to_pylist(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
