"""Find near duplicates among N perceptual hashes: ours, in bands, against FAISS comparing all pairs.

    python benchmarks/data_prep/near_copies.py [--rows N] [--distance BITS] [--full]

Signatures are equal, so that the hashes decide. Hashes are random except for planted copies a few bits away
and a fifth that share half of their bits, as images on a white ground do. Both sides find the rows that have
a near lower row; the sets are compared. `--full` adds a million rows without the peer, whose time grows with
the square. Last line: one JSON object.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from benchmarks.harness import parse, parser, record, report
from data_prep.dedup.near_duplicates import band_values, near_copies, near_hashes
from data_prep.rules.image import HASH_BITS
from data_prep.rules.image_signature import SIGNATURE_BYTES


def make_hashes(count: int, distance: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return hash_NB uint8 [count, 48]; one in twenty copies another, up to `distance` + 4 bits away."""
    hash_NB = rng.integers(0, 256, (count, HASH_BITS // 8), dtype=np.uint8)
    hash_NB[: count // 5, ::2] = 0
    rows = rng.choice(count, count // 20, replace=False)
    bits = np.unpackbits(hash_NB[rng.integers(0, count, len(rows))], axis=1)
    for flips in range(distance + 4):
        chosen = rng.random(len(rows)) < (flips + 1) / (distance + 4)
        places = rng.integers(0, HASH_BITS, len(rows))
        bits[chosen, places[chosen]] ^= 1
    hash_NB[rows] = np.packbits(bits, axis=1)
    return hash_NB


def ours(hash_NB: npt.NDArray[np.uint8], distance: int) -> set[int]:
    keys = pl.Series("key", [f"{number:032x}" for number in range(len(hash_NB))])
    hashes = pl.Series("perceptual_hash", [row.tobytes() for row in hash_NB], dtype=pl.Binary)
    found: set[str] = set()
    for band in range(distance + 1):
        values = pl.Series("band", band_values(hash_NB, band, distance + 1))
        near = near_hashes(pl.DataFrame([keys, hashes, values]), distance)
        near = near.with_columns(image_signature=pl.lit(bytes(SIGNATURE_BYTES)))
        found |= set(near_copies(near, distance)["key"])
    return {int(key, 16) for key in found}


def all_pairs(hash_NB: npt.NDArray[np.uint8], distance: int) -> set[int]:
    import faiss

    index: Any = faiss.IndexBinaryFlat(HASH_BITS)
    index.add(hash_NB)
    limits, _, found = index.range_search(hash_NB, distance + 1)
    row_M = np.repeat(np.arange(len(hash_NB)), np.diff(limits.astype(np.int64)))
    return set(row_M[found < row_M].tolist())


def main() -> int:
    made = parser(__doc__, full="a million rows too, without the peer")
    made.add_argument("--rows", type=int, default=50_000)
    made.add_argument("--distance", type=int, default=7)
    options = parse(made)
    rng = np.random.default_rng(0)
    hash_NB = make_hashes(options.rows, options.distance, rng)
    started = time.perf_counter()
    copies = ours(hash_NB, options.distance)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    expected = all_pairs(hash_NB, options.distance)
    peer_seconds = time.perf_counter() - started
    print(f"{options.rows:,} hashes, {len(copies):,} copies: {seconds:.2f} s, all pairs {peer_seconds:.2f} s")
    if options.full:
        many_NB = make_hashes(1_000_000, options.distance, rng)
        started = time.perf_counter()
        count = len(ours(many_NB, options.distance))
        print(f"1,000,000 hashes, {count:,} copies: {time.perf_counter() - started:.2f} s")
    return report(record("near_copies", seconds, peer_seconds, "s", equal=copies == expected))


if __name__ == "__main__":
    sys.exit(main())
