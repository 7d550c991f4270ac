"""Where features lie in clip-retrieval's layout, and what they must be: unit-norm float32.

img_emb/img_emb_N.npy     float32 [rows, dim]         text_emb/text_emb_N.npy   of the texts
metadata/metadata_N.parquet                           row i describes row i of both
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.files.npy import read_npy
from pipeline.core.files.written import write_npy
from pipeline.core.records import InputError

Side = Literal["image", "text"]

EMBEDDING_FOLDERS: dict[Side, str] = {"image": "img_emb", "text": "text_emb"}  # clip-retrieval's names


def vectors_path(folder: str, side: Side) -> str:
    """Return the path of a side's features when they are in one file."""
    name = EMBEDDING_FOLDERS[side]
    return store.join(folder, name, f"{name}_0.npy")


def read_side(folder: str, side: Side) -> Float32Array:
    """Read and check one side's features, as `read_vectors` does."""
    return read_vectors(vectors_path(folder, side))


def write_vectors(path: str, vectors_ND: Float32Array) -> None:
    """Check features and write them as one `.npy` file, whole or not at all."""
    check_vectors(vectors_ND, path)
    write_npy(path, vectors_ND)


def read_vectors(path: str) -> Float32Array:
    """Read the features of one `.npy` file, float32 [num_rows, dim], unit-norm.

    Raises:
        InputError: if a feature is not finite or not unit-norm; it names the file and the first bad row.
    """
    vectors_ND = read_npy(path, "embed again")
    check_vectors(vectors_ND, path)
    features_ND: Float32Array = vectors_ND
    return features_ND


def check_vectors(
    vectors_ND: npt.NDArray[Any], name: str, *, numbers_N: Int64Array | None = None, remedy: str = ""
) -> None:
    """Check that these are finite, unit-norm float32 vectors.

    `numbers_N` are the rows' numbers in the file `name`, by default 0, 1, …; `remedy` ends the error about
    rows of another length.

    Raises:
        InputError: if they are not.
    """
    if vectors_ND.dtype != np.float32 or vectors_ND.ndim != 2 or 0 in vectors_ND.shape:
        raise InputError(
            f"{name}: expected float32 features [rows, dim], found {vectors_ND.dtype}"
            f" {list(vectors_ND.shape)}"
        )
    norms_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
    numbers_N = np.arange(len(vectors_ND)) if numbers_N is None else numbers_N
    not_finite = np.flatnonzero(~np.isfinite(norms_N))
    if len(not_finite):
        raise InputError(
            f"{name}: {len(not_finite)} of {len(vectors_ND)} features are NaN or infinite, the first in row"
            f" {numbers_N[not_finite[0]]}; remove such rows or write the file again (a model that diverged"
            " makes them: train it with a lower peak_learning_rate)"
        )
    off_norm = np.flatnonzero(np.abs(norms_N - 1) > 1e-3)
    if len(off_norm):
        row = off_norm[0]
        raise InputError(
            f"{name}: row {numbers_N[row]} has norm {norms_N[row]:.4f}; features must be unit-norm{remedy}"
        )
