"""Image rules at their boundaries; which changes the perceptual hash tolerates."""

import io

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from PIL import Image, ImageDraw

from data_prep.rules import image as image_rules
from tests.helpers.hash_distances import nearest_hash_distances


@pytest.mark.parametrize(
    ("size_px", "reason"),
    [
        ((16, 16), None),
        ((15, 16), "too_small"),
        ((16, 15), "too_small"),
        ((1, 1), "too_small"),
        ((16, 80), None),
        ((80, 16), None),
        ((16, 81), "aspect"),
        ((81, 16), "aspect"),
        ((15, 300), "too_small"),  # both wrong: the size is named
    ],
)
def test_size_at_the_boundaries(size_px: tuple[int, int], reason: str | None) -> None:
    row = pl.DataFrame([size_px], schema=["width_px", "height_px"], orient="row")
    assert row.select(image_rules.size(min_side_px=16, max_aspect=5.0)).item() == reason


def _picture(colour: str = "red", background: str = "white", place: int = 30) -> Image.Image:
    image = Image.new("RGB", (160, 120), background)
    draw = ImageDraw.Draw(image)
    draw.ellipse((place, 20, place + 60, 80), fill=colour)
    draw.rectangle((100, 70, 150, 110), fill="green")
    return image


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image)


def _distance(first: Image.Image, second: Image.Image) -> int:
    hashes = [image_rules.perceptual_hash(_pixels(image)) for image in (first, second)]
    assert all(len(item) * 8 == image_rules.HASH_BITS for item in hashes)
    return int(nearest_hash_distances(hashes[:1], hashes[1:])[0])


def test_copies_are_near() -> None:
    image = _picture()
    assert _distance(image, image) == 0
    for quality in (60, 90):
        buffer = io.BytesIO()
        image.resize((200, 150)).save(buffer, "JPEG", quality=quality)
        assert _distance(image, Image.open(buffer).convert("RGB")) <= 32


@pytest.mark.parametrize("other", [_picture("blue"), _picture(background="black"), _picture(place=5)])
def test_other_pictures_are_further_than_copies(other: Image.Image) -> None:
    assert _distance(_picture(), other) > 16


def test_colour_counts() -> None:
    """Red and blue of the same brightness: a grey hash cannot tell them apart."""
    red, blue = _picture("#ff0000"), _picture("#0055ff")
    grey = abs(np.asarray(red.convert("L"), int) - np.asarray(blue.convert("L"), int)).max()
    assert grey < 20
    assert _distance(red, blue) > 8


@pytest.mark.parametrize("size_px", [(1, 1), (1, 300), (300, 1), (3, 5)])
def test_the_smallest_pictures_have_a_hash(size_px: tuple[int, int]) -> None:
    assert len(image_rules.perceptual_hash(_pixels(Image.new("RGB", size_px, "red")))) == 48
