"""Signatures: small thumbnails that tell copies of an image from images that only look alike to a hash.

A perceptual hash proposes pairs, and `are_copies` decides on their signatures: docs/concepts/filtering.md,
"Copies". benchmarks/data_prep/image_copies.py measures both kinds of error.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_LUMA, _CHROMA = 16, 8  # cells a side
SIGNATURE_BYTES = _LUMA**2 + 2 * _CHROMA**2

_BLUR_CELLS = 0.5  # standard deviation, of luma cells
_CROP, _SLACK = 0.045, 0.004  # of a side: how far an edge may lie inside the other image, or outside by noise
_BRIGHTER = 6.0  # levels of 255 that a window of a copy may be off
_ROUNDS = 12  # of coordinate descent on four edges
# Squared levels of 255 a luma cell: what JPEG at quality 30 may add to an image, and to a window, without
# its own contrast.
_NOISE, _WINDOW_NOISE = 50.0, 100.0
_WINDOW = 2  # chroma cells a side
_MOST, _MOST_IN_WINDOW = 0.1, 0.36  # of the contrast, and of the fine contrast in a window, that may differ
_PAIRS_AT_ONCE = 1024  # some 40 kB each while they are compared
_COARSE = 4  # cells a side in which pairs are compared first, without alignment
_MOST_COARSE = 0.5

FloatArray = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]


def image_signature(image_HWC: Bytes) -> bytes:
    """Return the 384-byte signature of an RGB image [height, width, 3] uint8."""
    import cv2

    size = 2 * _LUMA
    small: Any = cv2.resize(image_HWC, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    small = cv2.GaussianBlur(small, (0, 0), 2 * _BLUR_CELLS, borderType=cv2.BORDER_REFLECT)
    planes = cv2.cvtColor(small / 255, cv2.COLOR_RGB2YCrCb) * 255
    luma = planes[:, :, 0].reshape(_LUMA, 2, _LUMA, 2).mean(axis=(1, 3))
    chroma = planes[:, :, 1:].reshape(_CHROMA, 4, _CHROMA, 4, 2).mean(axis=(1, 3)).transpose(2, 0, 1)
    levels = np.rint(np.concatenate([luma.ravel(), chroma.ravel()]))
    return bytes(levels.clip(0, 255).astype(np.uint8).tobytes())


def signature_array(signatures: Sequence[bytes]) -> Bytes:
    """Return signatures as uint8 [N, 384]."""
    return np.frombuffer(b"".join(signatures), np.uint8).reshape(-1, SIGNATURE_BYTES)


def are_copies(
    first_NB: Bytes, second_MB: Bytes, place_P: npt.NDArray[np.int64], other_P: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Tell which pairs of places among signatures uint8 [N, 384] and [M, 384] are copies, bool [P]."""
    found = np.zeros(len(place_P), np.bool_)
    for start in range(0, len(place_P), 16 * _PAIRS_AT_ONCE):
        part = slice(start, start + 16 * _PAIRS_AT_ONCE)
        one, two = first_NB[place_P[part]], second_MB[other_P[part]]
        places = np.flatnonzero(_look_alike(one, two))
        for begin in range(0, len(places), _PAIRS_AT_ONCE):
            chosen = places[begin : begin + _PAIRS_AT_ONCE]
            whole, window = unexplained(one[chosen], two[chosen])
            found[start + chosen] = (whole <= _MOST) & (window <= _MOST_IN_WINDOW)
    return found


def brightness(signature_NB: Bytes) -> npt.NDArray[np.int64]:
    """Sum of a signature's luma, int64 [N]: nearly the same of copies, by which they can be sorted."""
    return np.asarray(signature_NB[:, : _LUMA**2].sum(axis=1, dtype=np.int64))


def _look_alike(first_NB: Bytes, second_NB: Bytes) -> npt.NDArray[np.bool_]:
    """Return whether two images are alike in 4 x 4 cells: cheap, and true of any copy."""
    first, second = (_coarse(side) for side in (first_NB, second_NB))
    difference = ((first - second) ** 2).sum(axis=1)
    contrast = (first.var(axis=1) + second.var(axis=1)) / 2 * _COARSE**2
    alike: npt.NDArray[np.bool_] = difference <= _MOST_COARSE * (contrast + _NOISE * _COARSE**2)
    return alike


def _coarse(signature_NB: Bytes) -> FloatArray:
    block = _LUMA // _COARSE
    luma = signature_NB[:, : _LUMA**2].reshape(-1, _COARSE, block, _COARSE, block)
    return np.asarray(luma.mean(axis=(2, 4), dtype=np.float32)).reshape(len(signature_NB), -1)


