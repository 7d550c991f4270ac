"""Image features of stage 1, computed once: K augmented views of every image through the locked tower.

One file a shard, next to the shards, named by a digest of all that a feature depends on; every read checks a
CRC-32. docs/concepts/determinism.md, "Random draws", has the layout and which epoch reads which view.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.core import store
from pipeline.core.arrays import Float16Array, UInt8Array
from pipeline.core.config import digest
from pipeline.core.files.npy import map_npy
from pipeline.core.files.written import write_npy
from pipeline.core.records import InputError, Shard
from training.config.train import AugmentConfig

_OPEN_FILES = 4096  # memory maps that stay open; a rank's lanes come back to the same few shards
_SAMPLES_AT_ONCE = 64


def cache_key(
    tower: nn.Module,
    augment: AugmentConfig,
    *,
    image_size_px: int,
    seed: int,
    num_views: int,
    dtype: torch.dtype,
) -> str:
    """Return a hexadecimal digest of what the features depend on besides the images; `dtype`: computed in."""
    weights = sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    # The reading of views is versioned by hand: augment.py is code, which no digest of settings covers.
    return digest("features", 3, weights.hexdigest(), augment, image_size_px, seed, num_views, str(dtype))[
        :32
    ]


class FeatureCache:
    """The features of some shards; `read` after `missing` files were made with `write`."""

    def __init__(self, shards: Sequence[Shard], key: str, *, num_views: int, dim: int) -> None:
        self._shards, self._key = shards, key
        self.num_views, self._dim = num_views, dim
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)

    def path(self, shard: int) -> str:
        """Return where the features of a shard are; a local path."""
        found = self._shards[shard]
        if not store.is_local(found.path):
            raise InputError(
                f"{found.path}: cached_views needs shards on a file system: features are read by memory map;"
                " copy the shards, or train with cached_views = 0"
            )
        name = f"{self._key}-{found.digest[:32]}.npy"
        return os.path.join(os.path.dirname(found.path), "features", name)

    def missing(self) -> list[int]:
        """Return the shards without features, in order."""
        return [shard for shard in range(len(self._shards)) if not os.path.exists(self.path(shard))]

    def write(self, shard: int, feature_NKD: Float16Array) -> None:
        """Publish a shard's features: the file is whole or not there.

        Raises:
            InputError: if the disk is full.
        """
        path = self.path(shard)
        record_NK = np.empty(feature_NKD.shape[:2], _record(self._dim))
        record_NK["feature"] = feature_NKD
        for row, view in np.ndindex(*record_NK.shape):
            record_NK["crc32"][row, view] = _crc32(feature_NKD[row, view], row, view)
        try:
            write_npy(path, record_NK)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); make room (a view takes {2 * self._dim + 4}"
                " bytes) and rerun the same command to resume"
            ) from None

    def read(self, shard: int, row: int, epoch: int) -> Float16Array:
        """Return feature_D of one sample in one epoch.

        Raises:
            InputError: if its bytes are not those written.
        """
        view = epoch % self.num_views
        record = self._open(shard)[row, view]
        feature: Float16Array = record["feature"]
        if _crc32(feature, row, view) != record["crc32"]:
            raise InputError(
                f"{self.path(shard)}: row {row}, view {view}: other bytes than were written (CRC-32 differs):"
                " the disk or a copy damaged it; remove the file: cnclip builds it again"
            )
        return feature

    def _open_file(self, shard: int) -> npt.NDArray[np.void]:
        path = self.path(shard)
        expected = (self._shards[shard].num_samples, self.num_views)
        records: npt.NDArray[np.void] = map_npy(path, "remove the file: cnclip builds it again")
        dtype = _record(self._dim)
        if records.shape != expected or records.dtype != dtype:
            raise InputError(
                f"{path}: {records.dtype} {records.shape}, but its shard wants {dtype} {expected};"
                " remove the file: cnclip builds it again"
            )
        return records


def _record(dim: int) -> np.dtype[np.void]:
    return np.dtype([("feature", "<f2", (dim,)), ("crc32", "<u4")])


def _crc32(feature_D: Float16Array, row: int, view: int) -> int:
    """Return the CRC of the bytes and of their place: a feature in another's place is damage too."""
    return zlib.crc32(feature_D.tobytes(), zlib.crc32(f"{row} {view}".encode()))


def build(
    cache: FeatureCache,
    shards: Sequence[int],
    num_samples: Callable[[int], int],
    images: Callable[[list[tuple[int, int, int]]], UInt8Array],
    encode: Callable[[Tensor], Tensor],
    show: Callable[[int, int], Any],
    is_asked_to_stop: Callable[[], bool],
) -> None:
    """Make the features of `shards`, or as many as there are before it is asked to stop, even within a shard.

    Stopped or killed and called again, it continues with the first shard that has none.

    `images` gives uint8 views [B, H, W, 3] of (shard, row, epoch); `encode` unit-norm float32 feature_BD of
    uint8 [B, 3, H, W]; `show` gets (shards done, of all).
    """
    for done, shard in enumerate(shards):
        show(done, len(shards))
        rows = range(num_samples(shard))
        parts = []
        for first in range(0, len(rows), _SAMPLES_AT_ONCE):
            if is_asked_to_stop():
                return
            some = rows[first : first + _SAMPLES_AT_ONCE]
            views = images([(shard, row, view) for row in some for view in range(cache.num_views)])
            feature = encode(torch.from_numpy(views).permute(0, 3, 1, 2)).cpu().numpy()
            parts.append(feature.astype(np.float16).reshape(len(some), cache.num_views, -1))
        cache.write(shard, np.concatenate(parts))
    show(len(shards), len(shards))
