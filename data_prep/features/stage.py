"""Stage image_features: encodes each kept image once, for semantic duplicates, classifiers and [score].

A feature is a unit-norm vector of one image encoder, kept in float16: 1 KB a row for 512 dimensions.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import numpy as np
import polars as pl

from data_prep.corpus_facts import kept_tables, rows_stage, table_name
from data_prep.download.stage import partition_of
from data_prep.formats.parquet import write_table
from pipeline.core import store
from pipeline.core.arrays import Float32Array
from pipeline.core.config import NOT_IN_DIGEST
from pipeline.core.facts import Facts
from pipeline.core.files.npy import map_npy
from pipeline.core.records import InputError, Manifest
from pipeline.core.shard_format import ByteRangePool
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task, repair_remedy

_ROWS_AT_ONCE = 2048  # images in memory
_DIGEST_DIGITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFeaturesConfig:
    """`[image_features]`: the encoder. Give image_encoder or model.

    Paths and the device stay out of the digest, because the digest of the encoder binds the features.
    """

    image_encoder: str | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Weights of an English CLIP whose image tower encodes, such as OpenAI's."""
    image_activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of that CLIP model: `quick_gelu` for OpenAI's, `gelu` for most of OpenCLIP's."""
    model: str | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Weights of a Chinese CLIP whose image tower encodes, instead of `image_encoder`."""
    device: str | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Device as torch names it. Unset: the GPU if there is one."""

    def __post_init__(self) -> None:
        if (self.image_encoder is None) == (self.model is None):
            raise ValueError("give either image_encoder or model")


class ImageEncoder(Protocol):
    """A loaded image tower; returns unit-norm float32 features [len, dim]."""

    def embed_images(self, images: Sequence[bytes]) -> Float32Array: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesTask(Facts):
    """A table in the folder of the stage that kept its rows, and the first digits of the encoder's digest."""

    table: str
    encoder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesFacts(Facts):
    """The encoder of some features, and their dimension (0 for a table without rows)."""

    encoder: str
    dim: int

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Return the facts of a finished stage."""
        found = [cls.from_json(extra) for extra in manifest.extra.values()]
        return max(found, key=lambda facts: facts.dim)


def plan(
    config: ImageFeaturesConfig, context: Context, identify: Callable[[ImageFeaturesConfig], str]
) -> list[Task]:
    """Plan one task for each table of rows, bound to the rows, the images and the encoder."""
    encoder = identify(config)[:_DIGEST_DIGITS]
    images: dict[str, dict[str, str]] = {}  # a partition may have several tars: a retry adds one
    for shard in context.parents["download"].shards:
        if shard.path.endswith(".tar"):
            images.setdefault(partition_of(shard.path), {})[f"pictures {shard.path}"] = shard.digest
    return [
        Task(
            table_name(shard),
            {"rows": shard.digest, **images[table_name(shard)], "image encoder": encoder},
            FeaturesTask(table=shard.path, encoder=encoder).to_json(),
        )
        for shard in kept_tables(context, rows_stage(context))
    ]


def run(
    config: ImageFeaturesConfig,
    context: Context,
    task: Task,
    progress: Progress,
    load: Callable[[ImageFeaturesConfig], ImageEncoder],
) -> Outcome:
    """Write `features/<table>.npy`, float16 [rows, dim], and `keys/<table>.parquet` with the rows' keys."""
    asked = FeaturesTask.from_json(task.arguments)
    path = context.path_in(rows_stage(context), asked.table)
    rows = pl.read_parquet(path, columns=["key", "tar", "offset_bytes", "size_bytes"])
    parts = []
    with ByteRangePool(
        lambda name: context.path_in("download", name), remedy=repair_remedy("download")
    ) as tars:
        for part in rows.iter_slices(_ROWS_AT_ONCE):
            images = [
                tars.read(tar, offset, size, f"{key}.jpg")
                for key, tar, offset, size in part.select(
                    "key", "tar", "offset_bytes", "size_bytes"
                ).iter_rows()
            ]
            parts.append(load(config).embed_images(images).astype(np.float16))
            progress(sum(map(len, parts)), rows.height, "images")
    feature_ND = np.concatenate(parts) if parts else np.zeros((0, 0), np.float16)
    if not np.isfinite(feature_ND).all():
        raise InputError(f"{path}: a feature is not finite; the weights of [image_features] give NaN")
    name = table_name_of(asked.table)
    with store.publish(context.path(_features_file(name))) as temporary, open(temporary, "wb") as file:
        np.save(file, feature_ND)
    write_table(rows.select("key"), context.path(_keys_file(name)))
    return Outcome(
        {_features_file(name): rows.height, _keys_file(name): rows.height},
        num_in=rows.height,
        num_kept=rows.height,
        extra=FeaturesFacts(encoder=asked.encoder, dim=feature_ND.shape[1]).to_json(),
    )


def table_name_of(table: str) -> str:
    """Return `00000` of `kept/00000.parquet`."""
    return table.rpartition("/")[2].removesuffix(".parquet")


def _features_file(name: str) -> str:
    return f"features/{name}.npy"


def _keys_file(name: str) -> str:
    return f"keys/{name}.parquet"


def digests_of_features(context: Context) -> Mapping[str, Mapping[str, str]]:
    """Return table's name → inputs of a task that reads its features: labels and digests."""
    found: dict[str, dict[str, str]] = {}
    for shard in context.parents["image_features"].shards:
        name = shard.path.rpartition("/")[2].partition(".")[0]
        found.setdefault(name, {})[shard.path] = shard.digest
    return found


def read_features(context: Context, name: str, keys: pl.Series) -> Float32Array:
    """Return the features of some rows of a table in order, float32 [len(keys), dim].

    Raises:
        InputError: if a row has none.
    """
    path = context.path_in("image_features", _features_file(name))
    stored_ND = map_npy(path, repair_remedy("image_features"))
    known = pl.read_parquet(context.path_in("image_features", _keys_file(name))).with_row_index("at")
    places = keys.to_frame("key").join(known, on="key", how="left", maintain_order="left")["at"]
    if places.null_count() or len(stored_ND) != known.height:
        raise InputError(f"{path}: features of other rows; run `--stage image_features --redo`")
    feature_ND: Float32Array = stored_ND[places.to_numpy()].astype(np.float32)
    return feature_ND


def given_weights(config: ImageFeaturesConfig) -> dict[str, str]:
    """Return the weights from outside the run by label: paths, or names of hub models."""
    given = {name: getattr(config, name) for name in ("model", "image_encoder")}
    return {name: text for name, text in given.items() if text is not None}


def stage(
    config: ImageFeaturesConfig,
    *,
    rows: str,
    identify: Callable[[Any], str],
    load: Callable[[Any], ImageEncoder],
    parallel: bool,
) -> Stage:
    """Return the stage that encodes the images that the stage `rows` kept."""
    return Stage(
        "image_features",
        title="features of the images by one encoder",
        version=1,
        config=config,
        parents=("corpus", "download", rows),
        plan=functools.partial(plan, identify=identify),
        run=functools.partial(run, load=load),
        parallel=parallel,
        weights=given_weights,
    )
