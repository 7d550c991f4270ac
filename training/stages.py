"""The training stages of a run: one task each, run by DeepSpeed's launcher in separate processes."""

import functools
import os
import sys
from dataclasses import dataclass, field, replace

from pipeline.core import store
from pipeline.core.config import NOT_IN_DIGEST
from pipeline.core.evaluation_sets import SET_ASIDE, check_size, evaluations_of
from pipeline.core.processes import say
from pipeline.core.records import ConfigError, InputError
from pipeline.core.stage import Change, Context, Outcome, Progress, Stage, Task
from pipeline.core.terminal import inform, one_line
from training.checkpoint.finished import is_finished
from training.checkpoint.folders import checkpoints_folder, steps_in
from training.checkpoint.object_store import finish, prepare, send_log, work_folder
from training.config.job import TrainJob
from training.config.tracking import TrackingConfig
from training.config.train import CONTEXT_LENGTH, TrainConfig, count_steps, shared_steps
from training.ranks.launcher import (
    Launcher,
    failure,
    free_port,
    launcher_command,
    launcher_environment,
    watch,
)
from training.tracking import check_packages
from training.weights.hub.locate import digest_of, pinned_id
from training.weights.hub.names import find_id

MODEL_FILE = "model.safetensors"
OPENAI_FILE = "openai.pt"
METRICS_FILE = "metrics.jsonl"
_JOB_FILE = "job.json"
_WEIGHTS = ("image_weights", "text_weights", "start_weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStageConfig:
    """A training stage with what it starts from."""

    train: TrainConfig
    model: str  # key of training.model.config.MODELS
    vocabulary: str | None = None  # given by path or model id; unset: the vocabulary stage's
    start_stage: str | None = None  # stage whose weights it continues with
    image_stage: str | None = None  # stage whose OpenAI-layout file gives the image tower
    image_weights: str | None = None  # weights that give the image tower (training/weights/formats.py)
    text_weights: str | None = None  # weights that give the text tower
    start_weights: str | None = None  # a whole Chinese CLIP to continue from
    save_openai: bool = False  # write the OpenAI-layout file too, for the stage that starts from it
    validate: bool = True  # zero-shot recall on the run's evaluation sets while training
    launcher: Launcher = field(default="local", metadata=NOT_IN_DIGEST)  # who starts the ranks
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=NOT_IN_DIGEST)


def check_given_files(config: TrainStageConfig, stage: str) -> None:
    """Check that the weights that a training stage is given are there, or names that a hub may know.

    Raises:
        InputError: if one is neither.
    """
    for label, text in given_weights(config).items():
        key = f"[{stage}.distil] teacher" if label == "teacher" else f"[model] {label.replace(' ', '_')}"
        try:
            is_there = find_id(text) is not None or store.exists(text)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        if not is_there:
            raise InputError(f"{text}: no such file or folder; correct {key}")


def given_weights(config: TrainStageConfig) -> dict[str, str]:
    """Return the weights that come from outside the run, by label: paths, or names that a hub knows."""
    given = {side.replace("_", " "): getattr(config, side) for side in _WEIGHTS}
    if config.train.distil is not None:
        given["teacher"] = config.train.distil.teacher
    return {label: text for label, text in given.items() if text is not None}


def plan(config: TrainStageConfig, context: Context) -> list[Task]:
    """Return one task: a training run reads every shard."""
    inputs = {shard.path: shard.digest for shard in context.parents["shards"].shards}
    if config.vocabulary is None:
        inputs |= {f"vocabulary {shard.path}": shard.digest for shard in context.parents["vocabulary"].shards}
    for stage, name in ((config.start_stage, MODEL_FILE), (config.image_stage, OPENAI_FILE)):
        if stage is not None:
            inputs |= {f"{stage} {name}": shard.digest for shard in context.shards_of(stage, name)}
    check_given_files(config, context.stage)
    for label, text in given_weights(config).items():
        inputs[label] = digest_of(context.run_folder, text)
    if config.train.deepspeed.endswith(".json"):  # the shipped files stay as they are
        inputs["deepspeed"] = store.digest_tree(config.train.deepspeed)
    if config.validate:
        train = config.train
        for item in evaluations_of(context):
            inputs[f"evaluation {item.name}"] = item.digest
            # The directions count only if the set's recall decides.
            if train.ends_by_recall and (not train.choose_on or item.name in train.choose_on):
                inputs |= item.scored_by
    return [Task("train", inputs)]


