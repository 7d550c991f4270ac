"""One training stage on one rank: everything from the job to the consolidated weights."""

import contextlib
import dataclasses
import json
import os
import signal
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch import distributed as dist

from pipeline.core import store
from pipeline.core.config import digest, plain
from pipeline.core.processes import die_with_run, say
from pipeline.core.records import ConfigError, Stopped
from training.checkpoint import checkpoint
from training.checkpoint.selection import check_sets
from training.checkpoint.start import agree_on_start
from training.checkpoint.writer import CheckpointWriter
from training.config.job import TrainJob
from training.config.train import TrainConfig, check_fits, count_steps, sized
from training.data.feature_cache import FeatureCache, build, cache_key, most_images, requests
from training.data.feeder import Feeder
from training.data.image_workers import ImageWorkers
from training.data.loader import BatchReader, CaptionConfig
from training.data.patch_mask import make_patch_mask
from training.data.sampler import SampleOrder
from training.data.shard_cache import cache_of_rank
from training.data.shard_table import check_shards
from training.data.statements import Statements
from training.data.views import ViewConfig
from training.engine.averages import RunningAverages
from training.engine.compiler import check_compiler
from training.engine.engine import build_engine, join_ranks
from training.engine.float8 import check_device
from training.engine.precision import autocast, check_precision
from training.engine.teacher import load_teacher
from training.engine.towers import Towers
from training.final_weights import write_model
from training.flops import PEAK_FLOPS, find_device, matmul_flops, training_flops
from training.metrics import MetricsLog
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS
from training.model.tokenizer import Tokenizer
from training.ranks.preemption import StopRequest
from training.ranks.watchdog import Watchdog
from training.trainer import Trainer, Validate
from training.weights.formats import load_model
from training.weights.hub.locate import local_path
from training.weights.initialise import continue_from, initialise, write_provenance
from training.weights.weights import require_same_model


def pretrain(job: TrainJob, validate: Validate | None) -> None:
    """Train one stage and write its weights; every rank calls it in the launcher's environment.

    It resumes from the newest whole checkpoint of `job.folder`. Writes `metrics.jsonl`, `log.jsonl` and
    `checkpoints/` there, and `job.output_model` (and `job.openai_model`) last.

    Raises:
        ConfigError: if the job cannot be trained so.
        InputError: if a file of it cannot be read or written, or training fails.
        Stopped: if a signal asked for it, after a checkpoint.
    """
    die_with_run()
    deepspeed_logger.setLevel("WARNING")
    torch.set_num_threads(job.config.threads_per_rank)
    config, num_samples = job.config, sum(shard.num_samples for shard in job.shards)
    check_sets(config, job.evaluations if validate is not None else (), job.stage)
    total_steps = count_steps(config, num_samples, job.stage)
    rank, stop = int(os.environ["RANK"]), StopRequest()
    watchdog = Watchdog(
        job.folder, stage=job.stage, rank=rank, ranks=config.ranks, limit_seconds=config.stall_seconds
    )
    join_ranks(config)
    stop.listen()  # until here there is nothing to lose, and a rank that waits for others could not be ended
    if rank == 0:
        check_shards(job.shards)

    tokenizer = Tokenizer.load(job.vocabulary)
    clip = build_model(job, tokenizer)
    check_precision(config)
    check_compiler(config, job.stage)
    check_device(config, job.stage)
    order = sample_order(job)
    reader = make_reader(job, order, tokenizer, clip, lanes=order.rank_lanes(rank, config.ranks))
    teacher = load_teacher(config, clip, job.stage)
    towers = Towers(
        clip,
        num_samples_of_ranks=tuple(order.rank_num_samples(r, config.ranks) for r in range(config.ranks)),
        config=config,
        teacher=teacher,
    )
    if config.cached_views:
        reader.features = cache_features(job, towers, reader, watchdog, stop)
    watchdog.alive("building the engine", between_steps=True)
    if config.averages is not None and rank == 0:
        towers.averages = RunningAverages(config.averages, total_steps)
    engine = build_engine(towers, config)
    identity = describe(job, clip, tokenizer)
    start = agree_on_start(job, identity)
    resumed = start.checkpoint
    if resumed is not None:
        checkpoint.restore_state(engine, checkpoint.load(resumed))
    metrics = MetricsLog(
        job.folder,
        writes=rank == 0,
        total_steps=total_steps,
        global_batch=config.global_batch,
        deciding=config.choose_on,
        flops_of_sample=partial(training_flops, clip.config, config),
        peak_flops=peak_flops_of_ranks(config) if rank == 0 else None,
        tracking=job.tracking,
        settings={
            "model": job.model,
            "seed": job.seed,
            "shards": len(job.shards),
            **dataclasses.asdict(config),
        },
        identity=digest(identity),
        store_folder=job.store_folder,
    )
    metrics.start_at(resumed)
    for text in start.notices:
        metrics.notice(text)
    first_step = 0 if resumed is None else resumed.step
    workers = None
    if reader.features is None:
        reader.cache = cache_of_rank(
            job.shards,
            order,
            order.rank_lanes(rank, config.ranks),
            job.folder,
            size_gb=config.cache_gb,
            byte_range=reader.byte_range,
            steps=range(first_step, total_steps),
        )
        workers = start_workers(job, reader, clip, order.rank_num_samples(rank, config.ranks))
    engine.train()
    with (
        Feeder(
            reader.requests(first_step, total_steps), workers, get_accelerator().current_device_name()
        ) as batches,
        reader.cache or contextlib.nullcontext(),  # closed before the feeder: requests may wait for it
        CheckpointWriter() as writer,
    ):
        trainer = Trainer(
            stage=job.stage,
            config=config,
            seed=job.seed,
            engine=engine,
            batches=batches,
            first_step=first_step,
            best_before=start.best_before,
            damaged=start.damaged,
            total_steps=total_steps,
            num_samples=num_samples,
            recalls_of=validate,
            metrics=metrics,
            writer=writer,
            stop=stop,
            watchdog=watchdog,
            folder=job.folder,
            store_folder=job.store_folder,
            identity=identity,
        )
        with metrics.tracked():
            last_step = trainer.train()
        stop.close()
    best = trainer.selection().best if config.choose == "best" else None
    if last_step < total_steps:
        metrics.notice(
            f"[{job.stage}] ended after step {last_step} of {total_steps}: {config.patience} epochs"
            f" without a gain of {config.salient_gain:g} points of mean recall"
        )
    write_model(
        job,
        engine,
        last_step,
        last_step if best is None else best.step,
        validate=validate,
        start=lambda: build_model(job, tokenizer),
        notice=metrics.notice,
        alive=partial(watchdog.alive, between_steps=True),
    )
    metrics.close()
    if reader.cache is not None:
        reader.cache.remove()
    watchdog.close()


