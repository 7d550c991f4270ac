"""Does a locked image tower harm where its own training has never seen images of this kind?

    make pictures                                # the corpus, once
    python benchmarks/training/findings/locking.py        # trains for 270 s; call again to resume

The paper's exception: on MUGE, training without locking was slightly ahead. Here two image towers learn
English names, one of emoji and of icons in three themes, the other only of emoji. From each start two
trainings on Chinese names of both kinds: with the tower locked, and with everything trained. Recall is that
on an emoji style and on a theme that no training has seen. The harm of locking is what the second training
gains.

Small: small-vit, one caption an image, 4 epochs after 6 of English. Every call adds the
finished arms to benchmarks/results/locking.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import dataclasses

from benchmarks.training.arms import OutOfTime, parser, report_arms, train_arms
from benchmarks.training.findings.styles import add_pictures_options, styles_experiment, whole_training
from training.config.job import TrainJob

EMOJI = ("emoji-noto", "emoji-twemoji", "emoji-firefox")
ICONS = ("icons-outline", "icons-solid", "icons-two-tone")
SETS = ("emoji-fluent-flat", "icons-colour")  # styles that no training sees
TOWERS = """
[english]
optimizer = "muon"
peak_learning_rate = 4e-3
image_size_px = 24
ranks = 1
[english.augment]
crop_area = [1.0, 1.0]
crop_aspect = [1.0, 1.0]
horizontal_flip = 0.0
auto_augment = "none"
"""


def main() -> int:
    flags = parser(__doc__, "runs/locking")
    add_pictures_options(flags, epochs=4)
    flags.add_argument("--english-epochs", type=int, default=6, help="of the image towers' own training")
    options = flags.parse_args()
    try:
        seen, unseen = (
            styles_experiment(
                options,
                name,
                train=train,
                evaluate=SETS,
                english_epochs=options.english_epochs,
                tables=TOWERS,
            )
            for name, train in (("seen", EMOJI + ICONS), ("unseen", EMOJI))
        )
    except OutOfTime:
        print("the image towers are not trained yet: rerun the same command to resume")
        return 0
    towers = {"seen": seen.first_job.image_weights, "never seen": unseen.first_job.image_weights}
    arms: dict[tuple[str, int], list[TrainJob]] = {}
    for seed in options.seeds:
        for kind, tower in towers.items():
            for way in ("locked", "not locked"):
                arm = f"{way}, icons {kind}"
                config = whole_training(seen, options.epochs, lock_image=way == "locked")
                leg = seen.leg(arm.replace(", ", "_").replace(" ", "_"), seed, config, tower=True)
                arms[arm, seed] = [dataclasses.replace(leg, image_weights=tower)]
    train_arms(seen, arms)
    report_arms(
        options,
        "locking",
        "mean recall (%) of small-vit with Muon and 24 pixels on an emoji style and a theme of icons never"
        f" seen, after {options.epochs} epochs of Chinese names; image tower from {options.english_epochs}"
        " epochs of English names, with and without icons among its images",
        arms,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
