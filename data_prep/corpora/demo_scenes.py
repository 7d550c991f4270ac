"""The demo's little world: coloured things with counts, sizes and relations, drawn and put into words.

A scene is a value; `draw_things`, `draw_background` and `describe` turn it into pixels and sentences.
Training and evaluation share all kinds of things (a red star, a blue ring) but not all pairs of kinds:
what a model is tested on is two familiar things that it has never seen together.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, width, height
Relation = Literal["left", "right", "above", "below"]
Size = Literal["large", "plain", "small"]

# Chinese name → (English name, RGB): far enough apart to survive JPEG and a colour jitter of ±16.
COLOURS = {
    "红色": ("red", (214, 40, 40)),
    "橙色": ("orange", (245, 138, 24)),
    "黄色": ("yellow", (247, 214, 36)),
    "绿色": ("green", (46, 154, 62)),
    "蓝色": ("blue", (36, 90, 210)),
    "紫色": ("purple", (128, 52, 168)),
    "粉色": ("pink", (246, 140, 186)),
    "黑色": ("black", (28, 28, 30)),
}
# Chinese name → (English singular, plural, Chinese measure words that fit)
SHAPES = {
    "圆形": ("circle", "circles", "个"),
    "正方形": ("square", "squares", "个"),
    "三角形": ("triangle", "triangles", "个"),
    "五角星": ("star", "stars", "个颗"),
    "爱心": ("heart", "hearts", "个颗"),
    "菱形": ("diamond", "diamonds", "个"),
    "十字形": ("cross", "crosses", "个"),
    "月牙": ("crescent", "crescents", "个弯"),
}
# Chinese name → (English name, RGB), pale so that every thing stands out
BACKGROUNDS = {
    "白色": ("white", (246, 246, 244)),
    "浅灰色": ("light grey", (206, 208, 212)),
    "浅蓝色": ("light blue", (190, 218, 240)),
    "浅绿色": ("light green", (200, 232, 200)),
    "米色": ("beige", (240, 226, 198)),
}
NUMBERS = {1: ("一", "one"), 2: ("两", "two"), 3: ("三", "three"), 4: ("四", "four"), 5: ("五", "five")}
MAX_COUNT: dict[Size, int] = {"large": 2, "plain": 3, "small": 5}  # what fits into half an image
RADIUS: dict[Size, tuple[float, float]] = {  # share of the image's short side
    "large": (0.195, 0.225),
    "plain": (0.120, 0.140),
    "small": (0.066, 0.080),
}
OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """What a thing is: its colour and shape, by their Chinese names."""

    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Group:
    """A number of equal things."""

    kind: Kind
    count: int
    size: Size


@dataclass(frozen=True, slots=True)
class Scene:
    """One group, or two with `first` on the `relation` side of `second`."""

    first: Group
    background: str
    relation: Relation | None = None
    second: Group | None = None

    def canonical(self) -> "Scene":
        """Return the same scene told from the left or from above: equal scenes look the same."""
        if self.relation in ("right", "below"):
            assert self.second is not None
            return Scene(self.second, self.background, OPPOSITE[self.relation], self.first)
        return self


@dataclass(frozen=True, slots=True)
class Caption:
    chinese: str
    english: str


KINDS = [Kind(colour, shape) for colour in COLOURS for shape in SHAPES]


def hold_out_pairs(rng: Random, share: float) -> set[frozenset[Kind]]:
    """Choose the pairs of different kinds that only evaluation shows together."""
    pairs = [frozenset(pair) for pair in itertools.combinations(KINDS, 2)]
    return {pair for pair in pairs if rng.random() < share}


def random_group(rng: Random, kind: Kind) -> Group:
    size: Size = rng.choice(("large", "plain", "small"))
    return Group(kind, rng.randint(1, MAX_COUNT[size]), size)


def random_pair_scene(rng: Random, pair: tuple[Kind, Kind]) -> Scene:
    """Return two groups of the given kinds, in either order and any relation."""
    first, second = rng.sample(pair, 2)
    relation: Relation = rng.choice(("left", "right", "above", "below"))
    background = rng.choice(list(BACKGROUNDS))
    return Scene(random_group(rng, first), background, relation, random_group(rng, second))


def random_training_scene(rng: Random, held_out: set[frozenset[Kind]]) -> Scene:
    """Return a scene that never shows a held-out pair together; one in six shows a single group."""
    if rng.random() < 1 / 6:
        return Scene(random_group(rng, rng.choice(KINDS)), rng.choice(list(BACKGROUNDS)))
    while True:
        first, second = rng.choice(KINDS), rng.choice(KINDS)
        if first != second and frozenset((first, second)) not in held_out:
            return random_pair_scene(rng, (first, second))


# --- words ---------------------------------------------------------------------------------------


def _name_group(rng: Random, group: Group, *, colourless: bool) -> Caption:
    colour, shape = group.kind.colour, group.kind.shape
    number, number_en = NUMBERS[group.count]
    colour_en = "" if colourless else COLOURS[colour][0] + " "
    singular, plural, measures = SHAPES[shape]
    size = {"large": "大", "plain": "", "small": "小"}[group.size]
    size_en = {"large": "large ", "plain": "", "small": "small "}[group.size]
    if colourless:
        chinese = size + shape
    elif size:
        chinese = rng.choice(
            (f"{colour}的{size}{shape}", f"{size}的{colour}{shape}", f"{colour}{size}{shape}")
        )
    else:
        chinese = rng.choice((f"{colour}的{shape}", f"{colour}{shape}"))
    english = f"{number_en} {size_en}{colour_en}{singular if group.count == 1 else plural}"
    return Caption(f"{number}{rng.choice(measures)}{chinese}", english)


# How captions tell a relation: {a} is the first group, {b} the second, {side} and {other} its words.
TWO_GROUPS = (
    ("{a}在{b}的{side}", "{a} {side_en} {b}"),
    ("{a}位于{b}的{side}", "{a} {side_en} {b}"),
    ("{b}的{side}有{a}", "{side_en} {b} there {is_a} {a}"),
    ("{side}是{a}，{other}是{b}", "{a} {at_side}, {b} {at_other}"),
    ("画面{side}是{a}，{other}是{b}", "a picture with {a} {at_side} and {b} {at_other}"),
    ("图中{a}在{b}的{side}", "in the picture, {a} {side_en} {b}"),
)
ONE_GROUP = (
    ("{a}", "{a}"),
    ("画面中有{a}", "a picture with {a}"),
    ("图中是{a}", "a picture of {a}"),
    ("画着{a}的图片", "a picture showing {a}"),
)
SIDES: dict[Relation, tuple[tuple[str, ...], str, str]] = {
    "left": (("左边", "左侧"), "to the left of", "on the left"),
    "right": (("右边", "右侧"), "to the right of", "on the right"),
    "above": (("上面", "上方"), "above", "at the top"),
    "below": (("下面", "下方"), "below", "at the bottom"),
}


def describe(rng: Random, scene: Scene, *, colourless: bool = False) -> Caption:
    """Put a scene into a Chinese sentence of 5 to 50 characters and an English one with the same content.

    `colourless` is for grey images: their captions name no colour. Which of the possible sentences is
    taken is the draw of `rng`: one scene has many true captions.
    """
    a = _name_group(rng, scene.first, colourless=colourless)
    if scene.second is None or scene.relation is None:
        chinese, english = rng.choice(ONE_GROUP[1:] if colourless else ONE_GROUP)
        caption = Caption(chinese.format(a=a.chinese), english.format(a=a.english))
    else:
        b = _name_group(rng, scene.second, colourless=colourless)
        words, side_en, at_side = SIDES[scene.relation]
        form = rng.randrange(len(words))
        chinese, english = rng.choice(TWO_GROUPS)
        other, _, at_other = SIDES[OPPOSITE[scene.relation]]
        caption = Caption(
            chinese.format(a=a.chinese, b=b.chinese, side=words[form], other=other[form]),
            english.format(
                a=a.english,
                b=b.english,
                side_en=side_en,
                at_side=at_side,
                at_other=at_other,
                is_a="is" if scene.first.count == 1 else "are",
            ),
        )
    if not colourless and rng.random() < 0.3:
        background_en, _ = BACKGROUNDS[scene.background]
        caption = Caption(
            rng.choice(("{background}背景上，{text}", "{text}，{background}背景")).format(
                background=scene.background, text=caption.chinese
            ),
            f"{caption.english}, {background_en} background",
        )
    return caption


# --- pixels --------------------------------------------------------------------------------------


def _arc(centre: Point, radius: float, start: float, stop: float, steps: int) -> list[Point]:
    """Return points on a circle, angles in turns clockwise from the right."""
    angles = [2 * math.pi * (start + (stop - start) * step / steps) for step in range(steps + 1)]
    return [(centre[0] + radius * math.cos(t), centre[1] + radius * math.sin(t)) for t in angles]


def _outline(shape: str) -> list[Point]:
    """Return a shape's polygon around (0, 0), within a circle of radius 1; y points down."""
    if shape == "圆形":
        return _arc((0, 0), 0.95, 0, 1, 48)
    if shape == "正方形":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "三角形":
        return [(0, -0.95), (0.9, 0.75), (-0.9, 0.75)]
    if shape == "五角星":
        outer, inner = _arc((0, 0), 1.0, -0.25, 0.75, 5), _arc((0, 0), 0.42, -0.15, 0.85, 5)
        return [point for pair in zip(outer[:5], inner[:5], strict=True) for point in pair]
    if shape == "爱心":
        turns = [2 * math.pi * step / 48 for step in range(48)]
        return [
            (
                math.sin(t) ** 3 * 0.95,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
            )
            for t in turns
        ]
    if shape == "菱形":
        return [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)]
    if shape == "十字形":
        a, b = 0.3, 0.92
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    assert shape == "月牙", shape
    # Both arcs end where the two circles meet: x = 0.2 on the outer one, of radius 0.95 around the origin.
    meet = math.acos(0.2 / 0.95) / (2 * math.pi)
    tip_y = math.sqrt(0.95**2 - 0.2**2)
    inner_radius = math.hypot(0.2 - 0.5, tip_y)
    bite = math.acos((0.2 - 0.5) / inner_radius) / (2 * math.pi)
    return _arc((0, 0), 0.95, meet, 1 - meet, 36) + _arc((0.5, 0), inner_radius, 1 - bite, bite, 36)


