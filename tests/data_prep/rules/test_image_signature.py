"""How often different plain images count as copies, and how often altered copies are found."""

import io

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageOps

from benchmarks.data_prep.plain_images import ALTERATIONS, KINDS, drawn
from data_prep.rules import copies
from data_prep.rules.copies import MarkedImages, Marks, marks_of
from data_prep.rules.image_signature import SIGNATURE_BYTES, are_copies, image_signature, signature_array

DISTANCE = 32
PER_KIND = 30


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [image for kind in KINDS for image in drawn(kind, PER_KIND, seed=11)]


def _marks(images: list[Image.Image]) -> list[Marks]:
    return [marks_of(np.asarray(image)) for image in images]


def _are_copies(first: Image.Image, second: Image.Image) -> bool:
    signature_NB = signature_array([image_signature(np.asarray(image)) for image in (first, second)])
    one, other = np.array([0]), np.array([1])
    found = are_copies(signature_NB, signature_NB, one, other)
    assert found == are_copies(signature_NB, signature_NB, other, one)
    return bool(found[0])


def _near(marks: list[Marks], others: list[Marks]) -> npt.NDArray[np.bool_]:
    first, second = (
        np.frombuffer(b"".join(item.perceptual_hash for item in side), np.uint8).reshape(-1, 48)
        for side in (marks, others)
    )
    return np.bitwise_count(first[:, None] ^ second[None]).sum(axis=2, dtype=np.int32) <= DISTANCE


def test_different_plain_images_are_no_copies(images: list[Image.Image]) -> None:
    """Hashes alone call hundreds of 36,315 pairs of 270 drawings copies; signatures at most 1 in 10,000."""
    marks = _marks(images)
    hashes, signatures = zip(*marks, strict=True)
    by_hash = int(np.triu(_near(marks, marks), 1).sum())
    assert by_hash > 300
    marked = MarkedImages(hashes, signatures)
    assert sum(len(copies.place) for copies in marked.copies_among(DISTANCE)) <= 3
    assert marked.nearest_copies(hashes, signatures, DISTANCE).place.tolist() == [*range(len(images))]


