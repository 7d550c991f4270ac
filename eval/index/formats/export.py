"""Writes what a search found as ann-benchmarks and big-ann-benchmarks store it, for their own evaluators.

Both are HDF5 files below `results/DATASET/K/ALGORITHM/`: `neighbors` int32 [queries, k], with attributes.
ann-benchmarks also has `times` and `distances`, and means seconds for one query by `best_search_time`;
big-ann-benchmarks means seconds for all.
"""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from eval.index.bench.points import Point
from eval.index.formats.hdf5 import import_h5py
from eval.index.formats.matrix import file_of
from eval.index.metric import Metric, distances_of, pair_scores
from eval.index.tuning.queries import Queries
from eval.index.views import Vectors
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array

Shape = Literal["ann-benchmarks", "big-ann"]

_ALGORITHM = "cnclip"
_NAMES: dict[Metric, str] = {"cosine": "angular", "l2": "euclidean", "ip": "ip"}


@dataclass(frozen=True, slots=True)
class Export:
    """Where the results go, and in which shape."""

    shape: Shape
    out: str
    dataset: str  # path of the vectors, whose name the results get
    k: int

    def path(self, factory: str, parameters: str, queries: Queries) -> str:
        """Return the file for a setting."""
        name = os.path.splitext(os.path.basename(file_of(self.dataset).rstrip("/")))[0]
        words = [factory, parameters, "" if queries.name.startswith(("/", ".")) else queries.name]
        setting = re.sub(r"\W+", "_", " ".join(words)).strip("_")
        folder = store.join(self.out, self.shape, "results", name, str(self.k), _ALGORITHM)
        return store.join(folder, f"{setting}.hdf5")

    def has(self, factory: str, parameters: str, queries: Queries) -> bool:
        """Return whether a setting was exported."""
        return store.exists(self.path(factory, parameters, queries))

    def write(
        self,
        point: Point,
        queries: Queries,
        vectors: Vectors,
        found_QK: Int64Array,
    ) -> None:
        """Write one setting.

        Args:
            point: what was measured; the fastest of its rounds counts, as in those benchmarks.
            queries: what was searched for.
            vectors: the rows that were searched.
            found_QK: their numbers, -1 for none.
        """
        path = self.path(point.name, point.parameters, queries)
        h5py = import_h5py(path)
        found_QK = found_QK[:, : self.k]
        seconds = 1 / max(timed.queries_per_second for timed in point.rounds)
        is_ann = self.shape == "ann-benchmarks"
        attributes = {
            "algo": _ALGORITHM,
            "name": f"{point.name} {point.parameters}".strip(),
            "dataset": os.path.splitext(os.path.basename(file_of(self.dataset)))[0],
            "distance": _NAMES[vectors.metric],
            "count": self.k,
            "build_time": point.build_seconds,
            "index_size": point.bytes_per_vector * vectors.num_rows / 1024,
            "best_search_time": seconds if is_ann else seconds * len(found_QK),
            "run_count": len(point.rounds),
        }
        if is_ann:
            candidates = float((found_QK >= 0).sum(axis=1).mean())
            attributes |= {"batch_mode": True, "expect_extra": False, "candidates": candidates}
        else:
            attributes |= {"type": "knn"}
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "result"
            with h5py.File(whole, "w") as file:
                file.attrs.update(attributes)
                file["neighbors"] = found_QK.astype(np.int32)
                if is_ann:
                    file["times"] = np.full(len(found_QK), seconds, dtype=np.float32)
                    file["distances"] = distances(vectors, queries.vectors_QD, found_QK)
            store.write_bytes(path, whole.read_bytes())


def distances(vectors: Vectors, queries_QD: Float32Array, found_QK: Int64Array) -> Float32Array:
    """Return ann-benchmarks' distances: 1 - cosine, L2, or the negative inner product; infinite for none."""
    needed, where = np.unique(np.maximum(found_QK, 0), return_inverse=True)
    query_P = np.repeat(np.arange(len(found_QK)), found_QK.shape[1])
    score_P = pair_scores(queries_QD, query_P, vectors.rows(needed), where.reshape(-1), vectors.metric)
    away_P = distances_of(score_P, vectors.metric)
    away_QK: Float32Array = np.where(found_QK < 0, np.inf, away_P.reshape(found_QK.shape)).astype(np.float32)
    return away_QK
