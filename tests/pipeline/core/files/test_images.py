"""One decoding: what every stage and command sees of a file."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import ExifTags, Image

from pipeline.core.files.images import (
    BadImageError,
    decode_pixels,
    decode_square,
    decode_upright,
    open_image,
    upright_size,
)
from tests.helpers.encoded_images import encode, four_colours, png16, sixteen_bits

SIZE = (96, 64)
WHITE = (255, 255, 255)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _png_with(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


def _corners(image: Image.Image) -> list[tuple[int, ...]]:
    width, height = image.size
    places = [(width // 4, height // 4), (3 * width // 4, height // 4), (width // 4, 3 * height // 4)]
    return [image.getpixel(place) for place in [*places, (3 * width // 4, 3 * height // 4)]]  # type: ignore[misc]


def _off(data: bytes, shown: Image.Image) -> int:
    found, expected = np.array(_corners(decode_upright(data))), np.array(_corners(shown.convert("RGB")))
    return int(np.abs(found - expected).max())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_every_format_once(kind: str, orientation: int) -> None:
    shown = four_colours(SIZE)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's names of the ways back
    stored = shown if orientation == 1 else shown.transpose(Image.Transpose(back[orientation]))
    data = encode(stored, kind, exif=_exif(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    assert upright_size(open_image(data, 10_000)) == decode_upright(data).size == SIZE
    assert _off(data, shown) <= 8
    assert np.array_equal(decode_pixels(data), np.asarray(decode_upright(data)))


def test_sixteen_bits_and_floats_are_scaled() -> None:
    grey = four_colours(SIZE).convert("L")
    levels = np.asarray(grey)
    assert _off(png16(sixteen_bits(grey), 0), grey) == 0
    assert _off(png16(sixteen_bits(four_colours(SIZE)), 2), four_colours(SIZE)) == 0
    for values in (levels / 255, levels.astype(np.float32), levels * 257.0):
        assert _off(encode(Image.fromarray(values.astype(np.float32)), "TIFF"), grey) <= 1
    assert _off(encode(Image.fromarray(levels.astype(np.int32) * 257), "TIFF"), grey) == 0


def test_what_is_transparent_is_white() -> None:
    shown = four_colours(SIZE)
    shown.paste(WHITE, (48, 0, 96, 32))
    hidden = Image.new("L", SIZE, 255)
    hidden.paste(0, (48, 0, 96, 32))
    layer = four_colours(SIZE)
    layer.putalpha(hidden)
    for mode in ("RGBA", "LA", "PA"):
        data = encode(layer.convert(mode), "TIFF" if mode == "PA" else "PNG")
        assert _off(data, shown.convert("L") if mode == "LA" else shown) <= 1
    assert _off(encode(layer, "WEBP", lossless=True), shown) == 0
    palette = four_colours(SIZE).convert("P", palette=Image.Palette.ADAPTIVE)
    index = palette.getpixel((72, 16))
    assert _off(encode(palette, "PNG", transparency=index), shown) <= 1
    assert _off(encode(palette, "GIF", transparency=index), shown) <= 1


def test_one_transparent_value_of_any_depth_is_white() -> None:
    colours = four_colours(SIZE)
    grey = np.asarray(colours.convert("L"))
    expected = grey.copy()
    expected[:32, 48:] = 255
    sixteen = struct.pack(">H", int(grey[16, 72]) * 257)
    deep = _png_with(png16(sixteen_bits(colours.convert("L")), 0), b"tRNS", sixteen)
    assert _off(deep, Image.fromarray(expected)) == 0
    value = struct.pack(">HHH", *(int(channel) * 257 for channel in np.asarray(colours)[16, 72]))
    shown = colours.copy()
    shown.paste(WHITE, (48, 0, 96, 32))
    assert _off(_png_with(png16(sixteen_bits(colours), 2), b"tRNS", value), shown) == 0


@pytest.mark.parametrize(("bits", "value"), [(1, 0), (2, 1), (2, 2), (4, 3), (4, 11)])
def test_a_transparent_value_of_few_bits_is_white(bits: int, value: int) -> None:
    """Pillow scales the pixels to 255, and not the value that the file calls transparent."""
    highest = 2**bits - 1
    row = [level % (highest + 1) for level in range(16)]
    packed = int("".join(f"{level:0{bits}b}" for level in row), 2).to_bytes(16 * bits // 8)
    header = struct.pack(">IIBBBBB", 16, 1, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in (
        (b"IHDR", header),
        (b"tRNS", struct.pack(">H", value)),
        (b"IDAT", zlib.compress(b"\0" + packed)),
        (b"IEND", b""),
    ):
        data += (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )
    expected = [255 if level == value else level * 255 // highest for level in row]
    assert np.asarray(decode_upright(data))[0, :, 0].tolist() == expected


def test_cmyk_and_palette_are_converted() -> None:
    assert _off(encode(four_colours(SIZE).convert("CMYK"), "JPEG", quality=95), four_colours(SIZE)) <= 12
    in_palette = four_colours(SIZE).convert("P", palette=Image.Palette.ADAPTIVE)
    assert _off(encode(in_palette, "PNG"), four_colours(SIZE)) <= 1


@pytest.mark.parametrize("options", [{}, {"subsampling": 2}, {"progressive": True}, {"quality": 40}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_training_sees_the_pixels_of_evaluation_to_the_bit(mode: str, options: dict[str, int]) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (67, 91, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise).convert(mode), "JPEG", **options)
    assert np.array_equal(decode_pixels(data), np.asarray(decode_upright(data)))
    if mode != "CMYK":
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(decode_pixels(data), np.asarray(image.convert("RGB")))


def test_ordinary_images_are_pillow_s_to_the_bit_in_both_ways() -> None:
    noise = np.random.default_rng(4).integers(0, 256, (67, 91, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF"):
        data = encode(Image.fromarray(noise), kind)
        with Image.open(io.BytesIO(data)) as image:
            plain = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(decode_square(data, 32), plain)
        assert np.array_equal(decode_square(data, 32, "reference"), plain)


def test_a_long_text_in_a_png_costs_no_image() -> None:
    text = zlib.compress(b"x" * (3 << 20))
    data = _png_with(encode(four_colours(SIZE), "PNG"), b"zTXt", b"Comment\0\0" + text)
    assert _off(data, four_colours(SIZE)) == 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "not_an_image: an empty file"),
        (lambda data: b"<html>", "not_an_image: starts with"),
        (lambda data: data[:1500], "truncated: "),
        (lambda data: data[:-30], "truncated: "),
        (lambda data: b"\x89PNG\r\n\x1a\n" + bytes(40), "undecodable: "),
    ],
)
def test_damage_has_a_reason_in_every_way(damage: Callable[[bytes], bytes], reason: str) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = damage(encode(Image.fromarray(noise), "JPEG"))
    for read in (
        decode_pixels,
        decode_upright,
        lambda data: decode_square(data, 8),
        lambda data: decode_square(data, 8, "reference"),
    ):
        with pytest.raises(BadImageError, match=reason):
            read(data)
