"""Which words should a shortened caption keep: the first, nouns before verbs and adjectives, or random ones?

    python benchmarks/training/findings/caption_cut.py   # trains for 270 s; call again to resume

The demo's captions are sentences. All arms start from one English image tower and train a phase with
captions of 8 tokens, cut at the `end`, by `words` or at `random` (`caption_cut`), and then two epochs with
whole captions; `whole` has whole captions in both, `none` only the two epochs. Recall is that after the last
epoch, with whole captions, on combinations never seen.

Small: the demo's 3,000 images and its tiny-rn, 4 + 2 epochs. Every call adds the finished arms to
benchmarks/results/caption_cut.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from typing import Any

from benchmarks.training.arms import Experiment, OutOfTime, parser, report_arms, train_arms
from benchmarks.training.findings.styles import whole_training
from training.config.job import TrainJob

LAST_EPOCHS = 2  # with whole captions
TOKENS = 8  # of a caption in the first phase, [CLS] and [SEP] among them
ARMS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "whole": {},
    **{cut: {"context_length": TOKENS, "caption_cut": cut} for cut in ("end", "words", "random")},
}


def main() -> int:
    flags = parser(__doc__, "runs/caption_cut")
    flags.add_argument(
        "--epochs", type=int, default=4, help="with short captions; two with whole ones follow"
    )
    flags.add_argument("--english-epochs", type=int, default=6, help="of the image tower's own training")
    options = flags.parse_args()
    try:
        overrides = [f"english.epochs={options.english_epochs}"]
        folder = str(options.folder).rstrip("/") + "_run"
        experiment = Experiment(options, "demo", overrides, folder, last="english", first="stage1")
    except OutOfTime:
        print("the image tower is not trained yet: rerun the same command to resume")
        return 0
    assert experiment.config.stage1 is not None
    recipe = {
        "peak_learning_rate": experiment.config.stage1.peak_learning_rate,
        "exclude_duplicates": True,  # many captions are equal once they are cut
    }
    arms: dict[tuple[str, int], list[TrainJob]] = {}
    for seed in options.seeds:
        for name, changes in ARMS.items():
            whole = whole_training(experiment, LAST_EPOCHS, recipe=recipe, warmup_steps=5)
            if changes is None:
                arms[name, seed] = [experiment.leg(name, seed, whole, tower=True)]
                continue
            first = whole_training(experiment, options.epochs, recipe=recipe, **changes)
            short = experiment.leg(f"{name}_1", seed, first, tower=True)
            last = experiment.leg(f"{name}_2", seed, whole, tower=False, start=short)
            arms[name, seed] = [short, last]
    train_arms(experiment, arms)
    report_arms(
        options,
        "caption_cut",
        f"mean recall (%) of the demo with whole captions, after {options.epochs} epochs with captions of"
        f" {TOKENS} tokens (whole ones in `whole`, no such epochs in `none`) and {LAST_EPOCHS} with whole"
        f" ones; image tower from {options.english_epochs} epochs of English names",
        arms,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