OUTLINES = {shape: _outline(shape) for shape in SHAPES}


def _cells(count: int, box: Box) -> list[tuple[Point, float, float]]:
    """Divide a box into the nearly square cells that `count` things need: centres, widths, heights."""
    x, y, width, height = box
    columns = min(
        range(1, count + 1), key=lambda number: -min(width / number, height / math.ceil(count / number))
    )
    rows = math.ceil(count / columns)
    cell_width, cell_height = width / columns, height / rows
    cells = []
    for index in range(count):
        row, column = divmod(index, columns)
        in_row = min(columns, count - row * columns)  # the last row is centred
        left = x + (width - in_row * cell_width) / 2
        cells.append(
            ((left + (column + 0.5) * cell_width, y + (row + 0.5) * cell_height), cell_width, cell_height)
        )
    return cells


def _halves(
    relation: Relation | None, width: float, height: float
) -> list[tuple[float, float, float, float]]:
    if relation is None:
        return [(0, 0, width, height)]
    if relation in ("left", "right"):
        halves: list[Box] = [(0, 0, width / 2, height), (width / 2, 0, width / 2, height)]
    else:
        halves = [(0, 0, width, height / 2), (0, height / 2, width, height / 2)]
    return halves if relation in ("left", "above") else halves[::-1]


