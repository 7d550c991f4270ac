"""Bits between perceptual hashes, counted one by one."""

import numpy as np
import numpy.typing as npt

from data_prep.rules.image import HASH_BITS


def nearest_hash_distances(hashes: list[bytes], references: list[bytes]) -> npt.NDArray[np.int32]:
    """Return the bits between each hash and the nearest reference, int32 [len(hashes)].

    Without references they are HASH_BITS.
    """
    one, other = (
        np.frombuffer(b"".join(side), np.uint8).reshape(-1, HASH_BITS // 8) for side in (hashes, references)
    )
    distance = np.bitwise_count(one[:, None] ^ other[None]).sum(axis=2, dtype=np.int32)
    nearest: npt.NDArray[np.int32] = distance.min(axis=1, initial=HASH_BITS)
    return nearest
