"""Do English captions next to the Chinese ones lower the Chinese scores?

    make pictures                                # the corpus, once
    python benchmarks/training/findings/bilingual.py      # trains for 270 s; call again to resume

All arms see the same images, from random weights and with one vocabulary of both languages. `Chinese` draws
a sample's Chinese caption each time, the others draw the English one for a quarter or for half of the time
(`caption_weights`): in place of Chinese ones, in as many epochs, or besides them, in twice as many, so that
an image is seen with its Chinese caption as often as in `Chinese`. Recall is that of Chinese names on a style
never seen.

Small: small-vit, one caption an image in each language, 8 epochs of three emoji styles. Every call adds
the finished arms to benchmarks/results/bilingual.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from collections.abc import Mapping

from benchmarks.training.arms import OutOfTime, parser, report_arms, train_arms
from benchmarks.training.findings.styles import add_pictures_options, styles_experiment, whole_training
from training.config.job import TrainJob

STYLES = ("emoji-noto", "emoji-twemoji", "emoji-openmoji")
SCORED = ("emoji-fluent-flat",)
HALF = {"caption": 1.0, "caption_en": 1.0}
ARMS: Mapping[str, tuple[Mapping[str, float] | None, int]] = {  # weights, and epochs as multiples of --epochs
    "Chinese": (None, 1),
    "a quarter English": ({"caption": 3.0, "caption_en": 1.0}, 1),
    "half English": (HALF, 1),
    "half English, twice the epochs": (HALF, 2),
}
BOTH = "caption_weights = { caption = 1, caption_en = 1 }\n"  # so that the vocabulary has both languages


def main() -> int:
    flags = parser(__doc__, "runs/bilingual")
    add_pictures_options(flags, epochs=8)
    options = flags.parse_args()
    try:
        experiment = styles_experiment(
            options, "both", train=STYLES, evaluate=SCORED, tables=f"[stage1]\n{BOTH}[stage2]\n{BOTH}"
        )
    except OutOfTime:
        print("the corpus is not packed yet: rerun the same command to resume")
        return 0
    arms: dict[tuple[str, int], list[TrainJob]] = {}
    for seed in options.seeds:
        for name, (weights, times) in ARMS.items():
            config = whole_training(experiment, times * options.epochs, caption_weights=weights)
            leg = name.replace(", ", "_").replace(" ", "_")
            arms[name, seed] = [experiment.leg(leg, seed, config, tower=False)]
    train_arms(experiment, arms)
    report_arms(
        options,
        "bilingual",
        f"mean recall (%) of Chinese names on {SCORED[0]}, small-vit from random weights, 24 pixels and Muon,"
        f" {options.epochs} epochs unless the arm has another number",
        arms,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
