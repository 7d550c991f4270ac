"""Notes of `cnclip plan` and `cnclip run` on training settings that are out of proportion to the corpus."""

from collections.abc import Iterator, Sequence

from pipeline.core.run import Run, read_manifest
from pipeline.core.stage import Stage
from training.config.train import TrainConfig, count_steps
from training.stages import TrainStageConfig

_FEW_STEPS = 20
# Adam moves a weight by at most the learning rate per step, and a cosine halves the sum. Random weights start
# with sizes of 0.02 to 0.1; if they cannot move by a fraction of that, they learn nothing.
_SHORTEST_WAY = 0.005
_LONGEST_WARMUP = 1 / 3  # of a stage; the paper's are at most an eighth: ViT-H/14, stage 2 (Tables 8 and 9)
_HIGHEST_RATE = 5e-3  # of the learning rate; above it training with Adam usually diverges
_TINY_CORPUS = 18_341  # training images of COCO-CN, the paper's smallest task (Li et al. 2019)
_PAPER_EPOCHS = 64  # the most passes in Tables 8 and 9: stage 1 of ViT-L/14, over 200 million pairs
_ENOUGH_STEPS = 2_000  # as `cnclip init` gives a small corpus at most, from random weights


def proportion_notes(
    config: TrainConfig, num_samples: int, *, starts_at_random: bool = False
) -> Iterator[str]:
    """Yield a line for each setting that does not suit this number of training pairs.

    Passes over a tiny corpus stop helping when the model knows its pairs by heart: recall on other images
    then no longer rises, while every further pass costs as much as the first. The paper found its epochs by
    validation: at most 64 over 200 million pairs, and 18 to 40 over COCO-CN, its smallest task (Tables 8 and
    9). So a note appears for a smaller corpus with more than twice 64 epochs. It does not appear for few
    steps, because a handful of pairs may need many passes, nor with `patience`, which ends the stage when
    recall stops rising.
    """
    batch, epochs, rate = config.global_batch, config.epochs, config.peak_learning_rate
    if batch > num_samples:
        yield (
            f"global_batch = {batch:,} is more than the {num_samples:,} pairs, so it cannot train; lower"
            " global_batch (and lanes, if the file sets it)"
        )
        return
    steps = epochs * num_samples // batch
    if steps < _FEW_STEPS:
        yield (
            f"{steps:,} steps in all (epochs = {epochs:,}, global_batch = {batch:,}, {num_samples:,} pairs)"
            " are few to learn from; raise epochs or lower global_batch"
        )
    if (
        num_samples < _TINY_CORPUS
        and epochs > 2 * _PAPER_EPOCHS
        and steps > _ENOUGH_STEPS
        and not config.patience
    ):
        yield (
            f"epochs = {epochs:,} show each of only {num_samples:,} pairs {epochs:,} times ({steps:,} steps),"
            " long after a model knows so few by heart; lower epochs, to"
            f" {_fewer_epochs(batch, num_samples):,} for example, or set patience = 5 to stop when recall no"
            " longer rises"
        )
    if config.warmup_steps > steps:
        yield (
            f"warmup_steps = {config.warmup_steps:,} is longer than the stage ({steps:,} steps), so the"
            f" learning rate never reaches its peak; lower warmup_steps, to {max(1, steps // 10):,} for"
            " example"
        )
    elif config.warmup_steps > steps * _LONGEST_WARMUP and steps >= _FEW_STEPS:
        yield (
            f"warmup_steps = {config.warmup_steps:,} is more than a third of the {steps:,} steps; lower"
            f" warmup_steps, to {max(1, steps // 10):,} for example"
        )
    if rate > _HIGHEST_RATE:
        yield (
            f"peak_learning_rate = {rate:g} is above {_HIGHEST_RATE:g}, where training usually diverges;"
            " lower peak_learning_rate"
        )
    elif starts_at_random and steps >= _FEW_STEPS and rate * steps / 2 < _SHORTEST_WAY:
        yield (
            f"peak_learning_rate = {rate:g} is low for {steps:,} steps from random weights; raise"
            " peak_learning_rate, to 1e-3 for example, or epochs"
        )


def _fewer_epochs(batch: int, num_samples: int) -> int:
    """Return the epochs that give a tiny corpus enough steps, and at least as many as the paper's longest."""
    return max(_PAPER_EPOCHS, -(-_ENOUGH_STEPS * batch // num_samples))


def notes_on_training(run: Run, stages: Sequence[Stage]) -> list[str]:
    """Return a line for each setting of these training stages that is out of proportion.

    Notes that depend on the number of pairs appear when the shards are finished.
    """
    manifest = read_manifest(run, "shards")
    notes = []
    for stage in stages:
        config = stage.config
        if not isinstance(config, TrainStageConfig):
            continue
        given = (config.start_stage, config.image_stage, config.image_weights, config.start_weights)
        has_image_tower = any(given)
        if config.train.lock_image and not has_image_tower:
            notes.append(
                f"{stage.name}: lock_image = true keeps an image tower of random weights; set [model]"
                " image_weights, or lock_image = false"
            )
        if manifest is not None:
            at_random = not has_image_tower and config.text_weights is None
            found = proportion_notes(config.train, manifest.num_kept, starts_at_random=at_random)
            notes += [f"{stage.name}: {text}" for text in found]
    return notes


def check_batches(run: Run, stages: Sequence[Stage]) -> None:
    """Check that no training stage has a batch, or ranks, larger than the number of pairs in the shards.

    Raises:
        ConfigError: if a stage has.
    """
    manifest = read_manifest(run, "shards")
    for stage in stages:
        if manifest is not None and isinstance(stage.config, TrainStageConfig):
            count_steps(stage.config.train, manifest.num_kept, stage.name)
