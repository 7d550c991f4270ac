"""Stages cluster_images to dedup_semantic: drop semantic duplicates by SemDeDup (Abbas et al. 2023).

k-means cuts the features into clusters, so that only images of one cluster are compared. Within a cluster the
images stand in the order of their similarity to its centre, the least similar first; an image goes if its
cosine with one before it is above the threshold. So the less typical one of two stays, as in the paper.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from annotated_types import Ge, Gt, Le

from data_prep.corpus_facts import kept_tables, neighbours, rows_stage, table_name
from data_prep.dedup import copies
from data_prep.features.stage import FeaturesFacts, digests_of_features, read_features, table_name_of
from data_prep.formats.parquet import write_table
from data_prep.rules.image import SEMANTIC_DUPLICATES_RULE
from pipeline.core import store
from pipeline.core.arrays import Float32Array
from pipeline.core.facts import Facts
from pipeline.core.files.npy import read_npy, read_npy_rows
from pipeline.core.records import DropReason, Shard
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task, repair_remedy

SEMANTIC_DUPLICATE = DropReason("semantic_duplicate")

CENTRES_FILE = "centres.npy"
_ROWS_PER_CLUSTER = 8_000  # the paper has 440 million images in 50,000 clusters
_ROWS_PER_TASK = 1_000_000  # features of 512 dimensions: 1 GB in float16, 2 in float32
_POINTS_PER_CLUSTER = 256  # of the sample that k-means learns from: what faiss takes at most
_MOST_POINTS = 4_000_000  # of the sample, in memory
_ITERATIONS = 20
_COMPARED_AT_ONCE, _OTHERS_AT_ONCE = 2048, 16_384  # rows of a cluster, and those before them: 128 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupSemanticConfig:
    """`[dedup_semantic]`: keep one of the images whose features are nearly the same."""

    max_similarity: Annotated[float, Gt(0), Le(1)] = 0.95
    """Largest cosine of two images of a cluster that both stay. Each encoder has its own scale."""
    clusters: Annotated[int, Ge(1)] | None = None
    """Number of clusters. Unset: one for each 8,000 rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClustersConfig:
    """What the clusters depend on."""

    clusters: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesTask(Facts):
    """Tables of rows, by path in the folder of the stage that kept them."""

    tables: Sequence[str]
    clusters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeTask(Facts):
    """The clusters from `first` to `end`, without `end`."""

    first: int
    end: int


def plan_clusters(config: ClustersConfig, context: Context) -> list[Task]:
    """Plan one task over a sample: the first rows, which are in random order."""
    # Features of a table without rows have no dimension.
    tables = [table for table in kept_tables(context, rows_stage(context)) if table.num_samples]
    features = digests_of_features(context)
    num_rows = sum(table.num_samples for table in tables)
    clusters = min(config.clusters or math.ceil(num_rows / _ROWS_PER_CLUSTER), max(num_rows, 1))
    chosen, left = list[Shard](), min(clusters * _POINTS_PER_CLUSTER, _MOST_POINTS)
    for table in tables:
        if left > 0:
            chosen.append(table)
        left -= table.num_samples
    inputs = {table.path: table.digest for table in chosen}
    for table in chosen:
        inputs |= features[table_name(table)]
    asked = TablesTask(tables=[table.path for table in chosen], clusters=clusters)
    return [Task("clusters", inputs, asked.to_json())]


