"""Images as a model sees them outside of training, without torch: what an image worker decodes."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.core.arrays import UInt8Array
from pipeline.core.files.images import BadImageError, Decode, decode_square, decode_upright, square_of
from pipeline.core.shard_format import ByteRanges
from training.data.image_parts import LeftOut

_OPEN_TARS = 16

# How an image becomes a square: Chinese CLIP squashes it, OpenAI's CLIP crops its centre.
Fit = Literal["squash", "crop"]


@dataclass(frozen=True, slots=True)
class ImageRange:
    """An encoded image in a tar, which the process that decodes it reads."""

    path: str
    offset_bytes: int | None
    size_bytes: int | None
    name: str  # in errors, such as `<key>.jpg`


# Encoded, in a tar, decoded already, or not to be had.
AnyImage = bytes | ImageRange | Image.Image | BadImageError


@dataclass(frozen=True, slots=True, kw_only=True)
class SquareConfig:
    """What a model sees of an image."""

    image_size_px: int
    decode: Decode = "upright"  # of images other than 8-bit RGB
    fit: Fit = "squash"

    def open(self) -> "SquareReader":
        """Return what decodes by these settings."""
        return SquareReader(self)

    def before_sending(self, image: AnyImage) -> "AnyImage | UInt8Array":
        """Return what another process can decode: for an image that Pillow has opened, its square."""
        if not isinstance(image, Image.Image):
            return image
        try:
            return _square(image, self)
        except BadImageError as error:
            return error


class SquareReader:
    """Decodes images to squares."""

    def __init__(self, config: SquareConfig) -> None:
        self._config = config
        self._tar = functools.lru_cache(maxsize=_OPEN_TARS)(ByteRanges)

    def read(self, images: Sequence[AnyImage | UInt8Array], squares_BHWC: UInt8Array) -> LeftOut:
        """Fill `squares_BHWC`, uint8 RGB, and return the rows of images that cannot be decoded, with reasons.

        Raises:
            InputError: if a tar cannot be read where an image should be.
        """
        left_out = LeftOut()
        for row, image in enumerate(images):
            if isinstance(image, ImageRange):
                image = self._tar(image.path).read(image.offset_bytes, image.size_bytes, image.name)
            try:
                squares_BHWC[row] = _square(image, self._config)
            except BadImageError as error:
                left_out[row] = str(error)
        return left_out


def _square(image: bytes | Image.Image | UInt8Array | BadImageError, config: SquareConfig) -> UInt8Array:
    """Return an image's pixels as a square, [H, W, 3].

    Raises:
        BadImageError: if it cannot be decoded.
    """
    if isinstance(image, BadImageError):
        raise image
    if isinstance(image, np.ndarray):
        return image
    if config.fit == "crop":
        square = _cropped(image if isinstance(image, Image.Image) else decode_upright(image), config)
    elif isinstance(image, Image.Image):
        square = square_of(image, config.image_size_px, config.decode)
    else:
        square = decode_square(image, config.image_size_px, config.decode)
    return np.asarray(square, dtype=np.uint8)


def _cropped(rgb: Image.Image, config: SquareConfig) -> Image.Image:
    """Return the centre of an image whose shorter side was resized (bicubic), as OpenAI's CLIP does."""
    side_px, short = config.image_size_px, min(rgb.size)
    width_px, height_px = (side_px if edge == short else int(side_px * edge / short) for edge in rgb.size)
    rgb = rgb.resize((width_px, height_px), Image.Resampling.BICUBIC)
    left, top = (round((edge - side_px) / 2) for edge in rgb.size)
    return rgb.crop((left, top, left + side_px, top + side_px))