def build_model(job: TrainJob, tokenizer: Tokenizer) -> CLIP:
    """Return the model that a stage starts from: new, with towers taken over, or another stage's weights."""
    if job.model not in MODELS:
        raise ConfigError(f"[{job.stage}] model = {job.model!r}: unknown; known: {', '.join(sorted(MODELS))}")
    torch.manual_seed(job.seed)
    check_fits(job.config, MODELS[job.model], job.stage)
    clip = build_clip(sized(MODELS[job.model], job.config), vocab_size=tokenizer.vocab_size)
    if job.image_weights is not None or job.text_weights is not None:
        taken = initialise(clip, image_weights=job.image_weights, text_weights=job.text_weights)
        if int(os.environ.get("RANK", "0")) == 0:
            write_provenance(os.path.join(job.folder, "initial_weights.tsv"), taken)
    if job.start_weights is not None:
        start = load_model(job.start_weights, image_size_px=clip.config.vision.image_size_px)
        # ViT-L/14 at another resolution has another name.
        require_same_model(
            dataclasses.replace(start.config, name=clip.config.name), clip.config, job.start_weights
        )
        clip.load_state_dict(start.state_dict())
    if job.config.loss == "sigmoid":
        clip.add_logit_bias()
    if job.start_checkpoint is not None:
        continue_from(clip, job.start_checkpoint)
    if job.config.lock_image:
        clip.lock_image_tower()
    clip.set_activation_checkpointing(job.config.checkpoint_activations)
    return clip


def sample_order(job: TrainJob) -> SampleOrder:
    """Return which samples every step of a job sees."""
    return SampleOrder(
        [shard.num_samples for shard in job.shards],
        seed=job.seed,
        global_batch=job.config.global_batch,
        lanes=job.config.num_lanes,
        window_shards=job.config.window_shards,
    )


def make_reader(
    job: TrainJob, order: SampleOrder, tokenizer: Tokenizer, clip: CLIP, *, lanes: range
) -> BatchReader:
    """Return a reader of the part of a job's batches that these lanes hold."""
    config, statements = job.config, None
    if config.negation is not None:
        statements = Statements(
            config.negation, tokenizer, context_length=config.context_length, seed=job.seed
        )
    return BatchReader(
        job.shards,
        order,
        tokenizer,
        CaptionConfig(
            weights=config.weight_of_columns,
            context_length=config.context_length,
            token_folder=os.path.join(job.folder, "tokens"),
            seed=job.seed,
            cut=config.caption_cut,
        ),
        lanes=lanes,
        patch_mask=make_patch_mask(config, clip.config, job.stage, job.seed),
        statements=statements,
    )