def draw_things(rng: Random, scene: Scene, width_px: int, height_px: int) -> Image.Image:
    """Draw the things of a scene on a transparent ground, anti-aliased: an RGBA image."""
    scale = 3 if max(width_px, height_px) <= 160 else 2
    canvas = Image.new("RGBA", (width_px * scale, height_px * scale), (128, 128, 128, 0))
    pen = ImageDraw.Draw(canvas)
    short_side = min(canvas.size)
    groups = [scene.first] if scene.second is None else [scene.first, scene.second]
    for group, box in zip(groups, _halves(scene.relation, *canvas.size), strict=True):
        _, rgb = COLOURS[group.kind.colour]
        for (centre_x, centre_y), cell_width, cell_height in _cells(group.count, box):
            radius = min(rng.uniform(*RADIUS[group.size]) * short_side, min(cell_width, cell_height) * 0.48)
            centre_x += rng.uniform(-1, 1) * (cell_width / 2 - radius) * 0.8
            centre_y += rng.uniform(-1, 1) * (cell_height / 2 - radius) * 0.8
            turn = rng.uniform(-0.14, 0.14)  # radians: a tilt that leaves a square a square
            sin, cos = math.sin(turn), math.cos(turn)
            colour = tuple(min(255, max(0, channel + rng.randint(-16, 16))) for channel in rgb)
            pen.polygon(
                [
                    (centre_x + radius * (x * cos - y * sin), centre_y + radius * (x * sin + y * cos))
                    for x, y in OUTLINES[group.kind.shape]
                ],
                fill=(*colour, 255),
            )
    # reduce() averages premultiplied pixels, so that edges do not take on the transparent ground's grey
    return canvas.convert("RGBa").reduce(scale).convert("RGBA")