def run_clusters(config: ClustersConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `centres.npy`, unit-norm float32 [clusters, dim]."""
    import faiss

    asked = TablesTask.from_json(task.arguments)
    limit = min(asked.clusters * _POINTS_PER_CLUSTER, _MOST_POINTS)
    parts, count = [np.zeros((0, FeaturesFacts.of(context.parents["image_features"]).dim), np.float32)], 0
    for table in asked.tables:
        parts.append(_features(context, table, _keys(context, table))[: limit - count])
        count += len(parts[-1])
    sample_ND = np.concatenate(parts)
    clusters = min(asked.clusters, count)
    if clusters:
        settings: Mapping[str, Any] = {
            "niter": _ITERATIONS,
            "spherical": True,
            "seed": 1,
            "min_points_per_centroid": 1,
            "max_points_per_centroid": _POINTS_PER_CLUSTER,
        }
        kmeans = faiss.Kmeans(sample_ND.shape[1], clusters, **settings)
        kmeans.train(sample_ND)
        centre_KD = np.asarray(kmeans.centroids, np.float32)
    else:
        centre_KD = sample_ND
    _save(context.path(CENTRES_FILE), centre_KD)
    return Outcome({CENTRES_FILE: len(centre_KD)}, num_in=count, num_kept=count)


def _keys(context: Context, table: str) -> pl.Series:
    return pl.read_parquet(context.path_in(rows_stage(context), table), columns=["key"])["key"]


def _features(context: Context, table: str, keys: pl.Series) -> Float32Array:
    return read_features(context, table_name_of(table), keys)


def _save(path: str, array: npt.NDArray[Any]) -> None:
    with store.publish(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def plan_assign(config: None, context: Context) -> list[Task]:
    """Plan one task for neighbouring tables of some million rows."""
    features = digests_of_features(context)
    centres = context.shards_of("cluster_images", CENTRES_FILE)[0]
    tasks = []
    for group in neighbours(kept_tables(context, rows_stage(context)), _ROWS_PER_TASK):
        inputs = {"centres": centres.digest, **{item.path: item.digest for item in group}}
        for item in group:
            inputs |= features[table_name(item)]
        asked = TablesTask(tables=[item.path for item in group], clusters=centres.num_samples)
        tasks.append(Task(table_name(group[0]), inputs, asked.to_json()))
    return tasks


def run_assign(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `assigned/<task>.parquet` (key, cluster, similarity to its centre) and `.npy`, the features.

    Both are sorted by cluster, so that who looks for copies in some clusters reads one piece of each.
    """
    import faiss

    asked = TablesTask.from_json(task.arguments)
    path = context.path_in("cluster_images", CENTRES_FILE)
    centre_KD = read_npy(path, repair_remedy("cluster_images"))
    parts, features = list[pl.DataFrame](), list[npt.NDArray[np.float16]]()
    for table in asked.tables:
        keys = _keys(context, table)
        feature_ND = _features(context, table, keys)
        if len(keys):
            found = faiss.knn(feature_ND, centre_KD, 1, metric=faiss.METRIC_INNER_PRODUCT)
            features.append(feature_ND.astype(np.float16))
            parts.append(
                pl.DataFrame(
                    {
                        "key": keys,
                        "cluster": found[1][:, 0].astype(np.uint32),
                        "similarity": found[0][:, 0].astype(np.float32),
                    }
                )
            )
        progress(len(parts), len(asked.tables), "tables assigned")
    empty = {"key": pl.String, "cluster": pl.UInt32, "similarity": pl.Float32}
    rows = pl.concat([pl.DataFrame(schema=empty), *parts]).with_row_index("at").sort("cluster", "key")
    stored = np.concatenate([np.zeros((0, centre_KD.shape[1]), np.float16), *features])
    table_path, npy_path = f"assigned/{task.name}.parquet", f"assigned/{task.name}.npy"
    _save(context.path(npy_path), stored[rows["at"].to_numpy()])
    write_table(rows.drop("at"), context.path(table_path))
    return Outcome({table_path: rows.height, npy_path: rows.height}, num_in=rows.height, num_kept=rows.height)


def plan_find(config: DedupSemanticConfig, context: Context) -> list[Task]:
    """Plan one task for neighbouring clusters that hold some million rows if clusters are even."""
    assigned = context.parents["assign_clusters"]
    inputs = {shard.path: shard.digest for shard in assigned.shards}
    clusters = context.shards_of("cluster_images", CENTRES_FILE)[0].num_samples
    num_tasks = max(1, min(clusters, math.ceil(assigned.num_kept / _ROWS_PER_TASK)))
    bounds = [number * clusters // num_tasks for number in range(num_tasks + 1)]
    return [
        Task(f"{number:05d}", inputs, RangeTask(first=first, end=end).to_json())
        for number, (first, end) in enumerate(itertools.pairwise(bounds))
    ]


def run_find(config: DedupSemanticConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `copies/<task>.parquet`: key of each copy, reason, and the image that it is like."""
    asked = RangeTask.from_json(task.arguments)
    rows, feature_ND = _assigned(context, asked)
    found = [pl.DataFrame(schema=copies.COPIES_SCHEMA)]
    for number, of_cluster in enumerate(rows.partition_by("cluster", maintain_order=True), start=1):
        ordered = of_cluster.sort("similarity", "key")
        found.append(copies_in(ordered["key"], feature_ND[ordered["at"].to_numpy()], config.max_similarity))
        progress(number, asked.end - asked.first, "clusters")
    merged = pl.concat(found).sort("key")
    path = f"copies/{task.name}.parquet"
    write_table(merged, context.path(path))
    return Outcome({path: merged.height}, num_in=rows.height, num_kept=rows.height)


def _assigned(context: Context, asked: RangeTask) -> tuple[pl.DataFrame, Float32Array]:
    """Return the rows of some clusters with `at`, the places of their features, and the features."""
    tables, features, first = list[pl.DataFrame](), list[npt.NDArray[Any]](), 0
    between = pl.col("cluster").is_between(asked.first, asked.end, closed="left")
    for shard in context.shards_of("assign_clusters", ".parquet"):
        rows = pl.scan_parquet(shard.path).with_row_index("at").filter(between).collect()
        if rows.height:
            begin = rows["at"][0]  # sorted by cluster: one piece
            path, remedy = shard.path.removesuffix(".parquet") + ".npy", repair_remedy("assign_clusters")
            features.append(read_npy_rows(path, begin, begin + rows.height, remedy).astype(np.float32))
            tables.append(rows.with_columns(pl.col("at") - begin + first))
            first += rows.height
    if not tables:
        schema = {"at": pl.UInt32, "key": pl.String, "cluster": pl.UInt32, "similarity": pl.Float32}
        return pl.DataFrame(schema=schema), np.zeros((0, 0), np.float32)
    return pl.concat(tables), np.concatenate(features)


def copies_in(keys: pl.Series, feature_ND: Float32Array, max_similarity: float) -> pl.DataFrame:
    """Return key, reason and detail of the rows of one cluster that are too like one before them.

    Blocks of rows are compared with blocks of those before them, so memory is that of two blocks.
    """
    likest_N, place_N = np.full(len(keys), -np.inf, np.float32), np.zeros(len(keys), np.int64)
    for start in range(0, len(keys), _COMPARED_AT_ONCE):
        end = min(start + _COMPARED_AT_ONCE, len(keys))
        own_B = np.arange(start, end)
        for first in range(0, end, _OTHERS_AT_ONCE):
            last = min(first + _OTHERS_AT_ONCE, end)
            cosine_BN = feature_ND[start:end] @ feature_ND[first:last].T
            cosine_BN[np.arange(first, last)[None, :] >= own_B[:, None]] = -np.inf  # only those before a row
            place_B = cosine_BN.argmax(axis=1)
            found_B = np.take_along_axis(cosine_BN, place_B[:, None], axis=1)[:, 0]
            is_more_B = found_B > likest_N[start:end]
            likest_N[own_B[is_more_B]] = found_B[is_more_B]
            place_N[own_B[is_more_B]] = first + place_B[is_more_B]
    is_copy_N = likest_N > max_similarity
    return pl.DataFrame(
        {
            "key": keys.filter(pl.Series(is_copy_N)),
            "other": keys.gather(pl.Series(place_N[is_copy_N])),
            "cosine": likest_N[is_copy_N],
        }
    ).select(
        "key",
        reason=pl.lit(str(SEMANTIC_DUPLICATE)),
        detail=pl.format("{} (cosine {})", "other", pl.col("cosine").round(4)),
    )


def stages(config: DedupSemanticConfig, *, rows: str) -> list[Stage]:
    """Return the stages that drop semantic duplicates among the rows that the stage `rows` kept."""
    parents = ("corpus", rows, "image_features")
    finder = "find_semantic_copies"
    return [
        Stage(
            "cluster_images",
            title="centres of clusters of image features",
            version=1,
            config=ClustersConfig(clusters=config.clusters),
            parents=parents,
            plan=plan_clusters,
            run=run_clusters,
        ),
        Stage(
            "assign_clusters",
            title="the cluster of each image",
            version=1,
            config=None,
            parents=(*parents, "cluster_images"),
            plan=plan_assign,
            run=run_assign,
        ),
        Stage(
            finder,
            title="finds images of one cluster that are nearly the same",
            version=1,
            config=config,
            parents=("cluster_images", "assign_clusters"),
            plan=plan_find,
            run=run_find,
        ),
        *copies.stages(
            config,
            rows=rows,
            finder=finder,
            merger="merge_semantic_copies",
            dropper="dedup_semantic",
            rule=SEMANTIC_DUPLICATES_RULE,
            title="drops semantic duplicates; of two the less typical stays",
        ),
    ]
