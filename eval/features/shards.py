"""`cnclip embed --shards`: features of a whole corpus, a shard at a time, by several ranks, resumable.

A shard's metadata is written last: its existence marks the shard as done. Memory is that of a model and of
one shard's features for each rank. docs/concepts/evaluation.md, "Features of a corpus", has the layout.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from eval.datasets.shards import whole_shards
from eval.features.encoder import EvaluationEncoder, ModelSource, load_encoder
from eval.features.files import FEATURE_TYPES, FeatureType
from eval.features.layout import EMBEDDING_FOLDERS, check_vectors
from eval.features.model_identity import identify, write_identity
from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.files.lock import one_at_a_time
from pipeline.core.files.written import check_parquet, naming, write_npy
from pipeline.core.processes import begin_worker, say, spawning
from pipeline.core.records import ConfigError, InputError
from pipeline.core.shard_format import SIDECAR, TAR, ByteRanges, read_sidecar_frame
from pipeline.core.stage import Progress
from pipeline.core.terminal import one_line

if TYPE_CHECKING:
    from training.data.squares import ImageRange


@dataclass(frozen=True, slots=True)
class ShardJob:
    """What all ranks of one embedding share."""

    checkpoint: ModelSource
    shards: str  # folder
    out: str
    dtype: FeatureType
    num_ranks: int


@dataclass(frozen=True, slots=True)
class EmbeddedShards:
    """What the folder holds."""

    num_shards: int
    num_rows: int
    num_unreadable: int  # images without a row


@one_at_a_time("job.out")
def embed_shards(job: ShardJob, *, redo: bool = False, progress: Progress | None = None) -> EmbeddedShards:
    """Embed every shard that is not done, with `job.num_ranks` processes; this one is rank 0.

    On a machine with accelerators rank r takes number r modulo their count.

    Raises:
        ConfigError: if the folder holds features of another model, setting or corpus and `redo` is not set.
        InputError: for damaged shards, and if a rank failed.
    """
    import multiprocessing

    stems = whole_shards(job.shards)
    encoder = _encoder(job, rank=0)
    _begin(job, encoder, stems, redo)
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and accelerators
    others = [
        context.Process(target=_other_rank, args=(job, rank, os.getpid()), name=f"rank {rank}")
        for rank in range(1, min(job.num_ranks, len(stems)))
    ]
    with spawning():
        for process in others:
            process.start()
    try:
        _embed_rank(job, encoder, stems, 0, progress)
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()  # those that still run: this rank failed or was interrupted
    failed = [process.name for process in others if process.exitcode]
    if failed:
        raise InputError(
            f"{job.out}: {', '.join(failed)} failed, see above:"
            " fix the problem and rerun the same command to resume"
        )
    return _summary(job, stems)


def _other_rank(job: ShardJob, rank: int, parent: int) -> None:
    begin_worker(parent)
    try:
        _embed_rank(job, _encoder(job, rank), whole_shards(job.shards), rank, None)
    except (ConfigError, InputError) as error:
        say(f"error: rank {rank}: {one_line(str(error))}", sys.stderr)
        sys.exit(error.exit_status)


def _encoder(job: ShardJob, rank: int) -> EvaluationEncoder:
    """Load the model on this rank's accelerator, or with its share of the processor's threads."""
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // job.num_ranks))  # and as many image workers
    if not torch.cuda.is_available():
        return load_encoder(job.checkpoint, device="cpu")
    device = f"cuda:{rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)  # where what torch compiles runs
    return load_encoder(job.checkpoint, device=device, many=True)


def _begin(job: ShardJob, encoder: EvaluationEncoder, stems: Sequence[str], redo: bool) -> None:
    """Bind the folder to this model, these settings and these shards."""
    identity = identify(encoder.base.model, encoder.base.decode)
    plan: dict[str, Any] = {
        "weights_sha256": identity.weights_sha256,
        "vocabulary": encoder.base.tokenizer.digest,
        "context_length": job.checkpoint.context_length,
        "dtype": job.dtype,
        "decode": job.checkpoint.decode,
        **({} if job.checkpoint.precision == "float32" else {"precision": job.checkpoint.precision}),
        "shards": digest([(os.path.basename(stem), store.digest_edges(stem + SIDECAR)) for stem in stems]),
    }
    path = store.join(job.out, "plan.json")
    if store.exists(path) and json.loads(store.read_text(path)) != plan:
        if not redo:
            raise ConfigError(
                f"{job.out}: holds features of another model, setting or corpus; give --redo or another --out"
            )
        for name in ("metadata", *EMBEDDING_FOLDERS.values()):
            store.remove(store.join(job.out, name))
    store.sweep(job.out)
    store.write_text(path, json.dumps(plan, indent=1) + "\n")
    write_identity(job.out, identity)


def _embed_rank(
    job: ShardJob, encoder: EvaluationEncoder, stems: Sequence[str], rank: int, progress: Progress | None
) -> None:
    """Embed shards rank, rank + num_ranks … that have no metadata yet."""
    for number in range(rank, len(stems), job.num_ranks):
        metadata_path = _path(job, "metadata", number, len(stems))
        if not store.exists(metadata_path):
            _embed_shard(job, encoder, stems[number], number, len(stems))
        if progress is not None:
            progress(number + 1, len(stems), os.path.basename(stems[number]))


def _embed_shard(job: ShardJob, encoder: EvaluationEncoder, stem: str, number: int, num_shards: int) -> None:
    columns = ("key", "caption", "offset_bytes", "size_bytes")
    samples = read_sidecar_frame(stem + SIDECAR, columns, ("source", "url"))
    image_ND, kept_N = encoder.encoded_images(_images(stem + TAR, samples))
    metadata = samples[kept_N].drop("offset_bytes", "size_bytes")
    captions = metadata["caption"].fill_null("").to_list()
    tokens_NL = encoder.base.tokenizer.encode(captions, job.checkpoint.context_length)
    text_ND = encoder.base.embed_tokens(tokens_NL)
    for name, feature_ND in (("img_emb", image_ND), ("text_emb", text_ND)):
        path = _path(job, name, number, num_shards)
        if len(feature_ND):
            check_vectors(feature_ND, path)
        write_npy(path, feature_ND.astype(FEATURE_TYPES[job.dtype]))
    path = _path(job, "metadata", number, num_shards)
    with store.publish(path) as temporary, naming(path):
        metadata.write_parquet(temporary)
        check_parquet(temporary, path, metadata.height)


def _images(tar: str, samples: pl.DataFrame) -> "Iterator[bytes | ImageRange]":
    """Yield where a shard's images lie; of a remote tar, which is better read in order, the images.

    Raises:
        InputError: if the tar is damaged.
    """
    from training.data.squares import ImageRange

    places = (
        (offset_bytes, size_bytes, f"{key}.jpg")
        for key, offset_bytes, size_bytes in samples.select("key", "offset_bytes", "size_bytes").iter_rows()
    )
    if store.is_local(tar):
        yield from (ImageRange(tar, *place) for place in places)
        return
    with ByteRanges(tar) as images:
        for place in places:
            yield images.read(*place)


def _path(job: ShardJob, name: str, number: int, num_shards: int) -> str:
    ending = "parquet" if name == "metadata" else "npy"
    return store.join(job.out, name, f"{name}_{number:0{len(str(num_shards - 1))}d}.{ending}")


def _summary(job: ShardJob, stems: Sequence[str]) -> EmbeddedShards:
    def count(path: str) -> int:
        return int(pl.scan_parquet(path).select(pl.len()).collect().item())

    num_samples = sum(count(stem + SIDECAR) for stem in stems)
    num_rows = sum(count(_path(job, "metadata", number, len(stems))) for number in range(len(stems)))
    return EmbeddedShards(len(stems), num_rows, num_samples - num_rows)
