"""The resizer that img2dataset calls: bytes from the web in, one upright 8-bit RGB JPEG out, or a reason.

img2dataset's own resizer ignores EXIF rotation (and strips the tag), turns 16-bit pictures white, fills a
truncated JPEG with grey, and allocates whatever size a header promises. This one decodes with Pillow,
which says what is wrong, after the header's size was checked.
"""

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.records import DropReason

NOT_AN_IMAGE = DropReason("not_an_image")
TRUNCATED = DropReason("truncated")
UNDECODABLE = DropReason("undecodable")
PIXEL_LIMIT = DropReason("pixel_limit")

# What a web corpus holds. Formats outside this list have decoders that see little use and much attack.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Bytes that begin in the way of a picture and still are none were damaged; others never were a picture.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
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

    def __call__(self, img_stream: Any, blurring_bbox_list: Any = None) -> tuple[Any, ...]:
        """(jpeg bytes, width, height, original width, original height, None), or five None and the error."""
        data = img_stream.read()
        try:
            image = decode_upright(data, self.max_pixels)
        except BadImageError as error:
            return None, None, None, None, None, str(error)
        original_width, original_height = image.size
        scale = self.short_side_px / min(image.size)
        if scale < 1:
            size = (max(1, round(original_width * scale)), max(1, round(original_height * scale)))
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is judged below, before any pixel is decoded
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        reason = UNDECODABLE if data.startswith(_SIGNATURES) else NOT_AN_IMAGE
        raise BadImageError(f"{reason}: starts with {data[:12]!r}") from None
    except Image.DecompressionBombError as error:
        raise BadImageError(f"{PIXEL_LIMIT}: {error}") from None
    except Exception as error:
        raise BadImageError(f"{UNDECODABLE}: {error}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(f"{PIXEL_LIMIT}: {width} x {height} pixels, {max_pixels} allowed")
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
    return image.convert("RGB")