def continues(config: TrainStageConfig, context: Context, change: Change, is_done: bool) -> tuple[bool, str]:
    """Return whether a stage resumes exactly under other `epochs`, and from where or why not.

    The learning rate after the warm-up follows a cosine over all steps, so that only a checkpoint of the
    warm-up is also one of a training with the new epochs.
    """
    if is_done and change.now < change.before:
        return False, "fewer epochs are another training"
    shared = shared_steps(config.train)
    found = [step for step in steps_in(checkpoints_folder(context.path())) if step > 0]
    if not found and not is_done:
        return True, "starts over, since there is no checkpoint yet"
    steps = [step for step in found if step <= shared]
    if not steps:
        return (
            False,
            "the cosine over all epochs shapes what follows the warm-up, and no checkpoint is of that",
        )
    last = max(steps)
    return (
        True,
        f"resumes from step {last}, the last that both schedules share; then a cosine over all epochs",
    )


def begun_with(config: TrainStageConfig, context: Context) -> tuple[TrainStageConfig, int] | None:
    """Return the configuration and the seed of the job that was started last in a stage's folder, if any."""
    path = context.path(_JOB_FILE)
    try:
        job = TrainJob.from_json(store.read_text(path), path)
    except (OSError, ValueError, ConfigError):
        return None
    return replace(config, train=job.config), job.seed


def make_job(config: TrainStageConfig, context: Context) -> TrainJob:
    """Return the job of the ranks."""
    train = config.train

    folder = work_folder(context.path(), train.cache_folder)

    def bound(text: str | None) -> str | None:
        return None if text is None else pinned_id(context.run_folder, text)

    if train.distil is not None:
        train = replace(
            train, distil=replace(train.distil, teacher=pinned_id(context.run_folder, train.distil.teacher))
        )
    image_weights = bound(config.image_weights)
    if config.image_stage is not None:
        image_weights = context.path_in(config.image_stage, OPENAI_FILE)
    return TrainJob(
        stage=context.stage,
        model=config.model,
        seed=context.seed,
        shards=tuple(context.shards_of("shards", ".tar")),
        vocabulary=config.vocabulary or context.path_in("vocabulary", f"{train.caption_column}.txt"),
        image_weights=image_weights,
        text_weights=bound(config.text_weights),
        start_weights=bound(config.start_weights),
        start_checkpoint=context.path_in(config.start_stage, MODEL_FILE) if config.start_stage else None,
        config=train,
        evaluations={item.name: item.folder for item in evaluations_of(context)} if config.validate else {},
        folder=folder,
        output_model=store.join(folder, MODEL_FILE),
        tracking=config.tracking,
        openai_model=store.join(folder, OPENAI_FILE) if config.save_openai else None,
        store_folder=None if store.is_local(context.path()) else context.path(),
    )


def check(config: TrainStageConfig, context: Context) -> None:
    """Check that the corpus is large enough and in the right place, and the trackers are installed.

    Raises:
        ConfigError: if it has fewer samples than a batch or than ranks, a package is missing, or features are
            to be cached next to shards in an object store.
        InputError: if too few images are set aside to be scored.
    """
    check_packages(config.tracking)
    for item in evaluations_of(context) if config.validate and SET_ASIDE in context.parents else ():
        check_size(item)  # how many images [split] sets aside is known only now
    shards = context.shards_of("shards", ".tar")
    if config.train.cached_views and shards and not store.is_local(shards[0].path):
        raise ConfigError(
            f"[{context.stage}] cached_views = {config.train.cached_views}, but the shards are in an object"
            f" store ({context.path_in('shards')}): features lie next to their shards and are read by memory"
            " map; set cached_views = 0, or copy the run to a disk that all machines share and set run.folder"
        )
    count_steps(config.train, sum(shard.num_samples for shard in shards), context.stage)