def draw_background(rng: Random, scene: Scene, width_px: int, height_px: int) -> Image.Image:
    """Draw a textured ground in the scene's background colour: a gradient, soft blotches and fine noise.

    No two are alike, at a coarse scale too: that is what tells two images with one caption apart.
    """
    _, rgb = BACKGROUNDS[scene.background]
    noise = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-0.5, 0.5, width_px, dtype=np.float32)[None, :]
    y = np.linspace(-0.5, 0.5, height_px, dtype=np.float32)[:, None]
    light_HW = 26 * (x * math.cos(angle) + y * math.sin(angle))
    coarse = Image.fromarray(noise.uniform(-14, 14, (6, 6)).astype(np.float32))
    light_HW = light_HW + np.asarray(coarse.resize((width_px, height_px), Image.Resampling.BICUBIC))
    light_HW = light_HW + noise.normal(0, 2.0, (height_px, width_px)).astype(np.float32)
    image_HWC = np.asarray(rgb, np.float32) - 8 + light_HW[:, :, None]
    return Image.fromarray(np.clip(image_HWC + 0.5, 0, 255).astype(np.uint8))


def draw(rng: Random, scene: Scene, width_px: int, height_px: int) -> Image.Image:
    """Draw the whole image: RGB, `width_px` x `height_px`."""
    image = draw_background(rng, scene, width_px, height_px)
    things = draw_things(rng, scene, width_px, height_px)
    image.paste(things, mask=things.getchannel("A"))
    return image


def random_dimensions(rng: Random, image_size_px: int) -> tuple[int, int]:
    """Draw width and height: mostly the square, some tall and wide ones, some up to three times as large."""
    draw_of_shape = rng.random()
    if draw_of_shape < 0.6:
        return image_size_px, image_size_px
    if draw_of_shape < 0.9:
        return tuple(rng.sample((image_size_px, round(image_size_px * rng.choice((4 / 3, 1.5)))), 2))  # type: ignore[return-value]
    long_side = round(image_size_px * rng.uniform(1.6, 3.1))
    return tuple(rng.sample((long_side, round(long_side * rng.choice((0.67, 0.75, 1.0)))), 2))  # type: ignore[return-value]


def evaluation_scenes(rng: Random, held_out: set[frozenset[Kind]], count: int) -> Sequence[Scene]:
    """Return different scenes of held-out pairs; their background does not tell them apart.

    A few pairs are likely to occur twice, with other counts, sizes or relations.
    """
    pairs = sorted(tuple(sorted(pair)) for pair in held_out)
    scenes: dict[Scene, Scene] = {}
    while len(scenes) < count:
        first, second = rng.choice(pairs)
        scene = random_pair_scene(rng, (first, second))
        scenes.setdefault(replace(scene.canonical(), background=""), scene)
    return list(scenes.values())
