"""Rules on images, and the perceptual hash.

`perceptual_hash` is a colour difference hash: for each of R, G and B, is a cell of a small grid clearly
brighter than its right and its lower neighbour? Two copies of an image, re-encoded or resized, differ in
few of its 384 bits. Colour counts, unlike in the usual grey dHash: a red and a blue circle of equal
brightness are two images. A margin keeps flat areas from flipping with compression noise. Plain images that
are no copies differ in few bits too: `rules/copies.py` compares their signatures as well.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.core.records import DropReason

if TYPE_CHECKING:
    import polars as pl

TOO_SMALL = DropReason("too_small")
ASPECT = DropReason("aspect")
EVALUATION_IMAGE = DropReason("evaluation_image")

# What a source's `exempt_from` may name of the rules on images.
SIZE_RULE, ASPECT_RULE, IMAGE_DUPLICATES_RULE = "size", "aspect", "image_duplicates"
SEMANTIC_DUPLICATES_RULE, CLASSIFIERS_RULE, BALANCE_RULE = "semantic_duplicates", "classifiers", "balance"
SWITCHABLE_IMAGE_RULES = (
    SIZE_RULE, ASPECT_RULE, IMAGE_DUPLICATES_RULE, SEMANTIC_DUPLICATES_RULE, CLASSIFIERS_RULE,
    BALANCE_RULE,
)  # fmt: skip
# Raised when a rule would judge an image otherwise than before, as a TextRule's version is.
VERSIONS = {SIZE_RULE: 1, ASPECT_RULE: 1, "perceptual_hash": 1, "image_signature": 1}

_SIDES = ("width_px", "height_px")
HASH_BITS = 384
_GRID = 8
_MARGIN = 4  # of 255: above JPEG noise in flat areas, below any edge worth a bit


def size(min_side_px: "pl.Expr | int", max_aspect: "pl.Expr | float") -> "pl.Expr":
    """Judge the size of images as they came, by the columns width_px and height_px.

    The first rule is about the shorter side, the second about the longer side over the shorter side; the
    limits may be columns.
    """
    import polars as pl  # here: the workers of the download hash images, and need no tables

    shorter, longer = pl.min_horizontal(*_SIDES), pl.max_horizontal(*_SIDES)
    return (
        pl.when(shorter < min_side_px)
        .then(pl.lit(str(TOO_SMALL)))
        .when(longer > shorter * max_aspect)
        .then(pl.lit(str(ASPECT)))
    )


def perceptual_hash(image_HWC: npt.NDArray[np.uint8]) -> bytes:
    """Return the 384-bit hash of an RGB image [height, width, 3] uint8, as 48 bytes."""
    import cv2

    # One cell more than the grid in both directions, so that each cell has a right and a lower neighbour.
    small: npt.NDArray[Any] = cv2.resize(image_HWC, (_GRID + 1, _GRID + 1), interpolation=cv2.INTER_AREA)
    cells = small.astype(np.int16)
    right = cells[:-1, :-1] > cells[:-1, 1:] + _MARGIN
    below = cells[:-1, :-1] > cells[1:, :-1] + _MARGIN
    return np.packbits(np.stack([right, below]).ravel()).tobytes()
