"""Train stage 2 of the demo with negation statements and without: do they teach negation?

    python benchmarks/training/negation.py   # trains for 270 s; call again to resume
    python benchmarks/training/negation.py --seconds 1500   # in one go

Both arms start from one stage-1 model and see the same samples with each seed; one has
`[stage2.negation] objects` = the demo's eight shapes. The questions are about the evaluation's images, whose
combinations were in no training image. For every shape that an image's text names and every one that it
does not, the model chooses between "there is no <absent>" and "there is no <shown>", and likewise between
"there is <shown>" and "there is <absent>". Wordings are the templates of the training and one that it never
had. Chance is 50%. The report also has recall of the ordinary texts. The demo learns its vocabulary from its
captions, which never negate: characters of negation are unknown tokens to it, all alike.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dataclasses
import json
from typing import Any

import numpy as np
import torch

from benchmarks.training.arms import (
    Experiment,
    OutOfTime,
    curve,
    header,
    is_finished,
    mean_and_spread,
    parser,
    train_arms,
    write_report,
)
from data_prep.corpora.demo_scenes import SHAPES
from eval.datasets.cnclip_tsv import read_evaluation
from training.config.job import TrainJob
from training.config.train import NegationConfig
from training.encoder import load

NEGATION = NegationConfig(objects=tuple(SHAPES))
WORDINGS = {
    "negated": ("图中没有{}", "没有{}"),
    "negated, new wording": ("这幅画里看不到{}",),
    "affirmed": ("图中有{}", "有{}"),
}


def main() -> int:
    flags = parser(__doc__, "runs/negation")
    flags.add_argument("--epochs", type=int, default=6, help="of stage 2")
    flags.add_argument("--english-epochs", type=int, default=12, help="of the image tower's own training")
    flags.add_argument("--stage1-epochs", type=int, default=6, help="of stage 1")
    options = flags.parse_args()
    run_folder = str(options.folder).rstrip("/") + "_run"
    try:
        overrides = [f"english.epochs={options.english_epochs}", f"stage1.epochs={options.stage1_epochs}"]
        experiment = Experiment(options, "demo", overrides, run_folder, last="stage1", first="stage2")
    except OutOfTime:
        print("the first stage is not trained yet: rerun the same command to resume")
        return 0
    assert experiment.config.stage2 is not None
    config = dataclasses.replace(
        experiment.config.stage2, epochs=options.epochs, validate_every_steps=10**6, save_every_steps=25
    )
    start = experiment.first_job.start_checkpoint
    legs: dict[tuple[str, int], TrainJob] = {}
    for seed in options.seeds:
        for name, negation in (("without", None), ("with", NEGATION)):
            leg = experiment.leg(name, seed, dataclasses.replace(config, negation=negation), tower=False)
            legs[name, seed] = dataclasses.replace(leg, start_checkpoint=start)
    train_arms(experiment, {arm: [leg] for arm, leg in legs.items()})

    rows: dict[str, dict[str, list[float]]] = {}
    for (name, _), leg in legs.items():
        if is_finished(leg):
            for key, value in measured(leg).items():
                rows.setdefault(name, {}).setdefault(key, []).append(round(value, 2))
    if start is not None:
        rows["stage 1"] = {
            key: [round(value, 2)] for key, value in questions(start, legs["with", options.seeds[0]]).items()
        }
    for name, values in rows.items():
        print(f"{name:<8}" + "".join(f"  {key} {mean_and_spread(value)}" for key, value in values.items()))
    report = {
        **header(),
        "what": f"percent of questions answered rightly, and mean recall, after {options.epochs} epochs of"
        f" stage 2 of the demo with and without negation statements, by seed; chance is 50; before it"
        f" {options.english_epochs} epochs of English names and {options.stage1_epochs} of stage 1",
        "rows": rows,
    }
    print(json.dumps(report, ensure_ascii=False))
    if all(map(is_finished, legs.values())):
        write_report(options.results / "negation.json", report)
    return 0


def measured(leg: TrainJob) -> dict[str, float]:
    """Return a finished arm's answers and its recall."""
    recall: dict[int, Any] = dict(curve(leg))
    return {**questions(leg.output_model, leg), "mean recall": float(recall[max(recall)]["mean_recall"])}


def questions(model: str, job: TrainJob) -> dict[str, float]:
    """Return percent of right answers by wording, over all images, shown and absent shapes."""
    torch.set_num_threads(1)
    encoder = load(model, vocabulary=job.vocabulary)
    ((name, folder),) = job.evaluations.items()
    evaluation = read_evaluation(folder, name)
    image_ND = encoder.embed_images(list(evaluation.image_bytes(range(evaluation.num_images))))
    shown_NO = np.zeros((evaluation.num_images, len(SHAPES)), dtype=bool)
    for text, rows in zip(evaluation.texts, evaluation.images_of_text, strict=True):
        shown_NO[rows] |= np.array([shape in text for shape in SHAPES])
    found = {}
    for wording, templates in WORDINGS.items():
        right = []
        for template in templates:
            text_OD = encoder.embed_texts([template.format(shape) for shape in SHAPES])
            cosine_NO = image_ND @ text_OD.T
            asked_NSA = shown_NO[:, :, None] & ~shown_NO[:, None, :]
            shown_wins_NSA = cosine_NO[:, :, None] > cosine_NO[:, None, :]
            true_NSA = shown_wins_NSA if wording == "affirmed" else ~shown_wins_NSA
            right.append(100 * true_NSA[asked_NSA].mean())
        found[wording] = float(np.mean(right))
    return found


if __name__ == "__main__":
    sys.exit(main())
