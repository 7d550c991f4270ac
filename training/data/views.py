"""Augmented views of stored images, without torch: what an image worker computes."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from pipeline.core.files.images import BadImageError, decode_pixels
from pipeline.core.processes import say
from pipeline.core.records import InputError
from pipeline.core.shard_format import ByteRanges
from training.config.train import AugmentConfig
from training.data.augment import augment, sample_generator
from training.data.auto_augment import Pixels

# Which image to read, where it lies, and the epoch whose view is drawn. `piece` is the file of the cache that
# has the tar's bytes from `piece_start_bytes` on, NO_PIECE without a cache (training.data.shard_cache).
VISIT = np.dtype(
    [
        ("shard", "<i4"),
        ("offset_bytes", "<i8"),
        ("size_bytes", "<i8"),
        ("key", "S32"),
        ("image_id", "<i8"),
        ("epoch", "<i8"),
        ("piece", "<i4"),
        ("piece_start_bytes", "<i8"),
    ]
)
NO_PIECE = -1
IMAGE_ID_DIGITS = 15  # hexadecimal ones of an image's digest: 60 bits, what an int64 holds

Visits = npt.NDArray[np.void]  # [N] of VISIT


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """What a view is, and what it is read from."""

    paths: Sequence[str]  # of the shards' tars
    image_size_px: int
    augment: AugmentConfig
    seed: int
    open_shards: int  # tars that stay open
    cache_folder: str = ""  # of the pieces that visits name


@dataclass(frozen=True, slots=True)
class Part:
    """Some visits of a request, for one worker."""

    visits: Visits
    first_image: int  # of the ring, where the first view goes
    num_images: int


class ViewReader:
    """Reads images of shards, decodes each once, and draws the views that are asked of it."""

    def __init__(self, config: ViewConfig) -> None:
        self._config = config
        self._tar = functools.lru_cache(maxsize=config.open_shards)(
            lambda shard: ByteRanges(config.paths[shard], concurrent=True)
        )

    def read(self, visits: Visits, views_BHWC: Pixels) -> None:
        """Fill `views_BHWC`, uint8 RGB, with as many views of each visit as it has room for.

        The views of a visit lie one after the other; they are those of its epoch and of the epochs after it.

        Raises:
            InputError: with the tar and key of an image that cannot be read.
        """
        num_views = len(views_BHWC) // len(visits)
        for place, visit in enumerate(visits):
            key, epoch = bytes(visit["key"]), int(visit["epoch"])
            pixels = self._pixels(visit, key)
            for view in range(num_views):
                random = sample_generator(self._config.seed, epoch + view, key)
                views_BHWC[place * num_views + view] = augment(
                    pixels, self._config.image_size_px, self._config.augment, random
                )

    def _pixels(self, visit: np.void, key: bytes) -> Pixels:
        shard, name = int(visit["shard"]), f"{key.decode()}.jpg"
        data = self._cached(visit, name)
        if data is None:
            data = self._tar(shard).read(int(visit["offset_bytes"]), int(visit["size_bytes"]), name)
        # Hashing costs a tenth of decoding, and a damaged JPEG often still decodes, to another image.
        if not _is_image(data, visit):
            raise InputError(
                f"{self._config.paths[shard]}: {name} is not the image whose digest its sidecar"
                " holds: the tar is corrupt or not its sidecar's; run the shards stage again"
            )
        try:
            return decode_pixels(data)
        except BadImageError as error:
            raise InputError(
                f"{self._config.paths[shard]}: {name} cannot be decoded ({error}); leave the"
                " sample out: run filter_image and shards again"
            ) from None

    def _cached(self, visit: np.void, name: str) -> bytes | None:
        """Return an image's bytes from the cache; None without a cache, or if the disk has damaged them.

        Each read opens the file anew: the cache removes it once its samples are done, and an open file would
        keep its space.
        """
        if visit["piece"] == NO_PIECE:
            return None
        path = piece_path(self._config.cache_folder, int(visit["piece"]))
        start = int(visit["offset_bytes"] - visit["piece_start_bytes"])
        try:
            with ByteRanges(path) as piece:
                data = piece.read(start, int(visit["size_bytes"]), name)
        except (InputError, OSError):
            data = b""
        if _is_image(data, visit):
            return data
        say(
            f"{path}: {name} is damaged: cnclip reads it from {self._config.paths[int(visit['shard'])]} again"
        )
        return None


def piece_path(folder: str, piece: int) -> str:
    """Return the file of a piece in the folder of a cache."""
    return os.path.join(folder, f"{piece:08d}")


def _is_image(data: bytes, visit: np.void) -> bool:
    return bool(image_id_of(sha256(data).hexdigest()) == visit["image_id"])


def image_id_of(image_sha256: str) -> int:
    """Return the number that stands for an image with this digest."""
    return int(image_sha256[:IMAGE_ID_DIGITS], 16)
