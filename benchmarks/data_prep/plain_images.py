"""Draw plain images of many kinds, alter images as copies on the web are altered, and cut photographs.

Every image of a kind is drawn from a different number, so that none is meant to be a copy of another.
"""

import io
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

Colour = tuple[int, int, int]

COLOURS: tuple[Colour, ...] = (
    (220, 40, 40), (40, 70, 220), (30, 160, 60), (240, 210, 30), (140, 50, 170), (20, 20, 20),
    (250, 130, 30), (120, 70, 40), (250, 140, 180), (40, 190, 200), (255, 255, 255), (130, 130, 130),
)  # fmt: skip
GROUNDS: tuple[Colour, ...] = (
    (255, 255, 255), (255, 255, 255), (245, 235, 210), (190, 220, 250), (170, 170, 170), (30, 30, 40),
)  # fmt: skip
SIZES = ((160, 180), (200, 180), (240, 180), (200, 200), (256, 192))
# Glyphs of DejaVu Sans, which matplotlib brings along.
GLYPHS = "".join(
    chr(code)
    for first, last in (
        (0x21, 0x7E),
        (0xC0, 0x17F),
        (0x391, 0x3C9),
        (0x410, 0x44F),
        (0x2190, 0x21FF),
        (0x2600, 0x26B1),
    )
    for code in range(first, last + 1)
)


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size_px)


def _contrasting(rng: random.Random, ground: Colour) -> Colour:
    return rng.choice(
        [colour for colour in COLOURS if max(abs(a - b) for a, b in zip(colour, ground, strict=True)) > 60]
    )


def _regular(
    draw: ImageDraw.ImageDraw, rng: random.Random, x: float, y: float, r: float, colour: Colour
) -> None:
    """Draw a disc, ring, rectangle, star, cross, or regular polygon."""
    kind = rng.choice(("disc", "ring", "box", "polygon", "star", "cross"))
    if kind == "disc":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)
    elif kind == "ring":
        draw.ellipse(
            [x - r, y - r, x + r, y + r], outline=colour, width=max(2, round(r / rng.choice((3, 5))))
        )
    elif kind == "box":
        draw.rectangle([x - r, y - r * 0.8, x + r, y + r * 0.8], fill=colour)
    elif kind == "cross":
        draw.rectangle([x - r, y - r / 3, x + r, y + r / 3], fill=colour)
        draw.rectangle([x - r / 3, y - r, x + r / 3, y + r], fill=colour)
    else:
        corners, inner = (rng.randint(3, 6), 1.0) if kind == "polygon" else (rng.randint(4, 7), 0.45)
        turn = rng.random() * math.tau
        count = corners if kind == "polygon" else 2 * corners
        radii = [r if kind == "polygon" or point % 2 == 0 else r * inner for point in range(count)]
        points = [
            (
                x + radius * math.sin(turn + i * math.tau / count),
                y - radius * math.cos(turn + i * math.tau / count),
            )
            for i, radius in enumerate(radii)
        ]
        draw.polygon(points, fill=colour)


def _canvas(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw, Colour]:
    ground = rng.choice(GROUNDS)
    image = Image.new("RGB", rng.choice(SIZES), ground)
    return image, ImageDraw.Draw(image), ground


def shape(rng: random.Random) -> Image.Image:
    """Draw one shape somewhere on a plain ground, with a few specks."""
    image, draw, ground = _canvas(rng)
    width, height = image.size
    r = rng.uniform(20, 50)
    _regular(draw, rng, rng.uniform(r, width - r), rng.uniform(r, height - r), r, _contrasting(rng, ground))
    for _ in range(60):
        draw.point((rng.randrange(width), rng.randrange(height)), fill=rng.choice(COLOURS))
    return image


def icon(rng: random.Random) -> Image.Image:
    """Draw one to three shapes of one colour in the middle of a square."""
    ground = rng.choice(GROUNDS)
    image = Image.new("RGB", (128, 128), ground)
    draw, colour = ImageDraw.Draw(image), _contrasting(rng, ground)
    for _ in range(rng.randint(1, 3)):
        _regular(draw, rng, rng.uniform(44, 84), rng.uniform(44, 84), rng.uniform(14, 42), colour)
    return image


def letter(rng: random.Random) -> Image.Image:
    """Draw a large character, black on white or in colour; the generator never repeats one."""
    ground = rng.choice(GROUNDS)
    image = Image.new("RGB", (160, 160), ground)
    ImageDraw.Draw(image).text(
        (80, 80), rng.choice(GLYPHS), fill=_contrasting(rng, ground), font=_font(110), anchor="mm"
    )
    return image


