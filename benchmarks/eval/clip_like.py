"""Write features like CLIP's, of any size: clustered images, and texts that lie outside their distribution.

Image features and text features of CLIP are two narrow cones with different means (the modality gap: Liang et
al. 2022, arXiv 2203.02053, figure 1: 0.82 for OpenAI's ViT-B/32). A feature here is

    gap / √2 × mean of its side + √(1 - gap² / 2) × direction,

with orthogonal means, so the means lie `gap` apart. The direction of an image is a cluster's centre with
noise; sizes of clusters and variances of dimensions fall off as a power law. A text knows its own image's
cluster and `SEEN` of the image's noise; it has `MATCH` cosine with that, and the rest is noise of its own.
Rows come in blocks that each have their own seed, so a file of a million rows begins with the rows of a file
of a thousand, and memory stays flat.

    OUT/img_emb/img_emb_N.npy   OUT/text_emb/text_emb_0.npy   clip-retrieval's layout
    OUT/labels.npy              int64 [texts]: the row of each text's image
    OUT/held_out.npy            images of the same distribution that are no rows of img_emb
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.core.arrays import Float32Array, Int64Array

BLOCK_ROWS = 8192  # rows with one seed
ROWS_PER_FILE = 500_000
MATCH = 0.6  # cosine of the directions of a text and its image; gives a top-1 cosine near 0.28 at gap 0.99
SEEN = 0.25  # share of an image's noise that its text describes: some images of a cluster fit the text better
NOISE = 0.9  # length of an image's noise; its centre has length 1
DECAY = 0.5  # variance of dimension j falls as j^(-2 × DECAY)
_IMAGES, _TEXTS, _HELD_OUT = range(3)  # kinds of seeds


@dataclass(frozen=True, slots=True)
class ClipLike:
    """A distribution of features; equal arguments give equal rows."""

    dim: int = 512
    seed: int = 0
    gap: float = 0.99  # distance of the two means
    num_clusters: int = 1000

    def images(self, start: int, stop: int, kind: int = _IMAGES) -> Float32Array:
        """Return image rows start … stop - 1, float32 [rows, dim], unit-norm."""
        return _cone(self._directions(start, stop, kind, NOISE), self._frame()[0], self.gap)

    def held_out(self, count: int) -> Float32Array:
        """Return images of the same distribution that are no rows of `images`."""
        return self.images(0, count, _HELD_OUT)

    def labels(self, num_texts: int, num_rows: int) -> Int64Array:
        """Return the row of each text's image: evenly spaced."""
        return np.arange(num_texts, dtype=np.int64) * num_rows // num_texts

    def texts(self, num_texts: int, num_rows: int) -> Float32Array:
        """Return texts for `num_rows` images, float32 [texts, dim], unit-norm."""
        labels_T = self.labels(num_texts, num_rows)
        direction_TD = np.empty((num_texts, self.dim), dtype=np.float32)
        for block in np.unique(labels_T // BLOCK_ROWS).tolist():
            inside_T = np.flatnonzero(labels_T // BLOCK_ROWS == block)
            rows_BD = self._directions(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS, _IMAGES, NOISE * SEEN)
            direction_TD[inside_T] = rows_BD[labels_T[inside_T] - block * BLOCK_ROWS]
        rng = np.random.default_rng([self.seed, _TEXTS])
        own_TD = _unit(rng.standard_normal((num_texts, self.dim), dtype=np.float32))
        mixed_TD = MATCH * direction_TD + (1 - MATCH**2) ** 0.5 * own_TD
        return _cone(_unit(mixed_TD), self._frame()[1], self.gap)

    def _frame(self) -> npt.NDArray[np.float32]:
        """Return the two orthogonal means [2, dim]."""
        rng = np.random.default_rng([self.seed, 10])
        return np.linalg.qr(rng.standard_normal((self.dim, 2)))[0].T.astype(np.float32)

    def _directions(self, start: int, stop: int, kind: int, noise: float) -> Float32Array:
        rng = np.random.default_rng([self.seed, 11])
        scale_D = np.arange(1, self.dim + 1, dtype=np.float32) ** -DECAY
        rng.shuffle(scale_D)
        centre_CD = _unit(rng.standard_normal((self.num_clusters, self.dim), dtype=np.float32) * scale_D)
        share_C = np.arange(1, self.num_clusters + 1) ** -0.5  # a few large clusters, many small ones
        share_C /= share_C.sum()
        length = float(np.sqrt((scale_D**2).sum()))
        parts = []
        for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
            own = np.random.default_rng([self.seed, kind, 12, block])
            cluster_B = own.choice(self.num_clusters, size=BLOCK_ROWS, p=share_C)
            noise_BD = own.standard_normal((BLOCK_ROWS, self.dim), dtype=np.float32)
            rows_BD = centre_CD[cluster_B] + noise_BD * (scale_D * np.float32(noise / length))
            low, high = max(start, block * BLOCK_ROWS), min(stop, (block + 1) * BLOCK_ROWS)
            parts.append(rows_BD[low - block * BLOCK_ROWS : high - block * BLOCK_ROWS])
        return _unit(np.concatenate(parts))


def write(
    folder: Path, like: ClipLike, num_rows: int, num_texts: int, dtype: npt.DTypeLike = np.float32
) -> None:
    """Write the layout above; held-out images are as many as texts. Files that are there stay."""
    for name in ("img_emb", "text_emb"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, num_rows, ROWS_PER_FILE)):
        count = min(ROWS_PER_FILE, num_rows - first)
        path = folder / "img_emb" / f"img_emb_{number}.npy"
        if path.exists() and np.load(path, mmap_mode="r").shape == (count, like.dim):
            continue  # of a run that was interrupted
        begun = path.with_suffix(".part")
        matrix = np.lib.format.open_memmap(begun, mode="w+", dtype=dtype, shape=(count, like.dim))
        row = 0
        while row < count:  # whole blocks: half of one costs as much
            stop = min(count, ((first + row) // BLOCK_ROWS + 1) * BLOCK_ROWS - first)
            matrix[row:stop] = like.images(first + row, first + stop)
            row = stop
        del matrix
        begun.rename(path)
    np.save(folder / "text_emb" / "text_emb_0.npy", like.texts(num_texts, num_rows).astype(dtype))
    np.save(folder / "labels.npy", like.labels(num_texts, num_rows))
    np.save(folder / "held_out.npy", like.held_out(num_texts).astype(dtype))


def _cone(direction_ND: Float32Array, mean_D: npt.NDArray[np.float32], gap: float) -> Float32Array:
    """Return unit rows whose share along the mean puts the two means `gap` apart."""
    along = np.float32(gap / 2**0.5)
    across_ND = _unit(direction_ND - (direction_ND @ mean_D)[:, None] * mean_D)
    return _unit(along * mean_D + np.float32((1 - gap**2 / 2) ** 0.5) * across_ND)


def _unit(rows_ND: Float32Array) -> Float32Array:
    unit_ND: Float32Array = (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(np.float32)
    return unit_ND


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("out", type=Path)
    made.add_argument("--rows", type=int, default=200_000)
    made.add_argument("--texts", type=int, default=2000)
    made.add_argument("--dim", type=int, default=512)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--gap", type=float, default=0.99, help="distance of the two means, 0 to √2")
    made.add_argument("--clusters", type=int, default=1000)
    made.add_argument("--dtype", choices=("float16", "float32"), default="float32")
    options = made.parse_args()
    like = ClipLike(options.dim, options.seed, options.gap, options.clusters)
    write(options.out, like, options.rows, options.texts, np.dtype(options.dtype))
    print(f"{options.out}: {options.rows:,} images, {options.texts:,} texts, {options.dim} dimensions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
