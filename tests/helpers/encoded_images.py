"""Images whose orientation and depth show, and their files."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


def four_colours(size_px: tuple[int, int] = (90, 60)) -> Image.Image:
    """Return four quarters of four colours: no two orientations look alike."""
    image = Image.new("RGB", size_px, (200, 30, 30))
    draw = ImageDraw.Draw(image)
    width, height = size_px
    draw.rectangle((width // 2, 0, width, height // 2), fill=(30, 200, 30))
    draw.rectangle((0, height // 2, width // 2, height), fill=(30, 30, 200))
    draw.rectangle((width // 2, height // 2, width, height), fill=(220, 220, 60))
    return image


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png16(pixels: np.ndarray[Any, Any], colour_type: int) -> bytes:
    return png(pixels, 16, colour_type)


def png(
    pixels: np.ndarray[Any, Any],
    bits: int,
    colour_type: int,
    *,
    palette: bytes = b"",
    transparent: bytes = b"",
) -> bytes:
    """Return a PNG of one channel [H, W], or of several [H, W, C] and 8 or 16 bits.

    `transparent` is its tRNS.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    if bits < 8:
        split = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        packed = np.packbits(split.reshape(height, -1), axis=1)
    else:
        packed = pixels.astype(">u2" if bits == 16 else np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"PLTE", palette) if palette else b"")
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def sixteen_bits(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(np.uint16) * 257
