"""Train stage 1 of the emoji run on K cached views of each image, against a new view at every visit.

    python benchmarks/training/cached_views.py   # trains for 270 s; call again to resume
    python benchmarks/training/cached_views.py --seconds 3000   # in one go

Every arm starts from one English image tower and trains only the text tower, with the recipe's settings; only
K and the seed (order of samples, views, new weights) differ. The table has final recall on images of a
vendor that was not trained on. When all arms are done it is written to benchmarks/results.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dataclasses
import json

import numpy as np

from benchmarks.training.arms import (
    OutOfTime,
    add_emoji_options,
    curve,
    emoji_experiment,
    header,
    is_finished,
    mean_and_spread,
    parser,
    seconds_of,
    train_arms,
    write_report,
)

VIEWS = (0, 8, 4, 1)  # 0: live


def main() -> int:
    flags = parser(__doc__, "runs/cached_views")
    add_emoji_options(flags)
    flags.add_argument("--epochs", type=int, default=12, help="of stage 1")
    options = flags.parse_args()
    try:
        experiment = emoji_experiment(options)
    except OutOfTime:
        print("the image tower is not trained yet: rerun the same command to resume")
        return 0
    assert experiment.config.stage1 is not None
    config = dataclasses.replace(
        experiment.config.stage1, epochs=options.epochs, validate_every_steps=10**6, save_every_steps=50
    )
    legs = {
        (views, seed): experiment.leg(
            f"views{views}", seed, dataclasses.replace(config, cached_views=views), tower=True
        )
        for seed in options.seeds
        for views in VIEWS
    }
    done = train_arms(experiment, {arm: [leg] for arm, leg in legs.items()})

    rows = []
    for views in VIEWS:
        own = [legs[views, seed] for seed in options.seeds if is_finished(legs[views, seed])]
        if not own:
            continue
        last = [list(curve(leg).values())[-1] for leg in own]
        found = {key: [float(recall["t2i"][key]) for recall in last] for key in ("r1", "r5", "r10")}
        found["mean_recall"] = [float(recall["mean_recall"]) for recall in last]
        rows.append(
            {
                "views": views or "live",
                "seeds": len(own),
                **found,
                "seconds": [round(seconds_of(leg)) for leg in own],
            }
        )
        print(
            f"K = {views or 'live':<5} {len(own)} seeds:"
            + "".join(f"  {key} {mean_and_spread(values)}" for key, values in found.items())
            + f"  {np.mean([seconds_of(leg) for leg in own]):.0f} s"
        )
    report = {
        **header(),
        "what": "final text-to-image recall and mean recall of both directions in percent, by seed,"
        f" after {options.epochs} epochs of stage 1; image tower: {options.english_epochs} of English names",
        "rows": rows,
    }
    print(json.dumps(report))
    if done:
        write_report(options.results / "cached_views.json", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
