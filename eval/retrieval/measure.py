"""Retrieval of a set by anything that ranks it: the one place that turns ranks into recall.

`evaluate_retrieval` takes any source of features of a set: a model, one that is being trained, or features
on disk. Prediction files and the pixel baseline have ranks of their own and return the same result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from eval.datasets.cnclip_tsv import RetrievalSet
from eval.features.layout import read_side
from eval.metrics.bootstrap import Measured, recall_intervals
from eval.metrics.recall import (
    Positives,
    RetrievalScores,
    ranks_from_features,
    recall_at_k,
    retrieval_scores,
)
from pipeline.core.arrays import Float32Array, Int64Array

# What `ranks_from_features` does
Rank = Callable[[Float32Array, Float32Array, Positives], Int64Array]


class SetEncoder(Protocol):
    """Gives the features of a retrieval set."""

    def encode(self, evaluation: RetrievalSet) -> tuple[Float32Array, Float32Array]:
        """Return image_ND and text_ND, unit-norm, in the set's order of rows."""
        ...


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """Features that `eval.features.evaluation_set.embed_evaluation` wrote into a folder."""

    folder: str

    def encode(self, evaluation: RetrievalSet) -> tuple[Float32Array, Float32Array]:
        """Read and check the features of both sides."""
        return read_side(self.folder, "image"), read_side(self.folder, "text")


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """The rank of each query's best right answer, from 1; all ranks beyond the last cutoff are equal."""

    t2i_ranks: Int64Array  # of all texts
    i2t_ranks: Int64Array | None  # of the images that some text names; None for text-to-image only (MUGE)

    @property
    def scores(self) -> RetrievalScores:
        """Return recall at 1, 5 and 10 of both directions, in percent."""
        i2t = None if self.i2t_ranks is None else recall_at_k(self.i2t_ranks)
        return retrieval_scores(recall_at_k(self.t2i_ranks), i2t)

    def intervals(self) -> dict[str, Measured]:
        """Return the same recalls with bootstrap intervals, by keys such as `t2i/r1`."""
        return recall_intervals(self.t2i_ranks, self.i2t_ranks)


def evaluate_retrieval(
    encoder: SetEncoder, evaluation: RetrievalSet, rank: Rank = ranks_from_features
) -> RetrievalResult:
    """Rank the directions of a set that are scored, by `rank`."""
    image_ND, text_ND = encoder.encode(evaluation)
    t2i_ranks = rank(text_ND, image_ND, Positives.of(evaluation.images_of_text))
    if not evaluation.image_to_text:
        return RetrievalResult(t2i_ranks, None)
    rows, positives = image_queries(evaluation)
    return RetrievalResult(t2i_ranks, rank(image_ND[rows], text_ND, positives))


def image_queries(evaluation: RetrievalSet) -> tuple[Int64Array, Positives]:
    """Return the rows of the images that some text names, and the texts that are right for each of them."""
    texts_of_image = evaluation.texts_of_image
    rows = np.flatnonzero([len(texts) > 0 for texts in texts_of_image])
    return rows, Positives.of([texts_of_image[row] for row in rows])
