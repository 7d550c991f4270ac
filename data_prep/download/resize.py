"""The resizer that img2dataset calls: bytes from the web in, one upright 8-bit RGB JPEG out, or a reason.

img2dataset's own resizer ignores EXIF rotation (and strips the tag), turns 16-bit pictures white, fills a
truncated JPEG with grey, and allocates whatever size a header promises. This one decodes with Pillow,
which says what is wrong, after the header's size was checked.
"""

import contextlib
import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipeline.core.records import DropReason

NOT_AN_IMAGE = DropReason("not_an_image")
TRUNCATED = DropReason("truncated")
UNDECODABLE = DropReason("undecodable")
PIXEL_LIMIT = DropReason("pixel_limit")

# What a web corpus holds. Formats outside this list have decoders that see little use and much attack.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Bytes that begin in the way of a picture and still are none were damaged; others never were a picture.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_TRUNCATION_WORDS = (
    "truncated",
    "broken data stream",
    "unexpected end",
    "premature",
    "not enough image data",
)


@dataclass(frozen=True, slots=True)
class UprightResizer:
    """Stands in for img2dataset's Resizer; an error it returns begins with a DropReason and a colon."""

    short_side_px: int  # larger pictures are reduced to it, aspect kept; smaller ones stay as they are
    max_pixels: int  # of the picture as its header promises, before anything is decoded
    jpeg_quality: int
    # Decode a JPEG at 1/2, 1/4 or 1/8 of its size where that is still large enough (libjpeg's scaled inverse
    # DCT), and average pixels for the rest of the way: faster, a little softer.
    scaled_decode: bool = False

    def __call__(self, img_stream: Any, blurring_bbox_list: Any = None) -> tuple[Any, ...]:
        """(jpeg bytes, width, height, original width, original height, None), or five None and the error."""
        data = img_stream.read()
        try:
            image = _open(data, self.max_pixels)
            original_size = _upright_size(image)
            if self.scaled_decode:
                _draft(image, self.short_side_px)
            image = _upright(image)
        except BadImageError as error:
            return None, None, None, None, None, str(error)
        original_width, original_height = original_size
        scale = self.short_side_px / min(original_size)
        if scale < 1:
            size = (max(1, round(original_width * scale)), max(1, round(original_height * scale)))
            image = _average(image, size) if self.scaled_decode else _reduce(image, size)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.jpeg_quality, subsampling=0)
        return out.getvalue(), *image.size, original_width, original_height, None


class BadImageError(Exception):
    """`<DropReason>: what was found`."""


def decode_upright(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a picture to 8-bit RGB, turned as its EXIF tag says, transparency on white.

    BadImageError where the bytes are no picture, are cut off, do not decode, or promise more than
    `max_pixels` pixels.
    """
    return _upright(_open(data, max_pixels))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """A picture whose header was read and judged, and none of its pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is judged below, before any pixel is decoded
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        reason = UNDECODABLE if data.startswith(SIGNATURES) else NOT_AN_IMAGE
        raise BadImageError(f"{reason}: starts with {data[:12]!r}") from None
    except Image.DecompressionBombError as error:
        raise BadImageError(f"{PIXEL_LIMIT}: {error}") from None
    except Exception as error:
        raise BadImageError(f"{UNDECODABLE}: {error}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(f"{PIXEL_LIMIT}: {width} x {height} pixels, {max_pixels} allowed")
    return image


def _draft(image: Image.Image, short_side_px: int) -> None:
    """Have a JPEG decoded at the smallest of 1, 1/2, 1/4, 1/8 of its size that is at least as large."""
    scale = short_side_px / min(image.size)
    if scale < 1:
        width, height = image.size
        image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))  # type: ignore[arg-type]


def _reduce(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    # Whole blocks of pixels are averaged; the rest of the way, less than a half, is bicubic: twice as fast as
    # Lanczos on all pixels, and nearer to it than img2dataset's plain average
    # (benchmarks/data_prep/resize.py).
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=1.0)


def _average(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    import cv2

    # After a scaled decode less than half is left to do, where two neighbours a pixel are average enough.
    kind = cv2.INTER_LINEAR if image.width < 2 * size[0] else cv2.INTER_AREA
    return Image.fromarray(cv2.resize(np.asarray(image), size, interpolation=kind))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as shown: EXIF orientations 5 to 8 lie on their side."""
    orientation = 1
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    width, height = image.size
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _upright(image: Image.Image) -> Image.Image:
    """Decode the pixels, turn them as the EXIF tag says, and make them RGB."""
    try:
        image.load()
        with contextlib.suppress(Exception):  # a broken orientation tag is no reason to lose the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
        text = str(error).lower()
        reason = TRUNCATED if any(word in text for word in _TRUNCATION_WORDS) else UNDECODABLE
        raise BadImageError(f"{reason}: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Pillow cuts these off at 255; the upper byte is what a 16-bit picture shows.
        levels = np.asarray(image).astype(np.float64)
        if image.mode != "F":
            levels = levels / 257.0
        return Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
