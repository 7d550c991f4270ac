"""The demo corpus: a small web site of drawn pictures with Chinese captions, as dirty as the web.

Every class of dirt is planted in a known number with a written fate, so that a funnel can be checked row by
row: `planted.json` says how many rows of each class there are and what must become of them.
"""

import io
import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.corpora.demo_scenes import (
    COLOURS,
    SHAPES,
    Caption,
    Kind,
    Scene,
    describe,
    draw,
    draw_things,
    evaluation_scenes,
    hold_out_pairs,
    random_dimensions,
    random_training_scene,
)
from data_prep.formats.cnclip import EvaluationText, write_evaluation
from data_prep.sources.local_server import HOST, Answer, write_site
from pipeline.core.records import ConfigError

EVALUATION_NAME = "unseen"
NUM_TABLES = 3
HELD_OUT_SHARE = 0.15  # of the pairs of kinds of things
JPEG_QUALITY = 90
BOMB_SIDE_PX = 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """`[corpus]` of the demo: what the generator makes."""

    kind: Literal["demo"] = "demo"
    seed: int = 0  # everything drawn follows from it
    num_clean: int = 3000  # ordinary training rows, each with its own picture
    num_evaluation: int = 200  # pictures of unseen pairs of things, one caption each
    image_size_px: int = 96  # side of the most common, square picture; others are up to 3.1 times as long
    dirt: float = 1.0  # factor on the number of rows of each class of dirt in PLAN


@dataclass(frozen=True, slots=True)
class Plan:
    """One planted class: how many rows a default corpus has of it, and what must become of each of them."""

    count: int
    fate: str  # "kept", or the reason that it is dropped with
    stage: str | None  # that drops it; None: kept to the end
    scales: bool = True  # with DemoConfig.dirt


