"""The task's own Recall@K under an index, next to exact search: is the right image among the first?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.datasets.cnclip_tsv import scan_texts
from eval.features.layout import Side
from eval.index.tuning.queries import Queries
from eval.metrics.bootstrap import Measured, recall_intervals
from eval.metrics.recall import CUTOFFS, Positives
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.files.foreign import foreign
from pipeline.core.files.npy import read_npy
from pipeline.core.records import InputError

K = max(CUTOFFS)
_REMEDY = "give a .npy with a row of the index for each query, or the set's NAME_texts.jsonl"


@dataclass(frozen=True, slots=True)
class Labels:
    """The right rows of the index for each row of the query side."""

    path: str
    rows_of_query: Sequence[Int64Array]

    def of(self, queries: Queries) -> tuple[Int64Array, Positives]:
        """Return which queries have a right row, and these rows.

        Raises:
            InputError: if there are labels for another number of queries, or for none of these.
        """
        if queries.rows_Q.max() >= len(self.rows_of_query):
            raise InputError(
                f"{self.path}: labels of {len(self.rows_of_query)} queries, but query"
                f" {queries.rows_Q.max()} is searched for: they are of other features"
            )
        rows = [self.rows_of_query[row] for row in queries.rows_Q.tolist()]
        labelled = np.flatnonzero([len(right) > 0 for right in rows])
        if not len(labelled):
            raise InputError(f"{self.path}: none of the {len(rows)} queries has a right row")
        return labelled, Positives.of([rows[query] for query in labelled.tolist()])


def read_labels(path: str, features: str, side: Side, num_rows: int) -> Labels:
    """Read labels of an index of one side of a folder of features.

    Args:
        path: `.npy`, int [queries], the right row for each query; or CN-CLIP's `NAME_texts.jsonl`, whose ids
            the folder's `metadata/` and `text_metadata/` map to rows.
        features: the folder of features.
        side: the indexed side.
        num_rows: rows of the index.

    Raises:
        InputError: for a file of another kind, and for rows or ids that the features do not have.
    """
    if path.endswith(".npy"):
        rows_N = read_npy(path, _REMEDY)
        if rows_N.ndim != 1 or not len(rows_N) or rows_N.dtype.kind not in "iu":
            raise InputError(f"{path}: {rows_N.dtype} {list(rows_N.shape)} are no labels: {_REMEDY}")
        outside = np.flatnonzero((rows_N < 0) | (rows_N >= num_rows))
        if len(outside):
            raise InputError(
                f"{path}: query {outside[0]} has the label {rows_N[outside[0]]}, but there are {num_rows}"
                " rows"
            )
        return Labels(path, list(rows_N.astype(np.int64)[:, None]))
    if not path.endswith(".jsonl"):
        raise InputError(f"{path}: of an unknown kind: {_REMEDY}")
    text_row = _row_of_id(features, "text_metadata", "text_id")
    image_row = _row_of_id(features, "metadata", "image_id")
    from_text: list[list[int]] = [[] for _ in text_row]
    from_image: list[list[int]] = [[] for _ in image_row]
    for where, text_id, _, image_ids in scan_texts(path):
        for image_id in image_ids:
            if text_id not in text_row or image_id not in image_row:
                raise InputError(
                    f"{where}: text {text_id} of image {image_id} is not among the features in {features}:"
                    " they are of another set"
                )
            from_text[text_row[text_id]].append(image_row[image_id])
            from_image[image_row[image_id]].append(text_row[text_id])
    chosen = from_text if side == "image" else from_image
    return Labels(path, [np.array(rows, dtype=np.int64) for rows in chosen])


def ranks(found_QK: Int64Array, positives: Positives) -> Int64Array:
    """Return the place (from 1) of each query's first right row; one more than K if it is not there."""
    found_QK = found_QK[:, :K]
    base = int(max(found_QK.max(initial=0), positives.rows.max())) + 2
    owner = np.repeat(np.arange(positives.num_queries), positives.counts)
    keys_QK = found_QK + np.arange(len(found_QK))[:, None] * base
    hit_QK = np.isin(keys_QK, positives.rows + owner * base) & (found_QK >= 0)
    first_Q: Int64Array = np.where(hit_QK.any(axis=1), hit_QK.argmax(axis=1) + 1, K + 1).astype(np.int64)
    return first_Q


def task_recall(ranks_Q: Int64Array) -> dict[str, Measured]:
    """Return R@1, 5 and 10 in percent with bootstrap intervals, by `r1`, `r5` and `r10`."""
    found = recall_intervals(ranks_Q, None)
    return {f"r{cutoff}": found[f"t2i/r{cutoff}"] for cutoff in CUTOFFS}


def _row_of_id(features: str, folder: str, column: str) -> dict[int, int]:
    import polars as pl

    path = store.join(features, folder, "metadata_0.parquet")
    with foreign(path, "Parquet file", "embed again"):
        ids = pl.read_parquet(path, columns=[column])[column].to_list()
    return {int(value): row for row, value in enumerate(ids)}
