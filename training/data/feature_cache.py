"""Image features of stage 1, computed once: K augmented views of every image through the locked tower.

One file a shard, next to the shards, named by a digest of all that a feature depends on; reading checks a
CRC-32. docs/concepts/determinism.md, "Random draws", has the layout and which epoch reads which view.
"""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.core import store
from pipeline.core.arrays import Float16Array, Int64Array
from pipeline.core.config import digest
from pipeline.core.files.npy import map_npy
from pipeline.core.files.written import write_npy
from pipeline.core.records import InputError, Shard
from training.config.train import AugmentConfig
from training.data.feeder import Request
from training.data.sampler import by_shard
from training.data.views import Visits

_OPEN_FILES = 4096  # memory maps that stay open; a rank's lanes come back to the same few shards
_SAMPLES_AT_ONCE = 64  # whose views are computed together
_SAMPLES_OF_BLOCK = 64  # with one CRC


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
    return digest("features", 4, weights.hexdigest(), augment, image_size_px, seed, num_views, str(dtype))[
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
                f"{found.path}: cached_views needs shards on a file system: features lie next to them and are"
                " read by memory map; set cached_views = 0, or copy the shards to a disk"
            )
        name = f"{self._key}-{found.digest[:32]}.npy"
        return os.path.join(os.path.dirname(found.path), "features", name)

    def missing(self) -> list[int]:
        """Return the shards without features, in order."""
        return [shard for shard in range(len(self._shards)) if not os.path.exists(self.path(shard))]

    def num_samples(self, shard: int) -> int:
        """Return the number of a shard's samples."""
        return self._shards[shard].num_samples

    def write(self, shard: int, feature_KND: Float16Array) -> None:
        """Publish a shard's features by view: the file is whole or not there.

        Raises:
            InputError: if the disk is full.
        """
        path = self.path(shard)
        num_views, num_samples, _ = feature_KND.shape
        block_KC = np.zeros((num_views, -(-num_samples // _SAMPLES_OF_BLOCK)), _block(self._dim))
        for first in range(0, num_samples, _SAMPLES_OF_BLOCK):
            some = feature_KND[:, first : first + _SAMPLES_OF_BLOCK]
            block_KC["feature"][:, first // _SAMPLES_OF_BLOCK, : some.shape[1]] = some
        for view, block in np.ndindex(*block_KC.shape):
            block_KC["crc32"][view, block] = _crc32(block_KC["feature"][view, block], view, block)
        try:
            write_npy(path, block_KC)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); make room (a view takes {2 * self._dim}"
                " bytes) and rerun the same command to resume"
            ) from None

    def read(self, shard_B: Int64Array, row_B: Int64Array, epoch_B: Int64Array) -> Float16Array:
        """Return feature_BD of samples, each in its epoch.

        Raises:
            InputError: if the bytes of a block that holds one of them are not those written.
        """
        feature_BD = np.empty((len(row_B), self._dim), np.float16)
        for shard, at in by_shard(shard_B):
            file, view, epoch = self._open(shard), epoch_B[at] % self.num_views, epoch_B[at]
            block, row = np.divmod(row_B[at], _SAMPLES_OF_BLOCK)
            if (stale := file.checked_in_KC[view, block] != epoch).any():
                self._check(shard, file, np.stack([view, block, epoch])[:, stale])
            feature_BD[at] = file.block_KC["feature"][view, block, row]
        return feature_BD

    def _check(self, shard: int, file: "_OpenFile", place_3M: Int64Array) -> None:
        """Compare the CRCs of blocks; `place_3M` has the view, the block and the epoch of each."""
        for view, block, epoch in np.unique(place_3M, axis=1).T.tolist():
            if (
                _crc32(file.block_KC["feature"][view, block], view, block)
                != file.block_KC["crc32"][view, block]
            ):
                first = block * _SAMPLES_OF_BLOCK
                raise InputError(
                    f"{self.path(shard)}: view {view}, rows {first} to {first + _SAMPLES_OF_BLOCK - 1}: other"
                    " bytes than were written (CRC-32 differs): the disk or a copy damaged it; remove the"
                    " file: cnclip builds it again"
                )
            file.checked_in_KC[view, block] = epoch

    def _open_file(self, shard: int) -> "_OpenFile":
        path = self.path(shard)
        expected = (self.num_views, -(-self.num_samples(shard) // _SAMPLES_OF_BLOCK))
        blocks: npt.NDArray[np.void] = map_npy(path, "remove the file: cnclip builds it again")
        dtype = _block(self._dim)
        if blocks.shape != expected or blocks.dtype != dtype:
            raise InputError(
                f"{path}: {blocks.dtype} {blocks.shape}, but its shard wants {dtype} {expected};"
                " remove the file: cnclip builds it again"
            )
        return _OpenFile(blocks.view(np.ndarray), np.full(expected, -1))


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """A shard's features, mapped, and in which epoch each block was compared with its CRC last."""

    block_KC: npt.NDArray[np.void]
    checked_in_KC: Int64Array


def _block(dim: int) -> np.dtype[np.void]:
    return np.dtype([("feature", "<f2", (_SAMPLES_OF_BLOCK, dim)), ("crc32", "<u4")])


def _crc32(feature_SD: Float16Array, view: int, block: int) -> int:
    """Return the CRC of the bytes and of their place: features in another's place are damage too."""
    return zlib.crc32(feature_SD.data, zlib.crc32(f"{view} {block}".encode()))


def requests(
    cache: FeatureCache, shards: Sequence[int], visits: Callable[[int, range], Visits]
) -> Iterator[Request[Tensor]]:
    """Yield what `build` computes on: all views of some samples, uint8 [samples * K, 3, H, W].

    `visits` gives the images of rows of a shard, in epoch 0.
    """
    for shard in shards:
        for rows in _parts(cache.num_samples(shard)):
            yield Request(lambda image: image, wanted=visits(shard, rows), num_views=cache.num_views)


def most_images(num_views: int) -> int:
    """Return how many views `requests` asks for at once, at most."""
    return num_views * _SAMPLES_AT_ONCE


def build(
    cache: FeatureCache,
    shards: Sequence[int],
    images: Iterator[Tensor],
    encode: Callable[[Tensor], Tensor],
    show: Callable[[int, int], Any],
    is_asked_to_stop: Callable[[], bool],
) -> None:
    """Make the features of `shards`, or as many as there are before it is asked to stop, even within a shard.

    Stopped or killed and called again, it continues with the first shard that has none.

    `images` are what `requests` asks for; `encode` gives unit-norm float32 feature_BD of uint8 [B, 3, H, W];
    `show` gets (shards done, of all).
    """
    for done, shard in enumerate(shards):
        show(done, len(shards))
        parts = []
        for _ in _parts(cache.num_samples(shard)):
            if is_asked_to_stop():
                return
            # The host does not wait for a GPU before the shard is complete.
            parts.append(encode(next(images)).half())
        feature_NKD = torch.cat(parts).view(cache.num_samples(shard), cache.num_views, -1)
        cache.write(shard, feature_NKD.transpose(0, 1).cpu().numpy())
    show(len(shards), len(shards))


def _parts(num_samples: int) -> Iterator[range]:
    return (
        range(first, min(first + _SAMPLES_AT_ONCE, num_samples))
        for first in range(0, num_samples, _SAMPLES_AT_ONCE)
    )
