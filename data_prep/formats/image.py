"""Decoding images from the web: upright 8-bit RGB, or a drop reason.

Pillow says what is wrong with an image, after the size that its header promises was checked.
"""

import contextlib
import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipeline.core.records import DropReason

NOT_AN_IMAGE = DropReason("not_an_image")
TRUNCATED = DropReason("truncated")
UNDECODABLE = DropReason("undecodable")
PIXEL_LIMIT = DropReason("pixel_limit")

# What a web corpus holds. Formats outside this list have decoders that see little use and much attack.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Bytes that begin in the way of an image and still are none were damaged; others never were an image.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_TRUNCATION_WORDS = (
    "truncated",
    "broken data stream",
    "unexpected end",
    "premature",
    "not enough image data",
)


class BadImageError(Exception):
    """`<DropReason>: what was found`."""


def decode_upright(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an image to 8-bit RGB, turned as its EXIF tag says, transparency on white.

    BadImageError where the bytes are no image, are cut off, do not decode, or promise more than
    `max_pixels` pixels.
    """
    return upright(open_image(data, max_pixels))


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """A image whose header was read and judged, and none of its pixels."""
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


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as shown: EXIF orientations 5 to 8 lie on their side."""
    orientation = 1
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    width, height = image.size
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def upright(image: Image.Image) -> Image.Image:
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
        # Pillow cuts these off at 255; the upper byte is what a 16-bit image shows.
        levels = np.asarray(image).astype(np.float64)
        if image.mode != "F":
            levels = levels / 257.0
        return Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