class _Planes:
    """Luma float32 [N, 16, 16] and chroma [N, 2, 8, 8] of signatures; chroma counts by its area."""

    def __init__(self, luma: FloatArray, chroma: FloatArray) -> None:
        self.luma, self.chroma = luma, chroma

    @classmethod
    def of(cls, signature_NB: Bytes) -> "_Planes":
        planes = cls.of_rows(signature_NB.astype(np.float32))
        return cls(planes.luma, planes.chroma * (_LUMA / _CHROMA))

    @classmethod
    def of_rows(cls, value_NK: FloatArray) -> "_Planes":
        luma, chroma = value_NK[:, : _LUMA**2], value_NK[:, _LUMA**2 :]
        return cls(luma.reshape(-1, _LUMA, _LUMA), chroma.reshape(-1, 2, _CHROMA, _CHROMA))

    def mean(self, other: "_Planes") -> "_Planes":
        return _Planes((self.luma + other.luma) / 2, (self.chroma + other.chroma) / 2)

    def rows(self) -> FloatArray:
        """Return all values of an image in a row, float32 [N, 384]."""
        count = len(self.luma)
        return np.concatenate([self.luma.reshape(count, -1), self.chroma.reshape(count, -1)], axis=1)

    def steps(self) -> FloatArray:
        """Return the change of the values as left, right, top, bottom edge move in, float32 [N, 4, 384]."""
        across = _Planes(self.luma @ _D_LUMA.T, self.chroma @ _D_CHROMA.T).rows()
        down = _Planes(_D_LUMA @ self.luma, _D_CHROMA @ self.chroma).rows()
        return np.stack([across * (1 - _X), -across * _X, down * (1 - _Y), -down * _Y], axis=1)

    def cut(self, edges_N4: FloatArray) -> "_Planes":
        """Return the images without so much of their left, right, top and bottom side, on the same grid."""
        left, right, top, bottom = edges_N4.T
        luma = _resampling(_LUMA, top, bottom) @ self.luma @ _resampling(_LUMA, left, right).mT
        across = _resampling(_CHROMA, left, right).mT[:, None]
        return _Planes(luma, _resampling(_CHROMA, top, bottom)[:, None] @ self.chroma @ across)

    def contrast(self) -> FloatArray:
        """Return the variance of luma and of chroma, float32 [N]."""
        return np.asarray(self.luma.var(axis=(1, 2)) + self.chroma.var(axis=(2, 3)).sum(axis=1) / 4)

    def fine(self) -> "_Planes":
        """Return what the mean of nine cells leaves of each."""
        return _Planes(self.luma - _smooth(self.luma), self.chroma - _smooth(self.chroma))

    def squares(self, forgiven: float = 0.0) -> FloatArray:
        """Sum of the squares, a luma cell, in each window, float32 [N, W, W].

        As much of a window's mean luma as is forgiven does not count: an image may be a little brighter.
        """
        luma = self.luma.reshape(-1, _CHROMA, 2, _CHROMA, 2)
        cells = (2 * _WINDOW) ** 2
        mean = _sums(luma.sum(axis=(2, 4)), _WINDOW) / cells
        shift = mean.clip(-forgiven, forgiven)
        squares = _sums((luma**2).sum(axis=(2, 4)) + (self.chroma**2).sum(axis=1), _WINDOW) / cells
        return np.asarray(squares - 2 * shift * mean + shift**2)


def unexplained(first_NB: Bytes, second_NB: Bytes) -> tuple[FloatArray, FloatArray]:
    """Return what differs once aligned: of the contrast, and of the fine contrast in one window, [N]."""
    first, second = _Planes.of(first_NB), _Planes.of(second_NB)
    difference = second.rows() - first.rows()
    steps = first.mean(second).steps()
    low = np.full((len(first_NB), 4), -_SLACK, np.float32)
    high = np.full_like(low, _CROP)
    # Either image may be cut out of the other: a shift, in at one side and out at the other, is no crop.
    inwards, left_inwards = _solve(steps, difference, low, high)
    outwards, left_outwards = _solve(steps, difference, -high, -low)
    is_inwards = (left_inwards <= left_outwards)[:, None]
    edges = np.where(is_inwards, inwards, outwards)
    low, high = np.where(is_inwards, low, -high), np.where(is_inwards, high, -low)
    # Once more from there: a shift by half a cell is too large for one linear step.
    cut = first.cut(edges)
    difference = second.rows() - cut.rows()
    steps = cut.mean(second).steps()
    further, _ = _solve(steps, difference, low - edges, high - edges)
    left = _Planes.of_rows(difference - np.einsum("ni,nik->nk", further, steps))
    contrast = (first.contrast() + second.contrast()) / 2
    mean = left.luma.mean(axis=(1, 2))
    shift = mean.clip(-_BRIGHTER, _BRIGHTER)
    squares = (left.rows() ** 2).sum(axis=1) / _LUMA**2 - 2 * shift * mean + shift**2
    whole = squares / (contrast + _NOISE)
    fine = (first.fine().squares() + second.fine().squares()) / 2
    return np.asarray(whole), np.asarray((left.squares(_BRIGHTER) / (fine + _WINDOW_NOISE)).max(axis=(1, 2)))


