"""The resizer that img2dataset calls: odd pictures of the web become upright RGB, or their fault is named."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.download.resize import UprightResizer
from data_prep.formats.image import BadImageError, decode_upright

MAX_PIXELS = 1_000_000


def _picture(size_px: tuple[int, int] = (90, 60)) -> Image.Image:
    """Four quarters of four colours: no two orientations look alike."""
    image = Image.new("RGB", size_px, (200, 30, 30))
    draw = ImageDraw.Draw(image)
    width, height = size_px
    draw.rectangle((width // 2, 0, width, height // 2), fill=(30, 200, 30))
    draw.rectangle((0, height // 2, width // 2, height), fill=(30, 30, 200))
    draw.rectangle((width // 2, height // 2, width, height), fill=(220, 220, 60))
    return image


def _encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _difference(first: Image.Image, second: Image.Image) -> float:
    assert first.mode == second.mode == "RGB"
    assert first.size == second.size
    return float(np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).mean())


def _reason(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(BadImageError) as caught:
        decode_upright(data, max_pixels)
    reason, colon, _ = str(caught.value).partition(":")
    assert colon
    return reason


# orientation → what a viewer does with the stored pixels, from the EXIF standard (row 0 / column 0 is …)
SHOWN = {
    1: lambda hwc: hwc,  # top, left
    2: lambda hwc: hwc[:, ::-1],  # top, right
    3: lambda hwc: hwc[::-1, ::-1],  # bottom, right
    4: lambda hwc: hwc[::-1],  # bottom, left
    5: lambda hwc: hwc.transpose(1, 0, 2),  # left, top
    6: lambda hwc: hwc.transpose(1, 0, 2)[:, ::-1],  # right, top
    7: lambda hwc: hwc.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: lambda hwc: hwc.transpose(1, 0, 2)[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, image_format: str) -> None:
    stored = _picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if image_format != "PNG" else {}
    data = _encode(stored, image_format, exif=exif.tobytes(), **options)
    shown = Image.fromarray(np.ascontiguousarray(SHOWN[orientation](np.asarray(stored))))
    assert _difference(decode_upright(data, MAX_PIXELS), shown) < 4
    jpeg, width, height, original_width, original_height, error = UprightResizer(30, MAX_PIXELS, 95)(
        io.BytesIO(data)
    )
    assert error is None
    assert (width, height) == ((45, 30) if orientation < 5 else (30, 45))
    assert (original_width, original_height) == shown.size
    reduced = Image.open(io.BytesIO(jpeg))
    assert reduced.getexif().get(0x0112) is None
    assert _difference(reduced, shown.resize((width, height), Image.Resampling.LANCZOS)) < 6


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_left_alone(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encode(_picture(), "JPEG", exif=exif.tobytes(), quality=95)
    assert _difference(decode_upright(data, MAX_PIXELS), _picture()) < 4


def _png16(pixels: np.ndarray[Any, Any], colour_type: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def _sixteen(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(_encode(_picture().convert("CMYK"), "JPEG", quality=95), _picture(), id="cmyk"),
        pytest.param(_encode(_picture(), "JPEG", quality=95, progressive=True), _picture(), id="progressive"),
        pytest.param(_encode(_picture().quantize(64), "PNG"), _picture(), id="palette"),
        pytest.param(_encode(_picture().convert("L"), "PNG"), _picture().convert("L"), id="grey"),
        pytest.param(_png16(_sixteen(_picture()), 2), _picture(), id="rgb16"),
        pytest.param(_png16(_sixteen(_picture().convert("L")), 0), _picture().convert("L"), id="grey16"),
        pytest.param(_encode(_picture(), "WEBP", lossless=True), _picture(), id="webp"),
        pytest.param(_encode(_picture(), "GIF"), _picture(), id="gif"),
        pytest.param(_encode(_picture(), "BMP"), _picture(), id="bmp"),
        pytest.param(_encode(_picture(), "TIFF"), _picture(), id="tiff"),
        pytest.param(
            _encode(Image.new("1", (20, 20), 1), "PNG"), Image.new("RGB", (20, 20), "white"), id="one bit"
        ),
        pytest.param(
            _encode(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), "PNG"),
            Image.new("RGB", (20, 20), "white"),
            id="clear",
        ),
        pytest.param(
            _encode(Image.new("LA", (20, 20), (0, 128)), "PNG"),
            Image.new("RGB", (20, 20), (127, 127, 127)),
            id="half clear grey",
        ),
    ],
)
def test_every_kind_of_pixel_becomes_what_it_shows(data: bytes, expected: Image.Image) -> None:
    assert _difference(decode_upright(data, MAX_PIXELS), expected.convert("RGB")) < 3


def test_a_transparent_palette_colour_shows_white() -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.paste(0, (0, 0, 10, 20))
    decoded = decode_upright(_encode(image, "PNG", transparency=1), MAX_PIXELS)
    assert decoded.getpixel((2, 2)) == (255, 0, 0)
    assert decoded.getpixel((15, 2)) == (255, 255, 255)


JPEG = _encode(_picture((300, 200)), "JPEG", quality=95)
PNG = _encode(Image.effect_noise((200, 200), 80).convert("RGB"), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (JPEG[: len(JPEG) * 6 // 10], "truncated"),
        (JPEG[:-30], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (b"", "not_an_image"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
        (b"\x00" + bytes(range(256)) * 4, "not_an_image"),
        (b"%PDF-1.7\n" + bytes(500), "not_an_image"),
        (b"\x89PNG\r\n\x1a\n" + b"noise" * 100, "undecodable"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 " + b"noise" * 20, "undecodable"),
    ],
)
def test_what_is_no_picture_has_its_reason(data: bytes, reason: str) -> None:
    assert _reason(data) == reason
    answer = UprightResizer(96, MAX_PIXELS, 95)(io.BytesIO(data))
    assert answer[:5] == (None,) * 5
    assert answer[5].startswith(f"{reason}: ")


def test_a_bomb_is_refused_by_its_header() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _reason(_encode(Image.new("L", (1001, 1000)), "PNG")) == "pixel_limit"
    header = _encode(Image.new("1", (8, 8)), "PNG")
    side = struct.pack(">II", 60_000, 60_000)
    chunk = b"IHDR" + side + header[24:29]
    promised = header[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + header[33:]
    assert _reason(promised) == "pixel_limit"  # beyond Pillow's own limit
    assert decode_upright(_encode(Image.new("L", (1000, 1000)), "PNG"), MAX_PIXELS).size == (1000, 1000)


def test_small_pictures_are_not_enlarged_and_long_ones_keep_a_pixel() -> None:
    resizer = UprightResizer(96, MAX_PIXELS, 95)
    assert resizer(io.BytesIO(_encode(_picture((50, 40)), "PNG")))[1:3] == (50, 40)
    assert resizer(io.BytesIO(_encode(_picture((192, 384)), "PNG")))[1:5] == (96, 192, 192, 384)
    assert UprightResizer(1, MAX_PIXELS, 95)(io.BytesIO(_encode(_picture((3, 400)), "PNG")))[1:3] == (1, 133)


def test_the_same_picture_gives_the_same_bytes() -> None:
    resizer = UprightResizer(96, MAX_PIXELS, 95)
    assert resizer(io.BytesIO(JPEG)) == resizer(io.BytesIO(JPEG))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decode_gives_nearly_the_same_picture(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encode(_picture((403, 260)), "JPEG", quality=95, exif=exif.tobytes())
    plain = UprightResizer(64, MAX_PIXELS, 95)(io.BytesIO(data))
    scaled = UprightResizer(64, MAX_PIXELS, 95, scaled_decode=True)(io.BytesIO(data))
    assert scaled[1:] == plain[1:]
    assert scaled[0] != plain[0]  # it is another way
    assert _difference(*(Image.open(io.BytesIO(answer[0])) for answer in (plain, scaled))) < 2


def test_scaled_decode_leaves_other_pictures_alone() -> None:
    resizer = UprightResizer(96, MAX_PIXELS, 95, scaled_decode=True)
    for data in (_encode(_picture((50, 40)), "JPEG"), _encode(_picture((96, 300)), "JPEG")):
        assert resizer(io.BytesIO(data)) == UprightResizer(96, MAX_PIXELS, 95)(io.BytesIO(data))
    assert resizer(io.BytesIO(_encode(_picture((400, 384)), "PNG")))[1:5] == (100, 96, 400, 384)
    assert resizer(io.BytesIO(JPEG[:-30]))[5].startswith("truncated: ")