def run(config: TrainStageConfig, context: Context, task: Task, progress: Progress, entry: str) -> Outcome:
    """Launch the ranks and wait; `entry` is the module each rank runs with the job's path.

    A run that was stopped resumes from its newest checkpoint; one that torchrun or deepspeed has finished
    without us is taken as it is.

    Raises:
        InputError: with the end of the log, if a rank fails.
    """
    check(config, context)  # before any process starts
    folder = prepare(context.path(), config.train.cache_folder)
    job = make_job(config, context)
    num_samples = sum(shard.num_samples for shard in job.shards)
    if not is_finished(job):
        job_path = context.path(_JOB_FILE)
        store.write_text(job_path, job.to_json())
        log_path, port, ranks = store.join(folder, "train.log"), free_port(), config.train.ranks
        environment = launcher_environment(
            os.environ, config.train.threads_per_rank, launcher=config.launcher, port=port
        )

        def notice(text: str) -> None:
            say(one_line(text), sys.stderr)

        if begun := steps_in(checkpoints_folder(context.path())):
            inform(f"{context.stage}: resumes from step {max(begun):,}")
        command = launcher_command(config.launcher, entry, job_path, ranks, port)
        try:
            status = watch(command, environment, log_path, progress, notice)
        finally:
            if job.store_folder is not None:
                send_log(folder, job.store_folder)
        if status != 0:
            raise InputError(failure(log_path, status))
    averaged = () if config.train.averages is None else config.train.averages.files
    outputs = dict.fromkeys((MODEL_FILE, METRICS_FILE, *averaged), 0)
    if config.save_openai:
        outputs[OPENAI_FILE] = 0
    if job.store_folder is not None:
        finish(folder, job.store_folder, list(outputs))
    return Outcome(outputs, num_in=num_samples, num_kept=num_samples)


def title_of(name: str, config: TrainStageConfig) -> str:
    """Return in one line what a training stage, or a phase of it, does with these settings."""
    train, name = config.train, name.partition("_phase")[0]
    towers = "image tower locked, text tower trained" if train.lock_image else "both towers trained"
    if name == "english":
        what = "from English captions, as the paper starts from OpenAI's CLIP"
        towers = f"image tower {what}" if not train.lock_image else f"{towers} {what}"
    elif name == "finetune":
        towers += " on a task's own pairs"
    more = []
    if train.distil is not None:
        more.append(f"learning from {train.distil.teacher}")
    if train.image_size_px is not None:
        more.append(f"images of {train.image_size_px} px")
    if train.context_length != CONTEXT_LENGTH:
        more.append(f"captions cut at {train.context_length} tokens")
    if train.patch_mask:
        more.append(f"{100 * train.patch_mask:g}% of the patches left out")
    if train.negation is not None:
        more.append("with statements about absent objects")
    return "; ".join((towers, *more))


def stage(
    name: str, config: TrainStageConfig, *, before: str | None, entry: str, sets_from: tuple[str, ...]
) -> Stage:
    """Return a training stage: english, stage1, stage2 or finetune, or a phase of one.

    `before` is the training stage that hands its weights on; `entry` the module that each rank runs;
    `sets_from` the stages that know the evaluation sets.
    """
    learned = ("vocabulary",) if config.vocabulary is None else ()
    return Stage(
        name=name,
        title=title_of(name, config),
        version=1,
        config=config,
        parents=(*sets_from, "shards", *learned, *(() if before is None else (before,))),
        plan=plan,
        run=functools.partial(run, entry=entry),
        parallel=False,
        check=check,
        is_seeded=True,
        begun_with=begun_with,
        unbound_inputs=frozenset({"deepspeed"}),
        continues=continues,
        weights=given_weights,
    )
