"""What to measure: features, sets of queries with their exact neighbours, and on what results depend."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.features.layout import Side
from eval.index.bench.results import machine
from eval.index.bench.task import K as TASK_K
from eval.index.bench.task import Labels, ranks, task_recall
from eval.index.bench.timing import check_timing
from eval.index.build import rows_to_train
from eval.index.device import Device, check_device
from eval.index.embeddings import Embeddings
from eval.index.formats.export import Export
from eval.index.truth import Truth, check_truth, exact_neighbours, read_truth, write_truth
from eval.index.tuning.queries import Queries
from eval.index.views import Vectors, Without, view_of
from eval.metrics.bootstrap import Measured
from eval.metrics.recall import Positives
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.config import digest
from pipeline.core.records import ConfigError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure on which features.

    Raises:
        InputError: if there are fewer rows than k, besides those that are held out.
        ConfigError: for fewer than 2 rounds, an empty batch, or centring for distances.
    """

    path: str  # of the features
    side: Side
    embeddings: Embeddings
    queries: Sequence[Queries]
    k: int
    train_rows: int | None  # None: enough for each factory
    centre: bool = False
    device: Device = "cpu"
    threads: int
    batch: int | None = None  # queries in one call; None: all
    rounds: int = 7  # of timing
    labels: Labels | None = None
    truth_path: str | None = None  # a file with the exact neighbours of the only set of queries
    export: Export | None = None  # also writes what each setting found

    def __post_init__(self) -> None:
        check_device(self.device)
        check_timing(self.rounds, self.batch)
        if self.centre and self.embeddings.metric == "l2":
            raise ConfigError("--centre is for inner products; distances do not change when rows are moved")
        if not 0 < self.k <= self.vectors.num_rows:
            raise InputError(f"{self.path}: k = {self.k}, but there are {self.vectors.num_rows} rows")

    @property
    def held_out(self) -> Int64Array | None:
        """Return the rows that are queries and not indexed."""
        return next((queries.rows_Q for queries in self.queries if queries.are_own), None)

    @property
    def vectors(self) -> Vectors:
        return view_of(self.embeddings, self.held_out)

    @property
    def searched(self) -> int:
        """Return how many neighbours are searched: those of the task are 10 at least."""
        return self.k if self.labels is None else min(max(self.k, TASK_K), self.vectors.num_rows)

    def facts(self, queries: Queries, factory: str) -> dict[str, Any]:
        """Return what a result depends on besides the factory and its setting."""
        return {
            "k": self.k,
            "searched": self.searched,
            "queries": queries.source,
            "queries_digest": queries.digest,
            "num_queries": len(queries),
            "embeddings_digest": self.embeddings.digest(),
            "num_rows": self.vectors.num_rows,
            "held_out": 0 if self.held_out is None else len(self.held_out),
            "dim": self.embeddings.dim,
            "metric": self.embeddings.metric,
            "train_rows": self.rows_to_train(factory),
            "centred": self.centre,
            "device": self.device,
            "threads": self.threads,
            "batch": self.batch_of(queries),
            "labels": None if self.labels is None else store.digest_file(self.labels.path),
            **machine(),
        }

    def conditions(self) -> str:
        """Return what holds for all results, in one line."""
        known = machine()
        batch = "all queries" if self.batch is None else f"{self.batch:,}"
        return (
            f"{self.vectors.num_rows:,} rows of width {self.embeddings.dim}; {self.threads} threads on"
            f" {known['cores']} cores of {known['processor']}; batches of {batch}; median of {self.rounds}"
            f" rounds; load {os.getloadavg()[0]:.1f}; faiss {known['faiss']}"
        )

    def batch_of(self, queries: Queries) -> int:
        return len(queries) if self.batch is None else min(self.batch, len(queries))

    def rows_to_train(self, factory: str) -> int:
        return rows_to_train(self.embeddings.dim, factory) if self.train_rows is None else self.train_rows


@dataclass(frozen=True, slots=True)
class Asked:
    """A set of queries with its exact neighbours and its labels."""

    queries: Queries
    truth: Truth
    labelled: tuple[Int64Array, Positives] | None

    def task_of(self, rows_QK: Int64Array) -> dict[str, Measured] | None:
        if self.labelled is None:
            return None
        numbers, positives = self.labelled
        return task_recall(ranks(rows_QK[numbers], positives))


def ask(plan: Plan, queries: Queries, out: str | None, say: Callable[[str], None]) -> Asked:
    """Return a set of queries with its exact neighbours, from a file if there is one."""
    vectors, k = plan.vectors, plan.searched
    if plan.truth_path is not None:
        num_queries = int(queries.rows_Q.max()) + 1
        truth = read_truth(plan.truth_path, num_queries=num_queries, num_rows=vectors.num_rows, k=k)
        truth = truth.of(queries.rows_Q)
        check_truth(plan.truth_path, vectors, queries.vectors_QD, truth)
    else:
        held_out = None if plan.held_out is None else store.digest_bytes(plan.held_out.tobytes())
        bound = digest(plan.embeddings.digest(), held_out, queries.digest, k)
        path = None if out is None else store.join(out, "ground_truth", f"{bound[:16]}.ibin")
        if path is not None and store.exists(path):
            truth = read_truth(path, num_queries=len(queries), num_rows=vectors.num_rows, k=k)
        else:
            say(f"exact neighbours of {queries.source}")
            truth = exact_neighbours(vectors, queries.vectors_QD, k, plan.device)
            if path is not None:
                write_truth(path, truth)
    labels = None if plan.labels is None or queries.are_own else plan.labels.of(queries)
    if labels is not None and isinstance(vectors, Without):
        numbers, positives = labels
        labels = numbers, replace(positives, rows=vectors.moved(positives.rows))
    return Asked(queries, truth, labels)
