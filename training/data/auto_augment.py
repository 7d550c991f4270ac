"""AutoAugment's policy for ImageNet (Cubuk et al. 2019; A.2) as timm's "original", on arrays.

The sub-policies and magnitudes are timm's, so CN-CLIP's. The operations are written again: timm's run in PIL,
which costs more, and draw from a global state; and the processes that augment do without timm, which imports
torch. An operation on single values (posterize, solarize, invert, equalize, autocontrast, contrast) is a
table of 256 entries a channel; consecutive tables become one, and the histogram that equalize and
autocontrast need goes through the tables before them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.core.arrays import Int64Array, UInt8Array

Pixels = UInt8Array  # [height, width, 3], RGB
Table = UInt8Array  # [256, 3]: the new value of each old one, by channel
ChannelHistograms = Int64Array  # [256, 3]: how many pixels have each value, by channel

_SIGNED_OPERATIONS = frozenset({"Rotate", "ShearX"})  # whose magnitude has a random sign
_LUMA = np.array([0.299, 0.587, 0.114])  # of RGB (ITU-R BT.601)
_FILL = (128.0, 128.0, 128.0)  # what comes in from outside, timm's
_VALUES = np.arange(256)
_IDENTITY = np.repeat(_VALUES[:, None], 3, axis=1).astype(np.uint8)

# The 25 sub-policies (Cubuk et al. 2019, appendix), two operations each: timm's name, the probability and the
# magnitude, from 0 to 10.
ORIGINAL_POLICY = (
    (("PosterizeOriginal", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    (("PosterizeOriginal", 0.6, 7), ("PosterizeOriginal", 0.6, 6)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)),
    (("PosterizeOriginal", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 8), ("PosterizeOriginal", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
)


def level_of(operation: str, magnitude: int) -> float:
    """Return what an operation takes for a magnitude, as timm computes it; the sign is drawn apart."""
    share = magnitude / 10
    match operation:
        case "PosterizeOriginal":
            return float(int(share * 4) + 4)  # bits that stay
        case "Solarize":
            return float(min(256, int(share * 256)))  # values from here on are inverted
        case "Rotate":
            return share * 30  # degrees
        case "ShearX":
            return share * 0.3
        case "Color" | "Contrast" | "Sharpness":
            return share * 1.8 + 0.1
    return 0.0  # operations without a level


def auto_augment(image: Pixels, random: np.random.Generator) -> Pixels:
    """Apply one of the 25 sub-policies, drawn; each of its two operations has its own probability."""
    drawn = []
    for operation, probability, magnitude in ORIGINAL_POLICY[int(random.integers(len(ORIGINAL_POLICY)))]:
        applies, negative = random.random() < probability, random.random() < 0.5
        if not applies:
            continue
        level = level_of(operation, magnitude)
        drawn.append((operation, -level if negative and operation in _SIGNED_OPERATIONS else level))
    return apply_operations(image, drawn)


def apply_operations(image: Pixels, operations: Sequence[tuple[str, float]]) -> Pixels:
    """Apply operations by timm's (name, level).

    Raises:
        KeyError: for a name that the policy lacks.
    """
    work = _Work(image)
    for name, level in operations:
        _OPERATIONS[name](work, level)
    return work.finished()


class _Work:
    """An image and the table that is still to be applied to it."""

    def __init__(self, image: Pixels) -> None:
        self._image = image
        self._table: Table | None = None
        self._counts: ChannelHistograms | None = None  # of the image as it is, without the table

    def finished(self) -> Pixels:
        """Return the image with everything applied."""
        if self._table is not None:
            self._image = np.asarray(cv2.LUT(self._image, self._table[None]), dtype=np.uint8)
            self._table = self._counts = None
        return self._image

    def put(self, image: npt.NDArray[Any]) -> None:
        self._image, self._counts = np.asarray(image, dtype=np.uint8), None

    def add(self, table: Table) -> None:
        """Apply a table after what there is."""
        self._table = table if self._table is None else np.take_along_axis(table, self._table.astype(int), 0)

    def counts(self) -> ChannelHistograms:
        """Return the histogram of what `finished` would give."""
        if self._counts is None:
            channels = [cv2.calcHist([self._image], [c], None, [256], [0, 256]).ravel() for c in range(3)]
            self._counts = np.stack(channels, axis=1).astype(np.int64)
        if self._table is None:
            return self._counts
        moved = [np.bincount(self._table[:, c], self._counts[:, c], 256) for c in range(3)]
        return np.stack(moved, axis=1).astype(np.int64)


def _posterize(work: _Work, bits: float) -> None:
    work.add(_IDENTITY & np.uint8(256 - 2 ** (8 - int(bits))))


def _solarize(work: _Work, threshold: float) -> None:
    work.add(np.where(threshold > _IDENTITY, _IDENTITY, 255 - _IDENTITY))


def _invert(work: _Work, _: float) -> None:
    work.add(255 - _IDENTITY)


def _equalize(work: _Work, _: float) -> None:
    counts = work.counts()
    table = _IDENTITY.copy()
    for channel in range(3):
        found = counts[:, channel][counts[:, channel] > 0]
        step = (found.sum() - found[-1]) // 255
        if len(found) > 1 and step:
            below = np.concatenate([[0], np.cumsum(counts[:-1, channel])])
            table[:, channel] = np.minimum((step // 2 + below) // step, 255)
    work.add(table)


def _auto_contrast(work: _Work, _: float) -> None:
    counts = work.counts()
    table = _IDENTITY.copy()
    for channel in range(3):
        low, high = np.flatnonzero(counts[:, channel])[[0, -1]]
        if high > low:
            scale = 255.0 / (high - low)
            table[:, channel] = np.clip((_VALUES * scale - low * scale).astype(int), 0, 255)
    work.add(table)


def _contrast(work: _Work, factor: float) -> None:
    image = work.finished()
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    work.add(np.clip(mean + factor * (_IDENTITY.astype(np.float32) - mean), 0, 255).astype(np.uint8))


def _color(work: _Work, factor: float) -> None:
    matrix = factor * np.eye(3) + (1 - factor) * np.tile(_LUMA, (3, 1))
    work.put(cv2.transform(work.finished(), matrix))


def _sharpness(work: _Work, factor: float) -> None:
    """Move away from the image that PIL's SMOOTH gives, which leaves the border as it is."""
    image = work.finished()
    smooth = np.ones((3, 3))
    smooth[1, 1] = 5
    kernel = (1 - factor) / 13 * smooth
    kernel[1, 1] += factor
    sharper = cv2.filter2D(image, -1, kernel)
    sharper[[0, -1]], sharper[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    work.put(sharper)


def _rotate(work: _Work, degrees: float) -> None:
    image = work.finished()
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    work.put(cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_CUBIC, borderValue=_FILL))


def _shear_x(work: _Work, factor: float) -> None:
    image = work.finished()
    matrix = np.array([[1.0, factor, factor / 2], [0.0, 1.0, 0.0]])  # PIL counts from pixels' corners
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    work.put(cv2.warpAffine(image, matrix, image.shape[1::-1], flags=flags, borderValue=_FILL))


_OPERATIONS: dict[str, Callable[[_Work, float], None]] = {
    "PosterizeOriginal": _posterize,
    "Solarize": _solarize,
    "Invert": _invert,
    "Equalize": _equalize,
    "AutoContrast": _auto_contrast,
    "Contrast": _contrast,
    "Color": _color,
    "Sharpness": _sharpness,
    "Rotate": _rotate,
    "ShearX": _shear_x,
}
