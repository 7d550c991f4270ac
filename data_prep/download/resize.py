"""The resizer that img2dataset calls: it turns bytes from the web into an upright 8-bit RGB JPEG.

A JPEG that is one already, and not larger than asked for, keeps its bytes, without its metadata.

img2dataset's own resizer ignores EXIF rotation (and strips the tag), turns 16-bit images white, fills a
truncated JPEG with grey, and allocates any size that a header promises. This one checks the header's size
first and then decodes with Pillow, which says what is wrong.
"""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_prep.download.jpeg import plain_jpeg
from data_prep.rules.copies import Marks, marks_of
from pipeline.core.files.images import (
    UNDECODABLE,
    BadImageError,
    is_turned,
    open_image,
    upright,
    upright_size,
)

_MOST_JPEG_PX = 65_500  # libjpeg's limit


class StoredImage(bytes):
    """The bytes of an image as it is stored, with the marks of its pixels, which are in hand here only."""

    marks: Marks


@dataclass(frozen=True, slots=True)
class UprightResizer:
    """Replaces img2dataset's Resizer; its errors begin with a DropReason and a colon."""

    short_side_px: int  # larger images are reduced to it with their aspect; smaller ones stay
    max_pixels: int  # according to the header, checked before decoding
    jpeg_quality: int
    # Decode a JPEG at 1/2, 1/4 or 1/8 of its size if that is still large enough (libjpeg's scaled inverse
    # DCT), and average pixels for the remaining reduction: faster, a little softer.
    scaled_decode: bool = False

    def __call__(self, img_stream: Any, blurring_bbox_list: Any = None) -> tuple[Any, ...]:
        """Return (`StoredImage`, width, height, original width, height, None), or five None and the error."""
        data = img_stream.read()
        try:
            return self._resized(data)
        except BadImageError as error:
            return None, None, None, None, None, str(error)
        except MemoryError:
            raise  # of the machine: the row is worth another try
        except Exception as error:  # img2dataset would lose the row, and each further try as well
            return None, None, None, None, None, f"{UNDECODABLE}: {type(error).__name__}: {error}"

    def _resized(self, data: bytes) -> tuple[Any, ...]:
        image = open_image(data, self.max_pixels)
        original_size = upright_size(image)
        is_upright = not is_turned(image)
        if self.scaled_decode:
            _draft(image, self.short_side_px)
        image = upright(image)
        original_width, original_height = original_size
        # A strip whose short side is small enough may still have a side that no JPEG can have.
        scale = min(self.short_side_px / min(original_size), _MOST_JPEG_PX / max(original_size))
        if scale < 1:
            size = (max(1, round(original_width * scale)), max(1, round(original_height * scale)))
            image = _average(image, size) if self.scaled_decode else _reduce(image, size)
        as_it_came = plain_jpeg(data) if is_upright and scale >= 1 else None
        stored = StoredImage(self._encoded(image) if as_it_came is None else as_it_came)
        stored.marks = marks_of(np.asarray(image))
        return stored, *image.size, original_width, original_height, None

    def _encoded(self, image: Image.Image) -> bytes:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.jpeg_quality, subsampling=0)
        return out.getvalue()


def _draft(image: Image.Image, short_side_px: int) -> None:
    """Let Pillow decode a JPEG at the smallest of 1, 1/2, 1/4, 1/8 of its size that is still large enough."""
    scale = short_side_px / min(image.size)
    if scale < 1:
        width, height = image.size
        image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))  # type: ignore[arg-type]


def _reduce(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    # Average whole blocks of pixels and reduce the rest, less than a half, bicubically: twice as fast as
    # Lanczos on all pixels, and closer to it than img2dataset's plain average
    # (benchmarks/data_prep/resize.py).
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=1.0)


def _average(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    import cv2

    # After a scaled decode the remaining factor is below 2, so averaging two neighbours per pixel is enough.
    kind = cv2.INTER_LINEAR if image.width < 2 * size[0] else cv2.INTER_AREA
    return Image.fromarray(cv2.resize(np.asarray(image), size, interpolation=kind))