def _solve(
    steps_N4K: FloatArray, difference_NK: FloatArray, low_N4: FloatArray, high_N4: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the least-squares edges between the bounds for a difference, and the squares left."""
    matrix = np.einsum("nik,njk->nij", steps_N4K, steps_N4K)
    matrix += np.float32(1e-3) * np.eye(4, dtype=np.float32)
    right = np.einsum("nik,nk->ni", steps_N4K, difference_NK)
    edges = np.zeros_like(right)
    for _ in range(_ROUNDS):
        for i in range(4):
            move = (right[:, i] - np.einsum("nj,nj->n", matrix[:, i], edges)) / matrix[:, i, i]
            edges[:, i] = np.clip(edges[:, i] + move, low_N4[:, i], high_N4[:, i])
    explained = 2 * (edges * right).sum(axis=1) - np.einsum("ni,nij,nj->n", edges, matrix, edges)
    return edges, (difference_NK**2).sum(axis=1) - explained


def _derivative(cells: int) -> FloatArray:
    """Return the matrix that differentiates `cells` samples of a width through their cosine series."""
    place = np.arange(cells) + 0.5
    wave = np.arange(cells)
    angle = np.pi * np.outer(wave, place) / cells
    weight = np.where(wave == 0, 1, 2) / cells
    slope = -np.sin(angle) * (np.pi * wave)[:, None]
    return np.asarray(slope.T @ (np.cos(angle) * weight[:, None]), np.float32)


def _resampling(cells: int, before: FloatArray, after: FloatArray) -> FloatArray:
    """Return cubic matrices (Keys 1981) that cut both ends of `cells` samples, [N, cells, cells]."""
    place = (np.arange(cells) + 0.5) / cells
    sought = np.arange(cells) + cells * (before[:, None] * (1 - place) - after[:, None] * place)
    far = np.abs(sought.clip(-0.5, cells - 0.5)[:, :, None] - np.arange(-2, cells + 2))
    near = 1.5 * far**3 - 2.5 * far**2 + 1
    tail = -0.5 * far**3 + 2.5 * far**2 - 4 * far + 2
    weight = np.where(far < 1, near, np.where(far < 2, tail, 0)).astype(np.float32)
    inner = weight[:, :, 2:-2]
    inner[:, :, :2] += weight[:, :, 1::-1]  # beyond its edge an image is its mirror
    inner[:, :, -2:] += weight[:, :, :-3:-1]
    return np.asarray(inner)


def _smooth(plane: FloatArray) -> FloatArray:
    """Return the weighted mean of each cell and its eight neighbours; edges are repeated."""
    padded = np.pad(plane, [(0, 0)] * (plane.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
    rows = (padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]) / 4
    return np.asarray((rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4)


def _sums(value_NHW: FloatArray, window: int) -> FloatArray:
    """Sum over each square window of so many cells a side."""
    summed = np.pad(value_NHW.cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
    return np.asarray(
        summed[:, window:, window:]
        - summed[:, :-window, window:]
        - summed[:, window:, :-window]
        + summed[:, :-window, :-window]
    )


def _coordinates() -> tuple[FloatArray, FloatArray]:
    """Return x and y of each value of a signature, from 0 to 1 across the image, float32 [384] each."""
    luma, chroma = ((np.arange(cells, dtype=np.float32) + 0.5) / cells for cells in (_LUMA, _CHROMA))
    x = np.concatenate([np.tile(luma, _LUMA), np.tile(chroma, 2 * _CHROMA)])
    y = np.concatenate([np.repeat(luma, _LUMA), np.tile(np.repeat(chroma, _CHROMA), 2)])
    return x, y


_D_LUMA, _D_CHROMA = _derivative(_LUMA), _derivative(_CHROMA)
_X, _Y = _coordinates()
