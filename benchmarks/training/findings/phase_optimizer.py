"""Should a phase keep the optimizer's moments of the phase before it, or begin with none?

    make pictures                                     # the corpus, once
    python benchmarks/training/findings/phase_optimizer.py   # trains for 270 s; call again to resume

All arms of a seed continue from one training on images of half the side and train with whole ones: with new
moments, as a stage's phases do, or with those of the training before, with a warm-up and without. Kept
moments are of the step before the last; those of position embeddings, whose number changes, begin at 0.
Recall is that on an emoji style never seen.

Small: small-vit, one caption an image, 6 + 2 epochs of three emoji styles. Every call adds the finished
arms to benchmarks/results/phase_optimizer.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import dataclasses

import torch

from benchmarks.training.arms import OutOfTime, is_finished, parser, report_arms, train_arms
from benchmarks.training.findings.styles import add_pictures_options, styles_experiment, whole_training
from training.checkpoint import checkpoint
from training.checkpoint.folders import checkpoints_folder, steps_in
from training.config.job import TrainJob
from training.config.train import count_steps
from training.model.tokenizer import Tokenizer
from training.pretrain import build_model, describe

STYLES = ("emoji-noto", "emoji-twemoji", "emoji-openmoji")
SCORED = ("emoji-fluent-flat",)
LAST_EPOCHS = 2
ARMS = {
    f"{moments}, {warmup}": (moments == "kept", steps)
    for moments in ("new", "kept")
    for warmup, steps in (("warm-up", 50), ("no warm-up", 0))
}


def main() -> int:
    flags = parser(__doc__, "runs/phase_optimizer")
    add_pictures_options(flags, epochs=6)
    options = flags.parse_args()
    try:
        experiment = styles_experiment(options, "styles", train=STYLES, evaluate=SCORED)
    except OutOfTime:
        print("the corpus is not packed yet: rerun the same command to resume")
        return 0
    arms: dict[tuple[str, int], list[TrainJob]] = {}
    for seed in options.seeds:
        first = whole_training(experiment, options.epochs)
        samples = sum(shard.num_samples for shard in experiment.first_job.shards)
        last_step = count_steps(first, samples, "the first phase")
        first = dataclasses.replace(first, save_every_steps=last_step - 1)
        before = experiment.leg("first", seed, first, tower=False)
        for name, (is_kept, warmup_steps) in ARMS.items():
            config = whole_training(experiment, LAST_EPOCHS, image_size_px=None, warmup_steps=warmup_steps)
            leg = experiment.leg(
                name.replace(", ", "_").replace(" ", "_"), seed, config, tower=False, start=before
            )
            arms[name, seed] = [before, leg]
            if not train_arms(experiment, {("first", seed): [before]}):
                return 0
            if is_kept and not is_finished(leg):
                keep_moments(before, leg)
    train_arms(experiment, arms)
    report_arms(
        options,
        "phase_optimizer",
        f"mean recall (%) on {SCORED[0]} of small-vit from random weights, {options.epochs} epochs of"
        f" images of half the side and {LAST_EPOCHS} of whole ones, with Muon",
        arms,
    )
    return 0


def keep_moments(before: TrainJob, leg: TrainJob) -> None:
    """Give a training that has no checkpoint one of step 0, with the moments of the one before it."""
    root = checkpoints_folder(leg.folder)
    if steps_in(root):
        return
    tokenizer = Tokenizer.load(leg.vocabulary)
    model = build_model(leg, tokenizer)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    earlier = checkpoints_folder(before.folder)
    state = checkpoint.load(checkpoint.at_step(earlier, max(steps_in(earlier))))
    moments = {
        name: value
        if value.shape == (now := weights[name.partition(".")[2]]).shape
        else torch.zeros_like(now)
        for name, value in state.moments.items()
    }
    kept = checkpoint.TrainState(0, weights, moments, state.num_updates)
    checkpoint.save(root, kept, describe(leg, model, tokenizer), b"", keep=1)


if __name__ == "__main__":
    sys.exit(main())