def view_config(job: TrainJob, reader: BatchReader, clip: CLIP) -> ViewConfig:
    """Return what a job's images become, in the model's image size."""
    return ViewConfig(
        paths=tuple(shard.path for shard in job.shards),
        image_size_px=clip.config.vision.image_size_px,
        augment=job.config.augment,
        seed=job.seed,
        open_shards=reader.open_shards,
        cache_folder="" if reader.cache is None else reader.cache.folder,
    )


def start_workers(job: TrainJob, reader: BatchReader, clip: CLIP, most_images: int) -> ImageWorkers:
    """Start the rank's processes that decode images; `close` ends them."""
    views, pinned = view_config(job, reader, clip), get_accelerator().device_name() == "cuda"
    return ImageWorkers(job.config.num_workers, views, most_images=most_images, pinned=pinned)


def cache_features(
    job: TrainJob, towers: Towers, reader: BatchReader, watchdog: Watchdog, stop: StopRequest
) -> FeatureCache:
    """Make what is missing of the locked tower's features, every rank its share of the shards.

    Raises:
        Stopped: if a signal asks for it: whole shards are kept.
    """
    config, clip = job.config, towers.clip
    device = get_accelerator().current_device_name()
    key = cache_key(
        clip.visual,
        config.augment,
        image_size_px=clip.config.vision.image_size_px,
        seed=job.seed,
        num_views=config.cached_views,
        dtype=towers.compute_dtype,
    )
    cache = FeatureCache(job.shards, key, num_views=config.cached_views, dim=clip.config.embed_dim)
    if dist.get_rank() == 0:
        for folder in {os.path.dirname(cache.path(shard)) for shard in range(len(job.shards))}:
            store.sweep_shared(folder)
    missing = cache.missing()
    dist.barrier()  # no rank writes before all have looked
    if not missing:
        return cache
    towers.to(device)

    def encode(image_BCHW: torch.Tensor) -> torch.Tensor:
        watchdog.alive("computing features of the locked tower", between_steps=True)
        with torch.no_grad(), autocast(image_BCHW.device.type, towers.compute_dtype):
            return towers.encode_image(image_BCHW)

    def show(done: int, total: int) -> None:
        if dist.get_rank() == 0:
            text = f"features of {config.cached_views} views"
            progress = {"done": done, "total": total, "text": text}
            say(f"@progress {json.dumps(progress)}")

    if own := missing[dist.get_rank() :: config.ranks]:
        workers = start_workers(job, reader, clip, most_images(config.cached_views))
        with Feeder(requests(cache, own, reader.visits), workers, device) as images:
            build(cache, own, iter(images), encode, show, is_asked_to_stop=stop.is_asked)
    if number := stop.agreed():
        with_features = len(job.shards) - len(cache.missing())
        raise Stopped(
            f"by {signal.Signals(number).name}, {with_features:,} of {len(job.shards):,} shards have features"
        )
    return cache


def describe(job: TrainJob, clip: CLIP, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a checkpoint has to have in common with the run that resumes from it.

    The number of ranks is not in it: a state is put together from all ranks.
    """
    learning = plain(job.config, without=("never", "once done"))
    if learning["distil"] is not None:
        del learning["distil"]["teacher"]  # its digest says which; it may lie elsewhere
    return {
        "model": job.model,
        "seed": job.seed,
        "shards": digest([shard.digest for shard in job.shards]),
        "vocabulary": tokenizer.digest,
        "image_weights": job.image_weights and store.digest_tree(local_path(job.image_weights)),
        "text_weights": job.text_weights and store.digest_tree(local_path(job.text_weights)),
        "start_weights": job.start_weights and store.digest_tree(local_path(job.start_weights)),
        "teacher": job.config.distil and store.digest_tree(local_path(job.config.distil.teacher)),
        "start_checkpoint": job.start_checkpoint and store.digest_file(job.start_checkpoint),
        **learning,
    }


def peak_flops_of_ranks(config: TrainConfig) -> float | None:
    """Return the FLOP/s that all ranks' devices can do together; None if the data sheet is not known.

    A CPU is asked: the rate of a matrix product is its peak.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        known = find_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        return None if known is None else PEAK_FLOPS[known] * config.ranks
    return config.ranks * matmul_flops()