# Every row belongs to one class and is clean in every other respect.
PLAN = {
    "other_language": Plan(120, "language", "filter_text"),
    "low_score": Plan(150, "score_below_threshold", "filter_text"),
    "no_score": Plan(60, "score_missing", "filter_text"),
    "advertisement": Plan(80, "blacklist:advertising", "filter_text"),
    "file_name": Plan(60, "blacklist:file_name", "filter_text"),
    "short_caption": Plan(50, "too_short", "filter_text"),
    "long_caption": Plan(40, "too_long", "filter_text"),
    "no_caption": Plan(30, "caption_missing", "filter_text"),
    "bad_url": Plan(25, "url_invalid", "filter_text"),
    "evaluation_url": Plan(40, "evaluation_url", "filter_text"),
    "duplicate": Plan(90, "duplicate", "dedup"),  # the copies beyond the first
    "not_found": Plan(60, "http_404", "download"),
    "server_error": Plan(30, "http_error", "download"),  # 500, 503 and 403
    "hanging": Plan(4, "timeout", "download", scales=False),  # each costs the client its time-out
    "broken_connection": Plan(12, "connection", "download"),
    "html_page": Plan(25, "not_an_image", "download"),
    "random_bytes": Plan(10, "not_an_image", "download"),  # not the first bytes of any picture format
    "garbled_image": Plan(10, "undecodable", "download"),  # the first bytes of a picture format, then noise
    "truncated_jpeg": Plan(15, "truncated", "download"),
    "bomb": Plan(1, "pixel_limit", "download", scales=False),
    "opted_out": Plan(20, "opted_out", "download"),
    "exif_rotation": Plan(16, "kept", None, scales=False),  # each of the eight orientations twice
    "cmyk_jpeg": Plan(8, "kept", None),
    "grey_jpeg": Plan(8, "kept", None),
    "progressive_jpeg": Plan(12, "kept", None),
    "palette_png": Plan(8, "kept", None),
    "palette_transparent_png": Plan(8, "kept", None),
    "rgba_png": Plan(8, "kept", None),
    "grey16_png": Plan(6, "kept", None),
    "rgb16_png": Plan(6, "kept", None),
    "webp": Plan(12, "kept", None),
    "tiny": Plan(20, "too_small", "filter_image"),
    "strip": Plan(15, "aspect", "filter_image"),
    "evaluation_copy": Plan(30, "evaluation_image", "filter_image"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the caption tables and what the site answers to its URL."""

    planted: str  # a key of PLAN, or "clean"
    url: str | None
    caption: str | None
    caption_en: str
    width_px: int
    height_px: int
    similarity: float | None
    language: str = "zh"
    answer: Answer | None = None
    body: bytes | None = None  # of the file that the answer names
    expected: Image.Image | None = None  # the upright RGB picture that must be kept, where that needs care


@dataclass(frozen=True, slots=True)
class EvaluationPicture:
    scene: Scene
    caption: Caption
    image: Image.Image
    url: str


@dataclass(frozen=True, slots=True)
class World:
    """What the generators of rows share. Each row draws its own random numbers: classes do not interfere."""

    config: DemoConfig
    held_out: set[frozenset[Kind]]
    evaluation: list[EvaluationPicture]

    def draws(self, planted: str) -> Iterator[tuple[int, Random]]:
        """Number and random generator of each row of a class."""
        plan = PLAN[planted]
        count = max(1, round(plan.count * self.config.dirt)) if plan.scales else plan.count
        for index in range(count):
            yield index, Random(f"{self.config.seed}/{planted}/{index}")

    def scene(self, rng: Random) -> Scene:
        return random_training_scene(rng, self.held_out)

    def dimensions(self, rng: Random) -> tuple[int, int]:
        return random_dimensions(rng, self.config.image_size_px)


def _encode(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    if image_format in ("JPEG", "WEBP"):
        options = {"quality": JPEG_QUALITY, **options}
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _row(
    planted: str,
    index: int,
    rng: Random,
    caption: Caption,
    size_px: tuple[int, int],
    body: bytes | None,
    *,
    extension: str = "jpg",
    answer: Answer | None = None,
    expected: Image.Image | None = None,
) -> Row:
    """A row that nothing is wrong with unless its body or answer is; a body is answered with status 200."""
    name = f"{planted}/{index:05d}.{extension}"
    content_type = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}[extension]
    answer = answer or Answer(content_type=content_type)
    return Row(
        planted=planted,
        url=f"http://{HOST}/{name}",
        caption=caption.chinese,
        caption_en=caption.english,
        width_px=size_px[0],
        height_px=size_px[1],
        similarity=round(rng.uniform(0.265, 0.42), 6),
        answer=answer if body is None else replace(answer, file=name),
        body=body,
        expected=expected,
    )


def _plain_row(world: World, planted: str, index: int, rng: Random, answer: Answer | None = None) -> Row:
    scene, size_px = world.scene(rng), world.dimensions(rng)
    body = _encode(draw(rng, scene, *size_px))
    return _row(planted, index, rng, describe(rng, scene), size_px, body, answer=answer)


def _clean_rows(world: World) -> Iterator[Row]:
    for index in range(world.config.num_clean):
        yield _plain_row(world, "clean", index, Random(f"{world.config.seed}/clean/{index}"))


# --- dirt in the table ---------------------------------------------------------------------------

FOREIGN = {  # all of them 5 to 50 characters long
    "en": (
        "three small red circles",
        "a yellow star on a blue square",
        "two green triangles",
        "one big pink heart",
    ),
    "ja": (
        "赤い丸が三つあります",
        "青い四角の上に黄色い星",
        "白い背景に緑の三角形",
        "ハートとひし形のイラスト",
    ),
    "ko": (
        "빨간 원 세 개가 있는 그림",
        "파란 사각형 위의 노란 별",
        "초록색 삼각형 두 개",
        "하트와 마름모 그림",
    ),
    "fr": (
        "trois petits cercles rouges",
        "une étoile jaune sur fond bleu",
        "deux triangles verts",
        "un cœur rose",
    ),
    "de": (
        "drei kleine rote Kreise",
        "ein gelber Stern auf Blau",
        "zwei grüne Dreiecke",
        "ein großes rosa Herz",
    ),
    "ru": (
        "три маленьких красных круга",
        "жёлтая звезда на синем фоне",
        "два зелёных треугольника",
        "большое сердце",
    ),
}
# {c} is a colour and {a} a shape; each holds words of blacklists/advertising.txt
ADVERTISEMENTS = (
    "{c}{a}贴纸厂家直销包邮",
    "【限时特价】{c}{a}挂件买一送一",
    "{c}{a}抱枕，加微信领优惠券",
    "儿童{a}玩具批发价，一件代发",
    "{c}{a}胸针清仓甩卖，全场折扣",
    "正品保证！{c}{a}饰品官方旗舰店",
    "{c}{a}地垫，扫码关注立即购买",
    "{a}模具厂家直供，联系客服",
    "诚招代理：{c}{a}文具，微信同号",
    "想要{c}{a}的加VX咨询，货到付款",
)
FILE_NAMES = (
    "IMG_{date}_{number:06d}.jpg",
    "IMG_{number:04d}.JPG",
    "DSC{number:05d}.JPG",
    "DSC_{number:04d}.jpg",
    "微信图片_{date}{number:06d}.png",
    "mmexport{number:013d}.jpg",
    "屏幕截图_{date}.png",
    "QQ截图{date}{number:06d}.png",
    "未标题-{number}.jpg",
    "{date}-{number:04d}.jpeg",
)
SHORT_CAPTIONS = ("图片", "{c}", "{a}", "{c}的", "一张图", "好看")
MISSING_CAPTIONS = (None, "", "   ", "\u3000", "\t\n")
INVALID_URLS = (
    None,
    "",
    "ftp://corpus.invalid/bad_url/{index:05d}.jpg",
    "data:image/png;base64,iVBORw0KGgo=",
    "//corpus.invalid/bad_url/{index:05d}.jpg",
    "/upload/{index:05d}.jpg",
    "javascript:void({index})",
)


def _table_dirt(world: World) -> Iterator[Row]:
    """Rows that the table alone gives away; their pictures are in order: only text rules can drop them."""

    def fill(forms: tuple[str, ...], index: int, rng: Random) -> str:
        return forms[index % len(forms)].format(
            c=rng.choice(list(COLOURS)),
            a=rng.choice(list(SHAPES)),
            date=f"20{rng.randint(10, 24)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}",
            number=rng.randint(1, 9999),
        )

    def other_language(index: int, rng: Random, row: Row) -> Row:
        language = list(FOREIGN)[index % len(FOREIGN)]
        return replace(row, caption=rng.choice(FOREIGN[language]), language=language)

    def low_score(index: int, rng: Random, row: Row) -> Row:
        # On the web a low score means a caption that belongs to something else.
        other = describe(rng, world.scene(rng))
        return replace(
            row,
            caption=other.chinese,
            caption_en=other.english,
            similarity=round(rng.uniform(0.12, 0.2599), 6),
        )

    def long_caption(index: int, rng: Random, row: Row) -> Row:
        text = f"这张图片的内容如下：{row.caption}"
        while len(text) <= 50:
            text += "；" + describe(rng, world.scene(rng)).chinese
        return replace(row, caption=text)

    def bad_url(index: int, rng: Random, row: Row) -> Row:
        url = INVALID_URLS[index % len(INVALID_URLS)]
        return replace(row, url=url and url.format(index=index), answer=None, body=None)

    def evaluation_url(index: int, rng: Random, row: Row) -> Row:
        picture = world.evaluation[index % len(world.evaluation)]
        caption = describe(rng, picture.scene)
        return replace(
            row, url=picture.url, caption=caption.chinese, caption_en=caption.english, answer=None, body=None
        )

    changes: dict[str, Callable[[int, Random, Row], Row]] = {
        "other_language": other_language,
        "low_score": low_score,
        "no_score": lambda index, rng, row: replace(row, similarity=None),
        "advertisement": lambda index, rng, row: replace(row, caption=fill(ADVERTISEMENTS, index, rng)),
        "file_name": lambda index, rng, row: replace(row, caption=fill(FILE_NAMES, index, rng)),
        "short_caption": lambda index, rng, row: replace(row, caption=fill(SHORT_CAPTIONS, index, rng)),
        "long_caption": long_caption,
        "no_caption": lambda index, rng, row: replace(
            row, caption=MISSING_CAPTIONS[index % len(MISSING_CAPTIONS)]
        ),
        "bad_url": bad_url,
        "evaluation_url": evaluation_url,
    }
    for planted, change in changes.items():
        for index, rng in world.draws(planted):
            yield change(index, rng, _plain_row(world, planted, index, rng))


def _duplicates(world: World, clean: list[Row]) -> Iterator[Row]:
    for _, rng in world.draws("duplicate"):
        yield replace(rng.choice(clean), planted="duplicate", answer=None, body=None)


# --- dirt on the way -----------------------------------------------------------------------------

PNG_START = b"\x89PNG\r\n\x1a\n"
OPT_OUTS = ("noai", "noimageai", "noindex, noai", "noimageindex")
HTML = "<!DOCTYPE html>\n<html><head><title>404</title></head><body><p>您访问的图片不存在</p></body></html>\n"


def _png(width_px: int, height_px: int, bits: int, colour_type: int, rows: Iterable[bytes]) -> bytes:
    """A PNG from packed rows of pixels (without filter bytes), made without ever holding the picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(6)
    packed = [packer.compress(b"\0" + row) for row in rows]
    packed.append(packer.flush())
    header = struct.pack(">IIBBBBB", width_px, height_px, bits, colour_type, 0, 0, 0)
    return PNG_START + chunk(b"IHDR", header) + chunk(b"IDAT", b"".join(packed)) + chunk(b"IEND", b"")


def _garble(index: int, rng: Random) -> tuple[str, bytes]:
    """The first bytes of a picture format and then noise, with the end that the format asks for."""
    noise = rng.randbytes(rng.randint(800, 4000))
    if index % 3 == 0:
        return "png", PNG_START + noise
    if index % 3 == 1:
        noise = noise.replace(
            b"\xff", b"\x7f"
        )  # no marker by accident, so it can't turn into a cut-off picture
        return (
            "jpg",
            b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + noise + b"\xff\xd9",
        )
    body = b"WEBPVP8 " + struct.pack("<I", len(noise) // 2 * 2) + noise[: len(noise) // 2 * 2]
    return "webp", b"RIFF" + struct.pack("<I", len(body)) + body


def _download_dirt(world: World) -> Iterator[Row]:
    """Rows whose table entry is in order and whose URL is not."""

    def rows(planted: str, answer_of: Callable[[int], Answer]) -> Iterator[Row]:
        for index, rng in world.draws(planted):
            yield _plain_row(world, planted, index, rng, answer_of(index))

    def bodiless(planted: str, answer_of: Callable[[int], Answer]) -> Iterator[Row]:
        for index, rng in world.draws(planted):
            caption = describe(rng, world.scene(rng))
            yield _row(planted, index, rng, caption, world.dimensions(rng), None, answer=answer_of(index))

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
        yield _row("html_page", index, rng, caption, size_px, HTML.encode(), answer=answer)
    for index, rng in world.draws("random_bytes"):
        caption, size_px = describe(rng, world.scene(rng)), world.dimensions(rng)
        body = b"\x00" + rng.randbytes(
            rng.randint(500, 5000)
        )  # no picture format starts with a zero and noise
        yield _row("random_bytes", index, rng, caption, size_px, body)
    for index, rng in world.draws("garbled_image"):
        caption, size_px = describe(rng, world.scene(rng)), world.dimensions(rng)
        extension, body = _garble(index, rng)
        yield _row("garbled_image", index, rng, caption, size_px, body, extension=extension)
    for index, rng in world.draws("truncated_jpeg"):
        row = _plain_row(world, "truncated_jpeg", index, rng)
        assert row.body is not None
        yield replace(row, body=row.body[: len(row.body) * 6 // 10])
    for index, rng in world.draws("bomb"):
        caption = describe(rng, world.scene(rng))
        white_row = b"\xff" * (BOMB_SIDE_PX // 8)
        body = _png(BOMB_SIDE_PX, BOMB_SIDE_PX, 1, 0, (white_row for _ in range(BOMB_SIDE_PX)))
        yield _row("bomb", index, rng, caption, (BOMB_SIDE_PX, BOMB_SIDE_PX), body, extension="png")


# --- pictures that need care ---------------------------------------------------------------------

# EXIF orientation → how the stored picture is made from the upright one (the inverse of how it is shown).
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
    return _encode(stored, exif=exif.tobytes())


def _cmyk(image: Image.Image, *, with_black: bool) -> Image.Image:
    """CMYK that shows the same colours, without the black plate or with as much black as there can be."""
    if not with_black:
        return image.convert("CMYK")
    rgb_HWC = np.asarray(image, np.float32)
    brightest_HW1 = np.maximum(rgb_HWC.max(2, keepdims=True), 1)
    cmy_HWC = (1 - rgb_HWC / brightest_HW1) * 255
    cmyk_HWC = np.concatenate([cmy_HWC, 255 - brightest_HW1], axis=2)
    return Image.frombytes("CMYK", image.size, np.rint(cmyk_HWC).astype(np.uint8).tobytes())


def _sixteen_bits(image: Image.Image) -> bytes:
    """A PNG with 16 bits a channel, whose low byte repeats the high one: divided by 257 it is as before."""
    pixels = np.asarray(image).astype(np.uint16) * 257
    colour_type = 0 if image.mode == "L" else 2
    return _png(*image.size, 16, colour_type, (row.astype(">u2").tobytes() for row in pixels))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _black_where_clear(things: Image.Image) -> Image.Image:
    """Black under the transparent pixels: a reader that forgets the alpha channel shows it."""
    pixels_HWC = np.asarray(things).copy()
    pixels_HWC[pixels_HWC[:, :, 3] == 0] = 0
    return Image.fromarray(pixels_HWC, "RGBA")


def _palette_with_hole(things: Image.Image) -> Image.Image:
    """A palette picture whose colour 255 is black and transparent."""
    colours = things.convert("RGB").quantize(255, dither=Image.Dither.NONE)
    indices_HW = np.asarray(colours).copy()
    indices_HW[np.asarray(things.getchannel("A")) < 128] = 255
    picture = Image.fromarray(indices_HW, "P")
    palette = colours.getpalette() or []
    picture.putpalette(palette[: 255 * 3] + [0] * (256 * 3 - len(palette[: 255 * 3])))
    picture.info["transparency"] = 255
    return picture


def _careful_pictures(world: World) -> Iterator[Row]:
    """Pictures that are kept, and that a careless reader turns, tints, blackens or whitens."""

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
            yield _row(planted, index, rng, caption, size_px, body, extension=extension, expected=expected)

    def transparent_rows(planted: str, make: Callable[[Image.Image], Image.Image]) -> Iterator[Row]:
        for index, rng in world.draws(planted):
            scene, size_px = replace(world.scene(rng), background="白色"), world.dimensions(rng)
            picture = make(draw_things(rng, scene, *size_px))
            body = _encode(picture, "PNG", transparency=picture.info.get("transparency"))
            expected = _on_white(picture)
            yield _row(
                planted, index, rng, describe(rng, scene), size_px, body, extension="png", expected=expected
            )

    yield from rows("exif_rotation", "jpg", lambda index, image: _exif_rotated(image, index % 8 + 1))
    yield from rows("cmyk_jpeg", "jpg", lambda index, image: _encode(_cmyk(image, with_black=index % 2 == 1)))
    yield from rows("grey_jpeg", "jpg", lambda index, image: _encode(image), colourless=True)
    yield from rows("progressive_jpeg", "jpg", lambda index, image: _encode(image, progressive=True))
    yield from rows("palette_png", "png", lambda index, image: _encode(image.quantize(256), "PNG"))
    yield from transparent_rows("palette_transparent_png", _palette_with_hole)
    yield from transparent_rows("rgba_png", _black_where_clear)
    yield from rows("grey16_png", "png", lambda index, image: _sixteen_bits(image), colourless=True)
    yield from rows("rgb16_png", "png", lambda index, image: _sixteen_bits(image))
    yield from rows("webp", "webp", lambda index, image: _encode(image, "WEBP"))


# --- pictures that are dropped when seen ---------------------------------------------------------

TINY_PX = ((8, 8), (10, 12), (15, 15), (30, 12), (1, 1))
STRIPS_PX = ((320, 40), (300, 48), (40, 320), (480, 60))
COPY_FORMATS = (("jpg", "JPEG", 60), ("webp", "WEBP", 70), ("jpg", "JPEG", 80), ("png", "PNG", None))


def _image_dirt(world: World) -> Iterator[Row]:
    for planted, sizes_px in (("tiny", TINY_PX), ("strip", STRIPS_PX)):
        for index, rng in world.draws(planted):
            scene, size_px = world.scene(rng), sizes_px[index % len(sizes_px)]
            body = _encode(draw(rng, scene, *size_px))
            yield _row(planted, index, rng, describe(rng, scene), size_px, body)
    for index, rng in world.draws("evaluation_copy"):
        # Found again on another page, at another size and quality, under a caption of that page's own.
        picture = world.evaluation[index % len(world.evaluation)]
        scale = rng.uniform(0.75, 1.5)
        copy = picture.image.resize((round(picture.image.width * scale), round(picture.image.height * scale)))
        extension, image_format, quality = COPY_FORMATS[index % len(COPY_FORMATS)]
        body = _encode(copy, image_format, **({} if quality is None else {"quality": quality}))
        caption = describe(rng, picture.scene)
        yield _row("evaluation_copy", index, rng, caption, copy.size, body, extension=extension)


# --- the corpus ----------------------------------------------------------------------------------

SCHEMA = pa.schema(
    [
        ("SAMPLE_ID", pa.int64()),
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("HEIGHT", pa.float64()),  # as in the public extract of LAION's Chinese part
        ("WIDTH", pa.float64()),
        ("LICENSE", pa.string()),
        ("LANGUAGE", pa.string()),
        ("NSFW", pa.string()),
        ("similarity", pa.float64()),
        ("caption_en", pa.string()),
    ]
)


def _make_world(config: DemoConfig) -> World:
    held_out = hold_out_pairs(Random(f"{config.seed}/held out"), HELD_OUT_SHARE)
    evaluation = []
    for index, scene in enumerate(
        evaluation_scenes(Random(f"{config.seed}/evaluation"), held_out, config.num_evaluation)
    ):
        rng = Random(f"{config.seed}/evaluation/{index}")
        image = draw(rng, scene, *random_dimensions(rng, config.image_size_px))
        url = f"http://{HOST}/evaluation/{index:05d}.jpg"
        evaluation.append(EvaluationPicture(scene, describe(rng, scene), image, url))
    return World(config, held_out, evaluation)


def _table(rows: list[Row], first_id: int) -> pa.Table:
    return pa.table(
        {
            "SAMPLE_ID": range(first_id, first_id + len(rows)),
            "URL": [row.url for row in rows],
            "TEXT": [row.caption for row in rows],
            "HEIGHT": [float(row.height_px) for row in rows],
            "WIDTH": [float(row.width_px) for row in rows],
            "LICENSE": ["?"] * len(rows),
            "LANGUAGE": [row.language for row in rows],
            "NSFW": ["UNLIKELY"] * len(rows),
            "similarity": [row.similarity for row in rows],
            "caption_en": [row.caption_en for row in rows],
        },
        schema=SCHEMA,
    )


def make_demo(config: DemoConfig, folder: str | Path) -> None:
    """Write the demo corpus into a new folder; the same configuration gives the same bytes.

    - `tables/demo-0000N.parquet`: caption tables with LAION's columns and `caption_en`, rows shuffled.
    - `site.json`, `site/`: the web site that answers their URLs (see `data_prep.sources.local_server`).
    - `evaluation/unseen/`: the evaluation set in Chinese-CLIP's layout, and its URLs in `unseen_urls.txt`.
    - `planted.json`: `{class: {"count", "fate", "stage"}}`; `planted.parquet`: the same for every row, by
      SAMPLE_ID.
    - `expected/`, `expected.json` (`{URL: PNG file}`): the upright RGB pictures that a reader must see in
      the files that need care.

    ConfigError where a number leaves nothing to make.
    """
    least = {"num_clean": 1, "num_evaluation": 1, "image_size_px": 32, "dirt": 0.01}
    for name, minimum in least.items():
        if getattr(config, name) < minimum:
            raise ConfigError(f"corpus.{name}: {getattr(config, name)}, but at least {minimum} is needed")
    folder = Path(folder)
    world = _make_world(config)
    clean = list(_clean_rows(world))
    rows = [
        *clean,
        *_table_dirt(world),
        *_duplicates(world, clean),
        *_download_dirt(world),
        *_careful_pictures(world),
        *_image_dirt(world),
    ]

    answers: dict[str, Answer] = {}
    expected: dict[str, str] = {}
    for row in rows:
        if row.answer is None:
            continue
        assert row.url is not None
        answers[row.url.removeprefix(f"http://{HOST}")] = row.answer
        if row.body is not None and row.answer.file is not None:
            path = folder / "site" / row.answer.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row.body)
        if row.expected is not None:
            assert row.answer.file is not None
            expected[row.url] = f"expected/{row.answer.file}.png"
            path = folder / expected[row.url]
            path.parent.mkdir(parents=True, exist_ok=True)
            row.expected.save(path)
    write_site(folder, answers)
    (folder / "expected.json").write_text(json.dumps(expected, indent=0, sort_keys=True), encoding="utf-8")

    Random(f"{config.seed}/order").shuffle(rows)
    (folder / "tables").mkdir(exist_ok=True)
    step = -(-len(rows) // NUM_TABLES)
    for number in range(NUM_TABLES):
        part = rows[number * step : (number + 1) * step]
        pq.write_table(_table(part, number * step), folder / f"tables/demo-{number:05d}.parquet")

    plans = {"clean": Plan(config.num_clean, "kept", None), **PLAN}
    counts = Counter(row.planted for row in rows)
    summary = {
        planted: {"count": counts[planted], "fate": plan.fate, "stage": plan.stage}
        for planted, plan in plans.items()
    }
    (folder / "planted.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    pq.write_table(
        pa.table(
            {
                "SAMPLE_ID": range(len(rows)),
                "planted": [row.planted for row in rows],
                "fate": [plans[row.planted].fate for row in rows],
                "stage": [plans[row.planted].stage for row in rows],
            }
        ),
        folder / "planted.parquet",
    )
    write_evaluation(
        folder / "evaluation" / EVALUATION_NAME,
        EVALUATION_NAME,
        [_encode(picture.image) for picture in world.evaluation],
        [EvaluationText(picture.caption.chinese, [index]) for index, picture in enumerate(world.evaluation)],
        [picture.url for picture in world.evaluation],
    )
