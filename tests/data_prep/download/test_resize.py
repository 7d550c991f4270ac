"""The resizer that img2dataset calls: odd images of the web become upright RGB, or their fault is named."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_prep.download.jpeg import plain_jpeg
from data_prep.download.resize import UprightResizer
from data_prep.rules.copies import marks_of
from pipeline.core.files.images import BadImageError, decode_upright
from tests.helpers.encoded_images import encode, four_colours, png16, sixteen_bits

MAX_PIXELS = 1_000_000


def _difference(first: Image.Image, second: Image.Image) -> float:
    assert first.mode == second.mode == "RGB"
    assert first.size == second.size
    return float(np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).mean())


def _reason(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(BadImageError) as caught:
        decode_upright(data, max_pixels)
    reason, colon, _ = str(caught.value).partition(": ")
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
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, image_format: str) -> None:
    stored = four_colours()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if image_format in ("JPEG", "WEBP") else {}
    data = encode(stored, image_format, exif=exif.tobytes(), **options)
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
    data = encode(four_colours(), "JPEG", exif=exif.tobytes(), quality=95)
    assert _difference(decode_upright(data, MAX_PIXELS), four_colours()) < 4


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encode(four_colours().convert("CMYK"), "JPEG", quality=95), four_colours(), id="cmyk"),
        pytest.param(
            encode(four_colours(), "JPEG", quality=95, progressive=True), four_colours(), id="progressive"
        ),
        pytest.param(encode(four_colours().quantize(64), "PNG"), four_colours(), id="palette"),
        pytest.param(encode(four_colours().convert("L"), "PNG"), four_colours().convert("L"), id="grey"),
        pytest.param(png16(sixteen_bits(four_colours()), 2), four_colours(), id="rgb16"),
        pytest.param(
            png16(sixteen_bits(four_colours().convert("L")), 0), four_colours().convert("L"), id="grey16"
        ),
        pytest.param(encode(four_colours(), "WEBP", lossless=True), four_colours(), id="webp"),
        pytest.param(encode(four_colours(), "GIF"), four_colours(), id="gif"),
        pytest.param(encode(four_colours(), "BMP"), four_colours(), id="bmp"),
        pytest.param(encode(four_colours(), "TIFF"), four_colours(), id="tiff"),
        pytest.param(
            encode(Image.new("1", (20, 20), 1), "PNG"), Image.new("RGB", (20, 20), "white"), id="one bit"
        ),
        pytest.param(
            encode(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), "PNG"),
            Image.new("RGB", (20, 20), "white"),
            id="clear",
        ),
        pytest.param(
            encode(Image.new("LA", (20, 20), (0, 128)), "PNG"),
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
    decoded = decode_upright(encode(image, "PNG", transparency=1), MAX_PIXELS)
    assert decoded.getpixel((2, 2)) == (255, 0, 0)
    assert decoded.getpixel((15, 2)) == (255, 255, 255)


JPEG = encode(four_colours((300, 200)), "JPEG", quality=95)
PNG = encode(Image.effect_noise((200, 200), 80).convert("RGB"), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (JPEG[: len(JPEG) * 6 // 10], "truncated"),
        (JPEG[:-30], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (b"", "not_an_image"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "format:svg"),
        (b"\x00" + bytes(range(256)) * 4, "not_an_image"),
        (b"%PDF-1.7\n" + bytes(500), "format:pdf"),
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
        assert _reason(encode(Image.new("L", (1001, 1000)), "PNG")) == "pixel_limit"
    header = encode(Image.new("1", (8, 8)), "PNG")
    side = struct.pack(">II", 60_000, 60_000)
    chunk = b"IHDR" + side + header[24:29]
    promised = header[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + header[33:]
    assert _reason(promised) == "pixel_limit"  # beyond Pillow's own limit
    assert decode_upright(encode(Image.new("L", (1000, 1000)), "PNG"), MAX_PIXELS).size == (1000, 1000)


def test_small_pictures_are_not_enlarged_and_long_ones_keep_a_pixel() -> None:
    resizer = UprightResizer(96, MAX_PIXELS, 95)
    assert resizer(io.BytesIO(encode(four_colours((50, 40)), "PNG")))[1:3] == (50, 40)
    assert resizer(io.BytesIO(encode(four_colours((192, 384)), "PNG")))[1:5] == (96, 192, 192, 384)
    assert UprightResizer(1, MAX_PIXELS, 95)(io.BytesIO(encode(four_colours((3, 400)), "PNG")))[1:3] == (
        1,
        133,
    )


@pytest.mark.parametrize("scaled_decode", [False, True])
def test_a_side_that_no_jpeg_can_have_is_reduced(scaled_decode: bool) -> None:
    """Above 65,500 pixels libjpeg fails late: the row would be asked for again at every start."""
    strip = encode(Image.new("RGB", (72_050, 11)), "PNG")
    for short_side, size in ((256, (65_500, 10)), (4, (26_200, 4))):
        resizer = UprightResizer(short_side, MAX_PIXELS, 95, scaled_decode)
        data, width, height, *original, error = resizer(io.BytesIO(strip))
        assert (width, height, error) == (*size, None)
        assert original == [72_050, 11]
        assert Image.open(io.BytesIO(data)).size == size


def test_what_fails_each_time_is_a_reason_and_no_lost_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Image.Image:
        raise ValueError("no such thing")

    monkeypatch.setattr("data_prep.download.resize._reduce", broken)
    *nothing, error = UprightResizer(30, MAX_PIXELS, 95)(io.BytesIO(JPEG))
    assert (nothing, error) == ([None] * 5, "undecodable: ValueError: no such thing")


def test_the_same_picture_gives_the_same_bytes() -> None:
    resizer = UprightResizer(96, MAX_PIXELS, 95)
    assert resizer(io.BytesIO(JPEG)) == resizer(io.BytesIO(JPEG))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decode_gives_nearly_the_same_picture(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(four_colours((403, 260)), "JPEG", quality=95, exif=exif.tobytes())
    plain = UprightResizer(64, MAX_PIXELS, 95)(io.BytesIO(data))
    scaled = UprightResizer(64, MAX_PIXELS, 95, scaled_decode=True)(io.BytesIO(data))
    assert scaled[1:] == plain[1:]
    assert scaled[0] != plain[0]  # it is another way
    assert _difference(*(Image.open(io.BytesIO(answer[0])) for answer in (plain, scaled))) < 2


def test_scaled_decode_leaves_other_pictures_alone() -> None:
    resizer = UprightResizer(96, MAX_PIXELS, 95, scaled_decode=True)
    for data in (encode(four_colours((50, 40)), "JPEG"), encode(four_colours((96, 300)), "JPEG")):
        assert resizer(io.BytesIO(data)) == UprightResizer(96, MAX_PIXELS, 95)(io.BytesIO(data))
    assert resizer(io.BytesIO(encode(four_colours((400, 384)), "PNG")))[1:5] == (100, 96, 400, 384)
    assert resizer(io.BytesIO(JPEG[:-30]))[5].startswith("truncated: ")


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


PLAIN = encode(four_colours((90, 60)), "JPEG", quality=80)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # and the transform: 1 is YCbCr


@pytest.mark.parametrize("side", [60, 96])
@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        encode(four_colours((90, 60)), "JPEG", quality=80, exif=_exif(1)),
        encode(four_colours((90, 60)), "JPEG", quality=80, icc_profile=PROFILE, comment=b"who"),
        PLAIN[:2] + ADOBE + b"\x01" + PLAIN[2:],
        PLAIN + b"trailing \xff\xd9 bytes",
    ],
    ids=["plain", "exif", "profile", "adobe", "trailing"],
)
def test_an_upright_jpeg_that_is_not_too_large_keeps_its_bytes(data: bytes, side: int) -> None:
    stored, *sizes, error = UprightResizer(side, MAX_PIXELS, 95)(io.BytesIO(data))
    assert (stored, sizes, error) == (PLAIN, [90, 60, 90, 60], None)
    assert stored.marks == marks_of(np.asarray(decode_upright(data)))


def test_a_progressive_jpeg_keeps_its_bytes() -> None:
    data = encode(four_colours((90, 60)), "JPEG", quality=80, progressive=True, subsampling=2)
    assert UprightResizer(96, MAX_PIXELS, 95)(io.BytesIO(data))[0] == data


@pytest.mark.parametrize(
    "data",
    [
        encode(four_colours((90, 60)), "JPEG", exif=_exif(6)),
        encode(four_colours((90, 60)).convert("L"), "JPEG"),
        encode(four_colours((90, 60)).convert("CMYK"), "JPEG"),
        encode(four_colours((90, 60)), "JPEG", keep_rgb=True),
        PLAIN[:2] + ADOBE + b"\x00" + PLAIN[2:],
        PLAIN[:2] + b"\xff" + PLAIN[2:],  # a byte of padding that decoders skip
        encode(four_colours((90, 60)), "PNG"),
        encode(four_colours((300, 97)), "JPEG"),
    ],
    ids=["turned", "grey", "cmyk", "rgb", "rgb by adobe", "padded", "png", "too large"],
)
def test_other_images_are_encoded(data: bytes) -> None:
    stored, width, height, *_ = UprightResizer(96, MAX_PIXELS, 95)(io.BytesIO(data))
    assert stored != data
    assert plain_jpeg(stored) == stored
    shown = decode_upright(data).resize((width, height), Image.Resampling.LANCZOS)
    assert _difference(Image.open(io.BytesIO(stored)), shown) < 6


def test_what_is_no_whole_jpeg_is_not_kept() -> None:
    for end in range(len(PLAIN)):
        assert plain_jpeg(PLAIN[:end]) is None
    assert plain_jpeg(PLAIN) == PLAIN
    comment = b"\xff\xfe\x00\x02"
    assert plain_jpeg(PLAIN[:2] + 900 * comment + PLAIN[2:]) == PLAIN
    assert plain_jpeg(PLAIN[:2] + 1000 * comment + PLAIN[2:]) is None
    assert plain_jpeg(PLAIN[:2] + b"\xff\xfe\x00\x01" + PLAIN[2:]) is None
