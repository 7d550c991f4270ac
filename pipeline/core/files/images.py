"""Decodes images for every stage and command: the only place where the bytes of a file become pixels.

Images become upright 8-bit RGB: rotated by their EXIF tag, 16 bits scaled, transparency on white. For
ordinary 8-bit RGB the pixels are bit-identical to Pillow's, and so to Chinese CLIP's.
"""

import contextlib
import io
import warnings
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from pipeline.core.arrays import UInt8Array
from pipeline.core.files.image_formats import SIGNATURES, name_format, name_tiff, plugin_of, skip_leading
from pipeline.core.records import DropReason
from pipeline.core.shard_format import MAX_IMAGE_PIXELS

# How to decode: `upright` as above; `reference` like Chinese CLIP's code, which ignores EXIF, clips 16 bits
# at 255, shows colours under transparency, and resizes before it converts to RGB.
Decode = Literal["upright", "reference"]
DECODES: tuple[Decode, ...] = ("upright", "reference")

NOT_AN_IMAGE = DropReason("not_an_image")
TRUNCATED = DropReason("truncated")
UNDECODABLE = DropReason("undecodable")
PIXEL_LIMIT = DropReason("pixel_limit")

FORMAT = DropReason("format")  # `format:heic`: an image in a format that is not read, or not without a plugin

# What a corpus or an evaluation set holds, as far as Pillow is built with it. Formats outside this list have
# decoders that see little use and much attack. PPM: the traffic signs of ICinW.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"),
    *(["AVIF"] if features.check("avif") else ()),
    *(["JPEG2000"] if features.check("jpg_2000") else ()),
)
_NAMES = {"avif": "AVIF", "jp2": "JPEG2000"}  # in `name_format` and in Pillow
_TRUNCATION_WORDS = (
    "truncated",
    "broken data stream",
    "unexpected end",
    "premature",
    "not enough image data",
)
# Levels of a PNG's grey values by Pillow's layout name: Pillow scales the pixels to 255, but not the
# transparent value in the header.
_GREY_LEVELS = {"1": 255, "L;2": 85, "L;4": 17}
_LAYOUT = "_layout_in_file"  # attribute of an image whose pixels `square_of` decoded
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_JPEG_EXIF, _JPEG_ADOBE = 0xE1, 0xEE

# Design programs write texts and colour profiles of megabytes into a PNG; a bomb unpacks to gigabytes.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20


class BadImageError(Exception):
    """An image that cannot be used; the message is `<DropReason>: what was found`."""


def decode_upright(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode an image to 8-bit RGB, rotated by its EXIF tag, with transparency on white.

    Raises:
        BadImageError: if the bytes are not an image, are truncated, do not decode, or the header has more
            than `max_pixels` pixels.
    """
    return upright(open_image(data, max_pixels))


def decode_pixels(data: bytes) -> UInt8Array:
    """Return the pixels of `decode_upright`, [H, W, 3], for training, with a shortcut for plain JPEGs.

    Raises:
        BadImageError: as `decode_upright`.
    """
    if _is_plain_jpeg(data):
        # OpenCV has the same decoder with the same result and makes no intermediate image.
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is not None:
            return np.asarray(pixels, dtype=np.uint8)
    return np.asarray(decode_upright(data), dtype=np.uint8)


def decode_square(data: bytes, side_px: int, decode: Decode = "upright") -> Image.Image:
    """Decode an image and resize it to a square (bicubic) without a crop, changing its aspect.

    Raises:
        BadImageError: as `decode_upright`.
    """
    return squash(open_image(data, MAX_IMAGE_PIXELS), side_px, decode)


def square_of(image: Image.Image, side_px: int, decode: Decode = "upright") -> Image.Image:
    """Return the square of `decode_square` for an image that Pillow opened; the image is not modified.

    Pillow forgets the bit depth of a grey PNG when it decodes the pixels. So for one with 2 or 4 bits and a
    transparent value, pass the bytes, or the opened image before anything else decodes it.

    Raises:
        BadImageError: as `decode_square`.
    """
    _check_pixels(image, MAX_IMAGE_PIXELS)
    layout = _layout(image)
    try:
        copy = image.copy()  # decodes the pixels
    except Exception as error:
        raise _undecodable(error) from None
    setattr(image, _LAYOUT, layout)  # for the next time
    return squash(copy, side_px, decode, layout)


def squash(
    image: Image.Image, side_px: int, decode: Decode = "upright", layout: str | None = None
) -> Image.Image:
    """Return an opened image as an RGB square; see `decode_square`.

    The image may be modified.
    """
    square = (side_px, side_px)
    if decode == "upright":
        return upright(image, layout).resize(square, Image.Resampling.BICUBIC)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # on palettes with transparency, which the reference does not show
            return image.resize(square, Image.Resampling.BICUBIC).convert("RGB")
    except Exception as error:
        raise _undecodable(error) from None


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Return an image whose header was read and judged, and none of its pixels. Of an animation: its first.

    Raises:
        BadImageError: if the bytes are no image, or promise more than `max_pixels` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is judged below, before any pixel is decoded
            image = _identify(data)
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"{PIXEL_LIMIT}: {error}") from None
    except Exception as error:
        raise BadImageError(f"{UNDECODABLE}: {error}") from None
    _check_pixels(image, max_pixels)
    return image


def _identify(data: bytes) -> Image.Image:
    with contextlib.suppress(UnidentifiedImageError):
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    begin = skip_leading(data)
    if len(begin) < len(data):
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(io.BytesIO(begin), formats=_FORMATS)
    name = name_format(begin)
    formats = plugin_of(name) if name else ()
    if formats:
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(io.BytesIO(begin), formats=formats)
    if (tiff := name_tiff(begin)) is not None:
        raise BadImageError(f"{FORMAT}:{tiff[0]}: {tiff[1]}")
    found = f"starts with {data[:12]!r}" if data else "an empty file"
    if begin.startswith(SIGNATURES) or formats or _NAMES.get(name or "") in _FORMATS:
        raise BadImageError(f"{UNDECODABLE}: {found}")
    reason = f"{FORMAT}:{name}" if name else NOT_AN_IMAGE
    raise BadImageError(f"{reason}: {found}")


def _check_pixels(image: Image.Image, most: int) -> None:
    width, height = image.size
    if width * height > most:
        raise BadImageError(f"{PIXEL_LIMIT}: {width} x {height} pixels, {most} allowed")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height as displayed; EXIF orientations 5 to 8 swap them."""
    width, height = image.size
    if image.format in ("TIFF", "JXL"):
        return width, height  # their decoders turn these themselves, and give their size as turned
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def is_turned(image: Image.Image) -> bool:
    """Return whether an opened image's EXIF tells to turn or mirror its pixels."""
    return _orientation(image) in range(2, 9)


def _orientation(image: Image.Image) -> int:
    orientation = 1
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation


def upright(image: Image.Image, layout: str | None = None) -> Image.Image:
    """Decode the pixels, rotate them by the EXIF tag, and convert them to RGB.

    `layout` is Pillow's name of the file's pixel layout, for an image with already decoded pixels.
    """
    layout = _layout(image) if layout is None else layout  # only known before decoding
    try:
        image.load()
        # A broken orientation tag is no reason to lose the pixels. JPEG XL has an orientation of its own, and
        # that of EXIF does not count (ISO/IEC 18181-2, 9.4).
        with contextlib.suppress(Exception):
            if image.format != "JXL":
                ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, layout)
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise _undecodable(error) from None


