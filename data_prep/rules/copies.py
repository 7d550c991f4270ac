"""Which images are copies of each other: the hash proposes pairs, the signatures confirm them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.rules.image import HASH_BITS, perceptual_hash
from data_prep.rules.image_signature import are_copies, image_signature, signature_array

_ROWS_AT_ONCE = 65_536
_PAIRS_AT_ONCE = 1 << 22  # that a search may find at most: 12 bytes each


class Marks(NamedTuple):
    """What is kept of an image to tell its copies: 48 and 384 bytes."""

    perceptual_hash: bytes
    image_signature: bytes


class Copies(NamedTuple):
    """Pairs of copies: place of one, place of the other, bits between their hashes, int64 [pairs] each."""

    place: npt.NDArray[np.int64]
    other: npt.NDArray[np.int64]
    bits: npt.NDArray[np.int64]


def marks_of(image_HWC: npt.NDArray[np.uint8]) -> Marks:
    """Hash and signature of an RGB image [height, width, 3] uint8."""
    return Marks(perceptual_hash(image_HWC), image_signature(image_HWC))


class MarkedImages:
    """Images that others are compared with, all with all, on every core (FAISS)."""

    def __init__(self, hashes: Sequence[bytes], signatures: Sequence[bytes]) -> None:
        import faiss

        self._signature_NB = signature_array(signatures)
        self._index: Any = faiss.IndexBinaryFlat(HASH_BITS)
        self._index.add(_hash_array(hashes))

    def copies_of(
        self, hashes: Sequence[bytes], signatures: Sequence[bytes], distance: int
    ) -> Iterator[Copies]:
        """Copies (place among the arguments, place among these images) at most `distance` bits apart."""
        if not len(self._signature_NB):
            return
        step = min(_ROWS_AT_ONCE, max(1, _PAIRS_AT_ONCE // len(self._signature_NB)))
        for first in range(0, len(hashes), step):
            batch = _hash_array(hashes[first : first + step])
            limits, bits, other = self._index.range_search(batch, distance + 1)
            place = np.repeat(np.arange(len(batch)), np.diff(limits.astype(np.int64)))
            signature_NB = signature_array(signatures[first : first + step])
            confirmed = are_copies(signature_NB, self._signature_NB, place, other)
            yield Copies(
                first + place[confirmed], other[confirmed].astype(np.int64), bits[confirmed].astype(np.int64)
            )

    def nearest_copies(self, hashes: Sequence[bytes], signatures: Sequence[bytes], distance: int) -> Copies:
        """For each place that is a copy, its nearest one: fewest bits, then the first."""
        parts = [*self.copies_of(hashes, signatures, distance)]
        if not parts:
            nothing = np.empty(0, np.int64)
            return Copies(nothing, nothing, nothing)
        place, other, bits = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((other, bits, place))
        first = order[np.unique(place[order], return_index=True)[1]]
        return Copies(place[first], other[first], bits[first])


def _hash_array(hashes: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BITS // 8)
