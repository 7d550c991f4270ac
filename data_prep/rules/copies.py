"""Finds images that are copies of each other: hashes propose pairs, and signatures confirm them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.rules.image import HASH_BITS, perceptual_hash
from data_prep.rules.image_signature import are_copies, image_signature, signature_array

_INDEXED_AT_ONCE = 32_768  # hashes in one index
# Hashes in one search: at least this number, and more while few of them have near ones.
_FEWEST_AT_ONCE, _MOST_AT_ONCE = 128, 4_096
_PAIRS_AT_ONCE = 1 << 22  # that a search may find, 12 bytes each
_MOST_TRIED = 1_024  # candidates of one image per round


class Marks(NamedTuple):
    """The hash and signature that identify copies of an image: 48 and 384 bytes."""

    perceptual_hash: bytes
    image_signature: bytes


class Copies(NamedTuple):
    """Pairs of copies: index of one, index of the other, bits between their hashes, int64 [pairs] each."""

    place: npt.NDArray[np.int64]
    other: npt.NDArray[np.int64]
    bits: npt.NDArray[np.int64]


def marks_of(image_HWC: npt.NDArray[np.uint8]) -> Marks:
    """Return hash and signature of an RGB image [height, width, 3] uint8."""
    return Marks(perceptual_hash(image_HWC), image_signature(image_HWC))


class MarkedImages:
    """Images to compare others with, all with all, on every core (FAISS)."""

    def __init__(self, hashes: Sequence[bytes], signatures: Sequence[bytes]) -> None:
        import faiss

        self._signature_NB = signature_array(signatures)
        self._hash_NB = _hash_array(hashes)
        self._indices: list[Any] = []
        for first in range(0, len(self._hash_NB), _INDEXED_AT_ONCE):
            index = faiss.IndexBinaryFlat(HASH_BITS)
            index.add(self._hash_NB[first : first + _INDEXED_AT_ONCE])
            self._indices.append(index)

    def copies_among(self, distance: int) -> Iterator[Copies]:
        """Yield the copies among these images themselves, each pair once: place < other.

        A pair counts if either image is found in the other: near the limit that may differ.
        """
        signature_NB = self._signature_NB
        for near in self._near(self._hash_NB, distance):
            near = _chosen(near, near.place < near.other)
            is_copy = are_copies(signature_NB, signature_NB, near.place, near.other)
            rest = np.flatnonzero(~is_copy)
            is_copy[rest] = are_copies(signature_NB, signature_NB, near.other[rest], near.place[rest])
            yield _chosen(near, is_copy)

    def mark_copied(
        self,
        is_copied_N: npt.NDArray[np.bool_],
        hashes: Sequence[bytes],
        signatures: Sequence[bytes],
        distance: int,
    ) -> None:
        """Set True for the images that have a copy among the arguments; True values stay."""
        signature_NB = signature_array(signatures)
        for near in self._near(_hash_array(hashes), distance):
            near = _chosen(near, ~is_copied_N[near.other])
            for found in _first_copies(near.other, near.place, self._signature_NB, signature_NB, turned=True):
                is_copied_N[near.other[found]] = True

    def nearest_copies(self, hashes: Sequence[bytes], signatures: Sequence[bytes], distance: int) -> Copies:
        """Return the nearest original for each copy: fewest bits, then the first."""
        signature_NB, parts = signature_array(signatures), list[Copies]()
        for near in self._near(_hash_array(hashes), distance):
            near = _chosen(near, np.lexsort((near.other, near.bits, near.place)))
            parts += (
                _chosen(near, found)
                for found in _first_copies(near.place, near.other, signature_NB, self._signature_NB)
            )
        if not parts:
            nothing = np.empty(0, np.int64)
            return Copies(nothing, nothing, nothing)
        copies = Copies(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        copies = _chosen(copies, np.lexsort((copies.other, copies.bits, copies.place)))
        return _chosen(copies, np.unique(copies.place, return_index=True)[1])

    def _near(self, hash_NB: npt.NDArray[np.uint8], distance: int) -> Iterator[Copies]:
        """Yield pairs whose hashes are at most `distance` bits apart, in blocks."""
        for number, index in enumerate(self._indices):
            first, step = 0, _FEWEST_AT_ONCE
            while first < len(hash_NB):
                batch = hash_NB[first : first + step]
                limits, bits, other = index.range_search(batch, distance + 1)
                place = first + np.repeat(np.arange(len(batch)), np.diff(limits.astype(np.int64)))
                other = number * _INDEXED_AT_ONCE + other.astype(np.int64)
                yield Copies(place, other, bits.astype(np.int64))
                first += len(batch)
                if 4 * len(place) < _PAIRS_AT_ONCE:
                    step = min(2 * step, _MOST_AT_ONCE)
                elif len(place) > _PAIRS_AT_ONCE:
                    step = max(step // 2, _FEWEST_AT_ONCE)


def _first_copies(
    one_P: npt.NDArray[np.int64],
    two_P: npt.NDArray[np.int64],
    first_NB: npt.NDArray[np.uint8],
    second_MB: npt.NDArray[np.uint8],
    *,
    turned: bool = False,
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield which pairs are copies, the first such pair of each `one`.

    Pairs of one image are tried in rounds of doubling size, since pairs after the first copy are wasted work.
    `turned` compares `two` with `one`.
    """
    order = np.argsort(one_P, kind="stable")
    left_P, tried = order, 1
    while len(left_P):
        one = one_P[left_P]
        starts = np.flatnonzero(np.diff(one, prepend=-1))
        rank = np.arange(len(one)) - np.repeat(starts, np.diff(starts, append=len(one)))
        now = left_P[rank < tried]
        is_copy = (
            are_copies(second_MB, first_NB, two_P[now], one_P[now])
            if turned
            else are_copies(first_NB, second_MB, one_P[now], two_P[now])
        )
        hits = now[is_copy]
        done, at = np.unique(one_P[hits], return_index=True)
        yield hits[at]
        left_P = left_P[rank >= tried]
        left_P = left_P[~np.isin(one_P[left_P], done)]
        tried = min(2 * tried, _MOST_TRIED)


def _chosen(copies: Copies, which: npt.NDArray[Any]) -> Copies:
    return Copies(*(column[which] for column in copies))


def _hash_array(hashes: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BITS // 8)
