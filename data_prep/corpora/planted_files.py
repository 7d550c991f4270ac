"""What the demo's site answers to planted rows: broken downloads, images that need care, images to drop."""

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from random import Random

import numpy as np
from PIL import Image

from data_prep.corpora.demo_scenes import describe, draw, draw_things
from data_prep.corpora.planted import Row, World, answered_row, encode, plain_row
from data_prep.sources.local_server import Answer

BOMB_SIDE_PX = 30_000

# --- dirt on the way -----------------------------------------------------------------------------

PNG_START = b"\x89PNG\r\n\x1a\n"
OPT_OUTS = ("noai", "noimageai", "noindex, noai", "noimageindex")
HTML = "<!DOCTYPE html>\n<html><head><title>404</title></head><body><p>您访问的图片不存在</p></body></html>\n"


def _png(width_px: int, height_px: int, bits: int, colour_type: int, rows: Iterable[bytes]) -> bytes:
    """Return a PNG from packed rows of pixels (without filter bytes), made without ever holding the image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(6)
    packed = [packer.compress(b"\0" + row) for row in rows]
    packed.append(packer.flush())
    header = struct.pack(">IIBBBBB", width_px, height_px, bits, colour_type, 0, 0, 0)
    return PNG_START + chunk(b"IHDR", header) + chunk(b"IDAT", b"".join(packed)) + chunk(b"IEND", b"")


def _garble(index: int, rng: Random) -> tuple[str, bytes]:
    """Return the first bytes of an image format and then noise, with the end that the format asks for."""
    noise = rng.randbytes(rng.randint(800, 4000))
    if index % 3 == 0:
        return "png", PNG_START + noise
    if index % 3 == 1:
        noise = noise.replace(
            b"\xff", b"\x7f"
        )  # no marker by accident, so it can't turn into a cut-off image
        return (
            "jpg",
            b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + noise + b"\xff\xd9",
        )
    body = b"WEBPVP8 " + struct.pack("<I", len(noise) // 2 * 2) + noise[: len(noise) // 2 * 2]
    return "webp", b"RIFF" + struct.pack("<I", len(body)) + body


def download_dirt(world: World) -> Iterator[Row]:
    """Return rows whose table entry is in order and whose URL is not."""

    def rows(planted: str, answer_of: Callable[[int], Answer]) -> Iterator[Row]:
        for index, rng in world.draws(planted):
            yield plain_row(world, planted, index, rng, answer_of(index))

    def bodiless(planted: str, answer_of: Callable[[int], Answer]) -> Iterator[Row]:
        for index, rng in world.draws(planted):
            caption = describe(rng, world.scene(rng))
            yield answered_row(
                planted, index, rng, caption, world.dimensions(rng), None, answer=answer_of(index)
            )

    yield from bodiless("not_found", lambda index: Answer(status=404))
    yield from bodiless("server_error", lambda index: Answer(status=(500, 503, 403)[index % 3]))
    yield from bodiless("hanging", lambda index: Answer(hang=True))
    yield from rows("broken_connection", lambda index: Answer(sent_share=(0.0, 0.5)[index % 2]))
    yield from rows(
        "opted_out", lambda index: Answer(headers={"X-Robots-Tag": OPT_OUTS[index % len(OPT_OUTS)]})
    )

    for index, rng in world.draws("html_page"):
        caption, size_px = describe(rng, world.scene(rng)), world.dimensions(rng)
        answer = Answer(content_type="text/html; charset=utf-8")
        yield answered_row("html_page", index, rng, caption, size_px, HTML.encode(), answer=answer)
    for index, rng in world.draws("random_bytes"):
        caption, size_px = describe(rng, world.scene(rng)), world.dimensions(rng)
        body = b"\x00" + rng.randbytes(rng.randint(500, 5000))  # no image format starts with a zero and noise
        yield answered_row("random_bytes", index, rng, caption, size_px, body)
    for index, rng in world.draws("garbled_image"):
        caption, size_px = describe(rng, world.scene(rng)), world.dimensions(rng)
        extension, body = _garble(index, rng)
        yield answered_row("garbled_image", index, rng, caption, size_px, body, extension=extension)
    for index, rng in world.draws("truncated_jpeg"):
        row = plain_row(world, "truncated_jpeg", index, rng)
        assert row.body is not None
        yield replace(row, body=row.body[: len(row.body) * 6 // 10])
    for index, rng in world.draws("bomb"):
        caption = describe(rng, world.scene(rng))
        white_row = b"\xff" * (BOMB_SIDE_PX // 8)
        body = _png(BOMB_SIDE_PX, BOMB_SIDE_PX, 1, 0, (white_row for _ in range(BOMB_SIDE_PX)))
        yield answered_row("bomb", index, rng, caption, (BOMB_SIDE_PX, BOMB_SIDE_PX), body, extension="png")


# --- images that need care ---------------------------------------------------------------------

# EXIF orientation → how the stored image is made from the upright one (the inverse of how it is shown).
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
EXIF_ORIENTATION = 0x0112


def _exif_rotated(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored = image.transpose(STORED[orientation]) if orientation in STORED else image
    return encode(stored, exif=exif.tobytes())


def _cmyk(image: Image.Image, *, with_black: bool) -> Image.Image:
    """Return CMYK of the same colours, without the black plate or with as much black as possible."""
    if not with_black:
        return image.convert("CMYK")
    rgb_HWC = np.asarray(image, np.float32)
    brightest_HW1 = np.maximum(rgb_HWC.max(2, keepdims=True), 1)
    cmy_HWC = (1 - rgb_HWC / brightest_HW1) * 255
    cmyk_HWC = np.concatenate([cmy_HWC, 255 - brightest_HW1], axis=2)
    return Image.frombytes("CMYK", image.size, np.rint(cmyk_HWC).astype(np.uint8).tobytes())


def _sixteen_bits(image: Image.Image) -> bytes:
    """Return a PNG with 16 bits a channel; the low byte repeats the high one, so 1/257 of it is as before."""
    pixels = np.asarray(image).astype(np.uint16) * 257
    colour_type = 0 if image.mode == "L" else 2
    return _png(*image.size, 16, colour_type, (row.astype(">u2").tobytes() for row in pixels))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _black_where_clear(things: Image.Image) -> Image.Image:
    """Put black under the transparent pixels: a reader that forgets the alpha channel shows it."""
    pixels_HWC = np.asarray(things).copy()
    pixels_HWC[pixels_HWC[:, :, 3] == 0] = 0
    return Image.fromarray(pixels_HWC, "RGBA")


def _palette_with_hole(things: Image.Image) -> Image.Image:
    """Return a palette image whose colour 255 is black and transparent."""
    colours = things.convert("RGB").quantize(255, dither=Image.Dither.NONE)
    indices_HW = np.asarray(colours).copy()
    indices_HW[np.asarray(things.getchannel("A")) < 128] = 255
    picture = Image.fromarray(indices_HW, "P")
    palette = colours.getpalette() or []
    picture.putpalette(palette[: 255 * 3] + [0] * (256 * 3 - len(palette[: 255 * 3])))
    picture.info["transparency"] = 255
    return picture


def careful_images(world: World) -> Iterator[Row]:
    """Return images that are kept, and that a careless reader turns, tints, blackens or whitens."""

    def rows(
        planted: str, extension: str, encode: Callable[[int, Image.Image], bytes], *, colourless: bool = False
    ) -> Iterator[Row]:
        for index, rng in world.draws(planted):
            scene, size_px = world.scene(rng), world.dimensions(rng)
            if planted == "exif_rotation" and size_px[0] == size_px[1]:
                size_px = (
                    size_px[0],
                    round(size_px[0] * 4 / 3),
                )  # so that a forgotten turn shows in the size too
            image = draw(rng, scene, *size_px)
            if colourless:
                image = image.convert("L")
            caption = describe(rng, scene, colourless=colourless)
            expected = image.convert("RGB")
            body = encode(index, image)
            yield answered_row(
                planted, index, rng, caption, size_px, body, extension=extension, expected=expected
            )

    def transparent_rows(planted: str, make: Callable[[Image.Image], Image.Image]) -> Iterator[Row]:
        for index, rng in world.draws(planted):
            scene, size_px = replace(world.scene(rng), background="白色"), world.dimensions(rng)
            picture = make(draw_things(rng, scene, *size_px))
            body = encode(picture, "PNG", transparency=picture.info.get("transparency"))
            expected = _on_white(picture)
            yield answered_row(
                planted, index, rng, describe(rng, scene), size_px, body, extension="png", expected=expected
            )

    yield from rows("exif_rotation", "jpg", lambda index, image: _exif_rotated(image, index % 8 + 1))
    yield from rows("cmyk_jpeg", "jpg", lambda index, image: encode(_cmyk(image, with_black=index % 2 == 1)))
    yield from rows("grey_jpeg", "jpg", lambda index, image: encode(image), colourless=True)
    yield from rows("progressive_jpeg", "jpg", lambda index, image: encode(image, progressive=True))
    yield from rows("palette_png", "png", lambda index, image: encode(image.quantize(256), "PNG"))
    yield from transparent_rows("palette_transparent_png", _palette_with_hole)
    yield from transparent_rows("rgba_png", _black_where_clear)
    yield from rows("grey16_png", "png", lambda index, image: _sixteen_bits(image), colourless=True)
    yield from rows("rgb16_png", "png", lambda index, image: _sixteen_bits(image))
    yield from rows("webp", "webp", lambda index, image: encode(image, "WEBP"))


# --- images that are dropped when seen ---------------------------------------------------------

TINY_PX = ((8, 8), (10, 12), (15, 15), (30, 12), (1, 1))
STRIPS_PX = ((320, 40), (300, 48), (40, 320), (480, 60))
COPY_FORMATS = (("jpg", "JPEG", 60), ("webp", "WEBP", 70), ("jpg", "JPEG", 80), ("png", "PNG", None))


def image_dirt(world: World) -> Iterator[Row]:
    for planted, sizes_px in (("tiny", TINY_PX), ("strip", STRIPS_PX)):
        for index, rng in world.draws(planted):
            scene, size_px = world.scene(rng), sizes_px[index % len(sizes_px)]
            body = encode(draw(rng, scene, *size_px))
            yield answered_row(planted, index, rng, describe(rng, scene), size_px, body)
    for index, rng in world.draws("evaluation_copy"):
        # Found again on another page, at another size and quality, under a caption of that page's own.
        picture = world.evaluation[index % len(world.evaluation)]
        scale = rng.uniform(0.75, 1.5)
        copy = picture.image.resize((round(picture.image.width * scale), round(picture.image.height * scale)))
        extension, image_format, quality = COPY_FORMATS[index % len(COPY_FORMATS)]
        body = encode(copy, image_format, **({} if quality is None else {"quality": quality}))
        caption = describe(rng, picture.scene)
        yield answered_row("evaluation_copy", index, rng, caption, copy.size, body, extension=extension)
