"""The rows that the demo plants: clean ones, and classes of dirt in a known number with a written fate.

Dirt in the captions and addresses is made here, dirt in what the site answers in `planted_files`.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from PIL import Image

from data_prep.corpora.demo_scenes import (
    COLOURS,
    SHAPES,
    Caption,
    Kind,
    Scene,
    describe,
    draw,
    random_dimensions,
    random_training_scene,
)
from data_prep.sources.local_server import HOST, Answer

JPEG_QUALITY = 90


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
    "random_bytes": Plan(10, "not_an_image", "download"),  # not the first bytes of any image format
    "garbled_image": Plan(10, "undecodable", "download"),  # the first bytes of an image format, then noise
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
    expected: Image.Image | None = None  # the upright RGB image that must be kept, if that needs care


@dataclass(frozen=True, slots=True)
class EvaluationImage:
    scene: Scene
    caption: Caption
    image: Image.Image
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What the generators of rows share.

    Each row draws its own random numbers: classes do not interfere.
    """

    seed: int
    num_clean: int
    image_size_px: int
    dirt: float
    held_out: set[frozenset[Kind]]
    evaluation: list[EvaluationImage]

    def draws(self, planted: str) -> Iterator[tuple[int, Random]]:
        """Yield the number and the random generator of each row of a class."""
        plan = PLAN[planted]
        count = max(1, round(plan.count * self.dirt)) if plan.scales else plan.count
        for index in range(count):
            yield index, Random(f"{self.seed}/{planted}/{index}")

    def scene(self, rng: Random) -> Scene:
        return random_training_scene(rng, self.held_out)

    def dimensions(self, rng: Random) -> tuple[int, int]:
        return random_dimensions(rng, self.image_size_px)


def encode(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    if image_format in ("JPEG", "WEBP"):
        options = {"quality": JPEG_QUALITY, **options}
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def answered_row(
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
    """Return a row without a defect unless its body or answer has one; a body is answered with status 200."""
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


def plain_row(world: World, planted: str, index: int, rng: Random, answer: Answer | None = None) -> Row:
    scene, size_px = world.scene(rng), world.dimensions(rng)
    body = encode(draw(rng, scene, *size_px))
    return answered_row(planted, index, rng, describe(rng, scene), size_px, body, answer=answer)


def clean_rows(world: World) -> Iterator[Row]:
    for index in range(world.num_clean):
        yield plain_row(world, "clean", index, Random(f"{world.seed}/clean/{index}"))


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


def table_dirt(world: World) -> Iterator[Row]:
    """Return rows that the table gives away; their images are in order, so only text rules can drop them."""

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
        shown = world.evaluation[index % len(world.evaluation)]
        caption = describe(rng, shown.scene)
        return replace(
            row, url=shown.url, caption=caption.chinese, caption_en=caption.english, answer=None, body=None
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
            yield change(index, rng, plain_row(world, planted, index, rng))


def duplicates(world: World, clean: list[Row]) -> Iterator[Row]:
    for _, rng in world.draws("duplicate"):
        yield replace(rng.choice(clean), planted="duplicate", answer=None, body=None)
