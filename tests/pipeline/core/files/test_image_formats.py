"""Every format that people have is read, or named as the one that it is."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, features

from pipeline.core.files import image_formats
from pipeline.core.files.image_formats import begins_as_image, name_format
from pipeline.core.files.images import (
    BadImageError,
    decode_pixels,
    decode_square,
    decode_upright,
    open_image,
    upright_size,
)
from tests.helpers.encoded_images import encode, four_colours

SIZE = (96, 64)
RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def _box(*brands: bytes) -> bytes:
    content = brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 8 + len(content)) + b"ftyp" + content + bytes(40)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (_box(b"heic", b"mif1", b"heic"), "heic"),
        (_box(b"mif1", b"mif1", b"heix"), "heic"),
        (_box(b"mif1", b"mif1", b"avif"), "avif"),
        (_box(b"mif1", b"mif1"), "heif"),
        (_box(b"crx ", b"isom"), "cr3"),
        (_box(b"isom", b"mp42"), "mp4"),
        (b"\xff\x0a" + bytes(9), "jxl"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(9), "jxl"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(9), "jp2"),
        (b"\xff\x4f\xff\x51" + bytes(9), "jp2"),
        (b"8BPS\x00\x01" + bytes(30), "psd"),
        (b"<svg width='3'>", "svg"),
        (b'<?xml version="1.0"?>\n<!-- a <b> -->\n<!DOCTYPE svg PUBLIC "-//W3C">\n<svg:svg>', "svg"),
        (b"<html><body><svg width='3'>", None),  # a page with one inside
        (struct.pack("<3H4B", 0, 1, 2, 16, 16, 0, 0) + bytes(40), "ico"),
        (b"\x00\x00\x01\x02\x03\x04" + bytes(40), None),
        (b"<html>", None),
        (b"", None),
    ],
)
def test_formats_are_told_by_their_first_bytes(data: bytes, name: str | None) -> None:
    assert name_format(data) == name
    assert begins_as_image(data) is (name is not None)


@pytest.fixture
def without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.core.files.images.plugin_of", lambda name: ())


@pytest.mark.usefixtures("without_plugins")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_box(b"heic", b"mif1"), "format:heic: starts with"),
        (b"\n" + _box(b"heic", b"mif1"), "format:heic: starts with"),
        (b"\xff\x0a" + bytes(9), "format:jxl: starts with"),
        (b"\x1a\x45\xdf\xa3" + bytes(40), "format:webm: starts with"),
        (b"II*\x00" + bytes(40), "undecodable: "),
        (b"\r\n<html>", "not_an_image: starts with"),
        (b"\r\n", "not_an_image: starts with"),
    ],
)
def test_a_format_that_is_not_read_is_a_reason_of_its_own(data: bytes, reason: str) -> None:
    for read in (decode_pixels, decode_upright, lambda data: decode_square(data, 8)):
        with pytest.raises(BadImageError, match=f"^{reason}"):
            read(data)


def test_damage_in_a_format_that_is_read_is_called_so() -> None:
    for built, data in (("avif", _box(b"avif", b"mif1")), ("jpg_2000", b"\xff\x4f\xff\x51" + bytes(9))):
        if features.check(built):
            with pytest.raises(BadImageError, match=r"^undecodable: "):
                decode_upright(data)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.ones((20, 30, 3), np.float32), "format:tiff_float: 3 x 32 bits a pixel, floats"),
        (np.ones((20, 30), np.float64), "format:tiff_float: 1 x 64 bits a pixel, floats"),
        (np.ones((20, 30, 3), np.int16), "format:tiff_layout: 3 x 16 bits a pixel, signed integers"),
    ],
)
def test_a_tiff_whose_pixels_are_not_read_says_what_they_are(pixels: np.ndarray, reason: str) -> None:
    data = cv2.imencode(".tiff", pixels)[1].tobytes()
    with pytest.raises(BadImageError, match=f"^{reason}$"):
        decode_upright(data)
    for damaged in (data[:12], data[: len(data) // 2], data[:4] + b"\xff" * 4 + data[8:]):
        with pytest.raises(BadImageError, match=r"^undecodable: starts with"):
            decode_upright(damaged)


def _off(data: bytes, shown: Image.Image) -> int:
    found = np.asarray(decode_upright(data), np.int16)
    assert found.shape[:2] == shown.size[::-1] == upright_size(open_image(data, 10_000))[::-1]
    return int(np.abs(found - np.asarray(shown, np.int16)).mean())


@pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow is built without OpenJPEG")
def test_jpeg_2000() -> None:
    for options in ({}, {"no_jp2": True}):  # in a box, and the bare stream
        assert _off(encode(four_colours(SIZE), "JPEG2000", **options), four_colours(SIZE)) <= 1


@pytest.mark.skipif(not features.check("avif"), reason="Pillow is built without AVIF")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_turned_by_its_own_boxes(orientation: int) -> None:
    stored = four_colours(SIZE)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    # Pillow writes the tag as the boxes irot and imir.
    data = encode(stored, "AVIF", quality=95, exif=exif)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's names of what a viewer does
    shown = stored if orientation == 1 else stored.transpose(Image.Transpose(turns[orientation]))
    assert _off(data, shown) <= 4


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_with_its_plugin(orientation: int) -> None:
    pytest.importorskip("pillow_heif")
    image_formats.plugin_of("heic")  # writes them, too
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(four_colours(SIZE), "HEIF", quality=95, exif=exif.tobytes())
    shown = (
        four_colours(SIZE) if orientation == 1 else four_colours(SIZE).transpose(Image.Transpose.ROTATE_270)
    )
    assert _off(data, shown) <= 4
    with pytest.raises(BadImageError, match=r"^(undecodable|truncated): "):
        decode_upright(data[: len(data) // 2])


@pytest.mark.parametrize("orientation", [1, 6])
def test_jpeg_xl_with_its_plugin_has_an_orientation_of_its_own(orientation: int) -> None:
    pytest.importorskip("pillow_jxl")
    image_formats.plugin_of("jxl")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(four_colours(SIZE), "JXL", lossless=True, exif=exif.tobytes())
    assert _off(data, four_colours(SIZE)) == 0


def test_of_an_animation_the_first_image_is_taken() -> None:
    frames = [Image.new("RGB", SIZE, colour) for colour in (RED, GREEN, BLUE)]
    some = {"save_all": True, "append_images": frames[1:], "duration": 50}
    kinds = ["GIF", "WEBP", "PNG", "TIFF", *(["AVIF"] if features.check("avif") else [])]
    for kind in kinds:
        data = encode(frames[0], kind, **{**some, **({"lossless": True} if kind == "WEBP" else {})})
        assert open_image(data, 10_000).n_frames == 3, kind  # type: ignore[attr-defined]
        assert _off(data, frames[0]) <= 1, kind


@pytest.mark.parametrize("before", [b"\r\n", b"\n\n\n", b"\xef\xbb\xbf", b" \t", b"\xef\xbb\xbf\r\n"])
def test_what_scripts_send_before_an_image_is_passed_over(before: bytes) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        plain = encode(four_colours(SIZE), kind)
        for read in (decode_pixels, decode_upright):
            assert np.array_equal(read(before + plain), read(plain)), kind


def _png_with(kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    data = encode(four_colours(SIZE), "PNG")
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


def test_long_texts_and_colour_profiles_of_a_png_cost_no_image() -> None:
    packed = zlib.compress(b"x" * (9 << 20), 1)
    for kind, content in (
        (b"zTXt", b"Comment\0\0" + packed),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed),
        (b"tEXt", b"Comment\0" + b"x" * (2 << 20)),
        (b"iCCP", b"profile\0\0" + packed),
    ):
        assert _off(_png_with(kind, content), four_colours(SIZE)) == 0, kind
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert _off(encode(four_colours(SIZE), "PNG", icc_profile=profile), four_colours(SIZE)) == 0


def test_a_text_that_would_fill_the_memory_is_a_reason() -> None:
    bomb = zlib.compress(bytes(65 << 20), 1)
    with pytest.raises(BadImageError, match=r"^undecodable: .*too large"):
        decode_upright(_png_with(b"zTXt", b"Comment\0\0" + bomb))