def document(rng: random.Random) -> Image.Image:
    """Draw a page of dark text on white: title, paragraphs, perhaps a second column or a box."""
    image = Image.new("RGB", (210, 297), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    size = rng.choice((7, 8, 9))
    font, y = _font(size), rng.randint(10, 26)
    if rng.random() < 0.6:
        draw.text(
            (rng.choice((16, 50)), y), _words(rng, rng.randint(2, 4)), fill=(0, 0, 0), font=_font(size + 5)
        )
        y += size + 14
    columns = [(16, 178)] if rng.random() < 0.7 else [(16, 84), (110, 84)]
    for left, width in columns:
        line_y = y
        while line_y < 280:
            for line in range(rng.randint(2, 7)):
                text = _words(rng, 12)
                length = width if line < 6 and rng.random() < 0.85 else rng.randint(20, width)
                while font.getlength(text) > length:
                    text = text[:-1]
                draw.text((left, line_y), text, fill=(20, 20, 20), font=font)
                line_y += size + 3
                if line_y > 280:
                    break
            line_y += rng.randint(3, 12)
    return image


def _words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("etaoinshrdlucmfwypvbgk", k=rng.randint(1, 9))) for _ in range(count))


def logo(rng: random.Random) -> Image.Image:
    """Draw a mark and a word next to it or below."""
    image = Image.new("RGB", (240, 120), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    _regular(draw, rng, rng.uniform(40, 60), 60, rng.uniform(22, 36), _contrasting(rng, (255, 255, 255)))
    text = "".join(rng.choices("ABCDEFGHIKLMNOPRSTUVXYZ", k=rng.randint(3, 6)))
    draw.text(
        (100, 60),
        text,
        fill=_contrasting(rng, (255, 255, 255)),
        font=_font(rng.choice((26, 30, 34))),
        anchor="lm",
    )
    return image


def chart(rng: random.Random) -> Image.Image:
    """Draw axes with bars, a line or points; or a pie."""
    image = Image.new("RGB", (240, 180), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    kind = rng.choice(("bars", "line", "points", "pie"))
    if kind == "pie":
        angle = rng.uniform(0, 360)
        for part in range(rng.randint(3, 6)):
            step = rng.uniform(30, 110)
            draw.pieslice([50, 20, 190, 160], angle, angle + step, fill=COLOURS[part])
            angle += step
        return image
    draw.line([24, 10, 24, 160, 230, 160], fill=(0, 0, 0), width=2)
    colour, count = rng.choice(COLOURS[:10]), rng.randint(4, 9)
    heights = [rng.uniform(8, 140) for _ in range(count)]
    xs = [34 + i * 190 / count for i in range(count)]
    if kind == "bars":
        for x, height in zip(xs, heights, strict=True):
            draw.rectangle([x, 160 - height, x + 120 / count, 159], fill=colour)
    elif kind == "line":
        draw.line(
            [point for x, height in zip(xs, heights, strict=True) for point in (x, 160 - height)],
            fill=colour,
            width=3,
        )
    else:
        for x, height in zip(xs * 3, [rng.uniform(8, 140) for _ in range(3 * count)], strict=True):
            draw.ellipse([x - 4, 156 - height, x + 4, 164 - height], fill=colour)
    return image


def flag(rng: random.Random) -> Image.Image:
    """Draw two to four stripes, upright or lying, or a cross; sometimes with an emblem."""
    image = Image.new("RGB", (240, 160), rng.choice(COLOURS))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.2:
        x, wide, colour = rng.choice((80, 120)), rng.choice((24, 36)), rng.choice(COLOURS)
        draw.rectangle([x - wide / 2, 0, x + wide / 2, 160], fill=colour)
        draw.rectangle([0, 80 - wide / 2, 240, 80 + wide / 2], fill=colour)
    else:
        count, lying, before = rng.randint(2, 4), rng.random() < 0.5, None
        for stripe in range(count):
            colour = rng.choice([each for each in COLOURS if each != before])
            before = colour
            box = [0, 160 * stripe / count, 240, 160] if lying else [240 * stripe / count, 0, 240, 160]
            draw.rectangle(box, fill=colour)
    if rng.random() < 0.6:
        x, y = rng.choice((50, 120)), rng.choice((50, 80))
        _regular(draw, rng, x, y, rng.uniform(16, 36), rng.choice(COLOURS))
    return image


def product(rng: random.Random) -> Image.Image:
    """Draw a shaded thing of a few parts on white with a soft shadow, as shops show them."""
    image = Image.new("RGB", (224, 224), (255, 255, 255))
    shadow = ImageDraw.Draw(image)
    base = rng.uniform(160, 200)
    shadow.ellipse([40, base - 8, 184, base + 14], fill=(205, 205, 205))
    image = image.filter(ImageFilter.GaussianBlur(6))
    colour = rng.choice(COLOURS[:10])
    for _ in range(rng.randint(2, 4)):
        mask = Image.new("L", image.size, 0)
        x, wide, top = rng.uniform(90, 134), rng.uniform(14, 60), rng.uniform(30, 120)
        box = [x - wide, top, x + wide, rng.uniform(top + 30, max(base, top + 40))]
        if rng.random() < 0.5:
            ImageDraw.Draw(mask).ellipse(box, fill=255)
        else:
            ImageDraw.Draw(mask).rounded_rectangle(box, radius=rng.uniform(2, 20), fill=255)
        shade = Image.linear_gradient("L").resize(image.size).rotate(rng.choice((0, 90, 180, 270)))
        tint = Image.merge(
            "RGB", [shade.point(lambda v, c=c: min(255, int(c * 0.55 + v * 0.45))) for c in colour]
        )
        image.paste(tint, (0, 0), mask.filter(ImageFilter.GaussianBlur(1)))
        colour = tuple(min(255, max(0, part + rng.randint(-60, 60))) for part in colour)  # type: ignore[assignment]
    return image


def gradient(rng: random.Random) -> Image.Image:
    """Draw a ground that turns from one colour into another."""
    one, two = rng.sample([tuple(rng.randrange(0, 256, 17) for _ in range(3)) for _ in range(2)], 2)
    shade = Image.linear_gradient("L").resize((300, 300)).rotate(rng.uniform(0, 360)).crop((60, 60, 240, 240))
    return Image.merge(
        "RGB",
        [shade.point([a + (b - a) * v // 255 for v in range(256)]) for a, b in zip(one, two, strict=True)],
    )


KINDS: Mapping[str, Callable[[random.Random], Image.Image]] = {
    "shapes": shape, "icons": icon, "letters": letter, "documents": document, "logos": logo, "charts": chart,
    "flags": flag, "products": product, "gradients": gradient,
}  # fmt: skip


def drawn(kind: str, count: int, seed: int = 0) -> list[Image.Image]:
    """Draw `count` images of a kind; what comes out equal to an earlier one is drawn again."""
    images: list[Image.Image] = []
    seen: set[bytes] = set()
    number = 0
    while len(images) < count:
        image = KINDS[kind](random.Random(f"{seed}/{kind}/{number}"))
        number += 1
        if image.tobytes() not in seen:
            seen.add(image.tobytes())
            images.append(image)
    return images


def cut_photographs(folder: Path, side_px: int = 160) -> Iterator[Image.Image]:
    """Yield square pieces of the photographs in a folder that do not overlap, in colour and in grey."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        for top in range(0, image.height - side_px + 1, side_px):
            for left in range(0, image.width - side_px + 1, side_px):
                yield image.crop((left, top, left + side_px, top + side_px))


def _encoded(image: Image.Image, image_format: str, **options: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return Image.open(buffer).convert("RGB")


def _cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    box = (left * width, top * height, width * (1 - right), height * (1 - bottom))
    return image.crop(tuple(round(edge) for edge in box))  # type: ignore[arg-type]


def _resized(image: Image.Image, width: float, height: float) -> Image.Image:
    size = (max(16, round(image.width * width)), max(16, round(image.height * height)))
    return image.resize(size, Image.Resampling.LANCZOS)


ALTERATIONS: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "png": lambda image: _encoded(image, "PNG"),
    "jpeg 75": lambda image: _encoded(image, "JPEG", quality=75),
    "jpeg 30": lambda image: _encoded(image, "JPEG", quality=30),
    "webp 60": lambda image: _encoded(image, "WEBP", quality=60),
    "3% brighter": lambda image: _encoded(ImageEnhance.Brightness(image).enhance(1.03), "JPEG", quality=85),
    "half": lambda image: _encoded(_resized(image, 0.5, 0.5), "JPEG", quality=85),
    "quarter": lambda image: _encoded(_resized(image, 0.25, 0.25), "JPEG", quality=85),
    "double": lambda image: _encoded(_resized(image, 2, 2), "JPEG", quality=85),
    "squashed": lambda image: _encoded(image.resize((128, 128)), "JPEG", quality=85),
    "squashed 2:1": lambda image: _encoded(_resized(image, 1, 0.5), "JPEG", quality=85),
    "crop 2% a side": lambda image: _encoded(_cropped(image, 0.02, 0.02, 0.02, 0.02), "JPEG", quality=85),
    "crop 4% of one side": lambda image: _encoded(_cropped(image, 0.04, 0, 0, 0), "JPEG", quality=85),
    "crop 4% of a corner": lambda image: _encoded(_cropped(image, 0, 0.04, 0.04, 0), "JPEG", quality=85),
    "crop 4% a side": lambda image: _encoded(_cropped(image, 0.04, 0.04, 0.04, 0.04), "JPEG", quality=85),
    "crop 4%, quarter": lambda image: _encoded(
        _resized(_cropped(image, 0.02, 0.02, 0.02, 0.02), 0.25, 0.25), "JPEG", quality=60
    ),
}  # fmt: skip