@pytest.mark.parametrize("room", [1, 100, 1 << 22])
def test_searches_find_what_comparing_all_with_all_finds(
    images: list[Image.Image], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_INDEXED_AT_ONCE", 64)
    monkeypatch.setattr(copies, "_FEWEST_AT_ONCE", 8)
    monkeypatch.setattr(copies, "_MOST_AT_ONCE", 32)
    monkeypatch.setattr(copies, "_PAIRS_AT_ONCE", room)
    makers = list(ALTERATIONS.values())
    altered = [
        image if place % 3 else makers[place % len(makers)](image) for place, image in enumerate(images)
    ]
    first, second = _marks(images), _marks([*altered, *altered[::2]])
    hash_NB, other_NB = (
        np.frombuffer(b"".join(item.perceptual_hash for item in side), np.uint8).reshape(-1, 48)
        for side in (first, second)
    )
    bits = np.bitwise_count(hash_NB[:, None] ^ other_NB[None]).sum(axis=2, dtype=np.int64)
    one, other = (signature_array([item.image_signature for item in side]) for side in (first, second))
    is_copy = np.zeros(bits.shape, np.bool_)
    places = np.nonzero(bits <= DISTANCE)
    is_copy[places] = are_copies(one, other, *places)

    nearest = MarkedImages(*zip(*second, strict=True)).nearest_copies(*zip(*first, strict=True), DISTANCE)
    wanted = [
        (place, *min((bits[place, at], at) for at in np.flatnonzero(row))[::-1])
        for place, row in enumerate(is_copy)
        if row.any()
    ]
    assert [*zip(*(column.tolist() for column in nearest), strict=True)] == wanted
    assert len(wanted) > 200

    marked = np.zeros(len(second), np.bool_)
    found = MarkedImages(*zip(*second, strict=True))
    for part in (first[:100], first[100:]):
        found.mark_copied(marked, *zip(*part, strict=True), DISTANCE)
    assert (marked == is_copy.any(axis=0)).all()
    among = [
        pair for part in found.copies_among(DISTANCE) for pair in zip(part.place, part.other, strict=True)
    ]
    near = np.bitwise_count(other_NB[:, None] ^ other_NB[None]).sum(axis=2, dtype=np.int64) <= DISTANCE
    places = np.nonzero(np.triu(near, 1))
    kept = are_copies(other, other, *places) | are_copies(other, other, *places[::-1])
    assert sorted(among) == [*zip(places[0][kept], places[1][kept], strict=True)]
    assert len(among) > 130


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_altered_copies_that_the_hash_finds_stay_found(images: list[Image.Image], alteration: str) -> None:
    originals = images[::3]
    marks, altered = _marks(originals), _marks([ALTERATIONS[alteration](image) for image in originals])
    near = np.diagonal(_near(marks, altered))
    one, other = (signature_array([item.image_signature for item in side]) for side in (marks, altered))
    each = np.arange(len(originals))
    kept = are_copies(one, other, each, each)[near].mean()
    assert near.sum() > 30
    assert kept >= (0.85 if alteration.startswith("crop 4%") else 0.95)


def test_images_of_one_colour_are_copies_only_of_their_colour() -> None:
    red, dark, blue, grey = (
        Image.new("RGB", (90, 60), colour) for colour in ("#f00000", "#c80000", "#0000f0", "#505050")
    )
    assert _are_copies(red, red.resize((30, 40)))
    for one, other in ((red, dark), (red, blue), (grey, dark), (red, grey)):
        assert not _are_copies(one, other)


def _arrow(x: float = 0.5, colour: str = "black", size: tuple[int, int] = (200, 150)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    centre, half = x * size[0], 40
    corners = [(centre - half, 45), (centre + half, 75), (centre - half, 105)]
    ImageDraw.Draw(image).polygon(corners, fill=colour)
    return image


@pytest.mark.parametrize(
    "other",
    [ImageOps.mirror(_arrow()), _arrow(0.6), _arrow(0.42), _arrow(colour="red"), ImageOps.invert(_arrow())],
)
def test_mirrored_shifted_and_recoloured_shapes_are_other_images(other: Image.Image) -> None:
    assert not _are_copies(_arrow(), other)


def test_grey_and_colour_of_one_brightness_differ() -> None:
    """Red and blue of the same luma: chroma tells them apart."""
    assert not _are_copies(_arrow(colour="#ff0000"), _arrow(colour="#0057ff"))


@pytest.mark.parametrize(
    "edges", [(0.04, 0, 0, 0), (0, 0.04, 0, 0.04), (0.02, 0.02, 0.02, 0.02), (0.03, 0.01, 0, 0.04)]
)
def test_a_cut_of_any_side_is_found(edges: tuple[float, ...]) -> None:
    image = _arrow(0.6, size=(400, 150))
    left, top, right, bottom = edges
    cut = image.crop(
        (round(400 * left), round(150 * top), round(400 * (1 - right)), round(150 * (1 - bottom)))
    )
    buffer = io.BytesIO()
    cut.save(buffer, "JPEG", quality=60)
    assert _are_copies(image, Image.open(buffer).convert("RGB"))


@pytest.mark.parametrize("size_px", [(1, 1), (1, 300), (300, 1), (3, 5)])
def test_the_smallest_images_have_a_signature(size_px: tuple[int, int]) -> None:
    assert len(image_signature(np.asarray(Image.new("RGB", size_px, "red")))) == SIGNATURE_BYTES


def test_nothing_is_compared_with_nothing() -> None:
    marks = _marks([_arrow()])
    hashes, signatures = zip(*marks, strict=True)
    assert len(MarkedImages([], []).nearest_copies(hashes, signatures, DISTANCE).place) == 0
    assert len(MarkedImages(hashes, signatures).nearest_copies([], [], DISTANCE).place) == 0
    assert MarkedImages(hashes, signatures).nearest_copies(hashes, signatures, DISTANCE).bits.tolist() == [0]