def _undecodable(error: Exception) -> BadImageError:
    text = str(error).lower()
    reason = TRUNCATED if any(word in text for word in _TRUNCATION_WORDS) else UNDECODABLE
    return BadImageError(f"{reason}: {error}")


def _layout(image: Image.Image) -> str:
    """Return Pillow's name of the pixel layout in the file, such as `RGB;16B`."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return str(getattr(image, _LAYOUT, ""))
    arguments = tiles[0][3]
    return str(arguments if isinstance(arguments, str) else arguments[0] if arguments else "")


def _to_rgb(image: Image.Image, layout: str) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scaled(image)
    if image.has_transparency_data:
        _scale_transparent_value(image, layout)
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Return grey values of more than 8 bits as RGB; Pillow would clip them at 255."""
    values = np.asarray(image)
    # Halves are exact in float32 up to 2^23; 32-bit integers need more, and are rare.
    kind = (
        np.float64
        if image.mode == "I" and values.dtype.itemsize > 2 and values.max(initial=0) > 0xFFFF
        else np.float32
    )
    levels: npt.NDArray[Any] = values.astype(kind)
    np.nan_to_num(levels, copy=False)
    highest = float(levels.max(initial=0.0))
    if image.mode == "F":  # floats have no fixed range: programs write 0 to 1, bytes, or 16 bits
        step = 1 / 255 if highest <= 1 else 1.0 if highest <= 255 else 257.0
    else:  # the upper byte is the visible part of 16 or 32 bits
        step = 257.0 if highest <= 0xFFFF else 257.0 * 0x10001
    np.divide(levels, step, out=levels)
    np.clip(levels, 0, 255, out=levels)
    grey = np.rint(levels, out=levels).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _scale_transparent_value(image: Image.Image, layout: str) -> None:
    """Scale a PNG's transparent value to the 8 bits of its decoded pixels."""
    value: Any = image.info.get("transparency")
    if isinstance(value, int) and layout in _GREY_LEVELS:
        image.info["transparency"] = min(255, value * _GREY_LEVELS[layout])
    elif isinstance(value, tuple) and (layout == "RGB;16B" or max(value, default=0) > 255):
        image.info["transparency"] = tuple(channel >> 8 for channel in value)


def _is_plain_jpeg(data: bytes) -> bool:
    """Return whether this is an 8-bit JPEG without markers that may rotate or recolour it.

    Reads the headers up to the frame's, which takes microseconds.

    Such markers are EXIF, XMP and Adobe's. The JPEG may be grey or in colour.
    """
    # OpenCV fills missing data with grey.
    if not data.startswith(_JPEG_START) or not data.endswith(_JPEG_END):
        return False
    at = len(_JPEG_START)
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            return data[at + 4] == 8 and data[at + 9] in (1, 3) and width * height <= MAX_IMAGE_PIXELS
        if marker in (_JPEG_EXIF, _JPEG_ADOBE):
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False
