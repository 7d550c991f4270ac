import dataclasses
import random as global_random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from training.config.train import AugmentConfig
from training.data.augment import Pixels, augment, sample_generator

KEY = b"00112233445566778899aabbccddeeff"
PLAIN = AugmentConfig(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), horizontal_flip=0.0, auto_augment="none")


def make_image(height_px: int = 40, width_px: int = 44) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def test_draws_are_a_function_of_seed_epoch_and_key() -> None:
    def draw(seed: int, epoch: int, key: bytes) -> list[float]:
        return list(sample_generator(seed, epoch, key).random(4))

    assert draw(1, 2, KEY) == draw(1, 2, KEY)
    others = [draw(2, 2, KEY), draw(1, 3, KEY), draw(1, 2, KEY[::-1]), draw(2, 1, KEY)]
    assert draw(1, 2, KEY) not in others


@pytest.mark.parametrize("policy", ["none", "original"])
def test_a_view_is_square_and_repeats_whatever_else_draws(policy: str) -> None:
    config = AugmentConfig(auto_augment="original" if policy == "original" else "none")
    views = []
    for run in range(2):
        global_random.seed(run)
        views.append([augment(make_image(), 24, config, sample_generator(0, i, KEY)) for i in range(60)])
    assert all(view.shape == (24, 24, 3) and view.dtype == np.uint8 for view in views[0])
    for first, second in zip(*views, strict=True):
        np.testing.assert_array_equal(first, second)
    assert len({view.tobytes() for view in views[0]}) > 30


def test_without_chance_it_is_a_plain_resize() -> None:
    image = make_image(48, 48)
    view = augment(image, 24, PLAIN, sample_generator(0, 0, KEY))
    expected = image.reshape(24, 2, 24, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(view, expected, atol=1)


def test_flip_is_a_mirror() -> None:
    image = make_image(24, 24)
    flipped = augment(
        image,
        24,
        AugmentConfig(crop_area=(1, 1), crop_aspect=(1, 1), horizontal_flip=1.0, auto_augment="none"),
        sample_generator(0, 0, KEY),
    )
    np.testing.assert_array_equal(flipped, image[:, ::-1])


def test_crops_keep_the_asked_share_and_aspect() -> None:
    ramp = np.stack(np.broadcast_arrays(np.arange(200)[:, None], np.arange(200)[None], 0), axis=2).astype(
        np.uint8
    )
    config = AugmentConfig(
        crop_area=(0.25, 0.5), crop_aspect=(0.5, 2.0), horizontal_flip=0, auto_augment="none"
    )
    for epoch in range(100):
        view = augment(ramp, 50, config, sample_generator(0, epoch, KEY)).astype(int)
        # the ramp's range in the view is the crop's size, less half an output pixel at each end
        height, width = (np.ptp(view[..., axis]) * 50 / 49 for axis in (0, 1))
        assert 0.22 <= height * width / 200**2 <= 0.55
        assert 0.45 <= width / height <= 2.2


def test_a_picture_that_no_crop_fits_gives_its_centre() -> None:
    strip = np.zeros((10, 100, 3), dtype=np.uint8)
    strip[:, 43:57] = 255
    config = AugmentConfig(crop_area=(0.9, 1.0), horizontal_flip=0, auto_augment="none")
    assert augment(strip, 10, config, sample_generator(0, 0, KEY)).mean() > 250


def test_small_pictures_are_enlarged_smoothly() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, 4:] = 200
    row = augment(image, 32, PLAIN, sample_generator(0, 0, KEY))[16, :, 0]
    assert len(np.unique(row)) > 4
    assert row[0] == 0
    assert row[-1] == 200


def only(**changes: Any) -> AugmentConfig:
    return dataclasses.replace(PLAIN, **changes)


def views(image: Pixels, config: AugmentConfig, num_views: int = 200) -> npt.NDArray[np.uint8]:
    size_px = image.shape[0]
    return np.stack([augment(image, size_px, config, sample_generator(0, i, KEY)) for i in range(num_views)])


def disc(size_px: int = 48) -> Pixels:
    """A black disc of a third of the side on white."""
    y, x = np.mgrid[:size_px, :size_px] - (size_px - 1) / 2
    return np.where((x**2 + y**2 < (size_px / 6) ** 2)[..., None], 0, 255).repeat(3, axis=2).astype(np.uint8)


def test_turning_a_disc_leaves_it_and_white_comes_in() -> None:
    found = views(disc(), only(rotation_degrees=40))
    assert np.abs(found.astype(int) - disc()).mean() < 2
    assert (views(np.zeros_like(disc()), only(rotation_degrees=40))[:, 0, 0] == 255).mean() > 0.5


def test_zoom_and_translation_stay_in_their_ranges() -> None:
    darkness = 255.0 - views(disc(), only(zoom=(0.5, 2.0)))[..., 0]
    area = darkness.sum(axis=(1, 2)) / (255.0 - disc()[..., 0]).sum()
    assert 0.2 < area.min() < 0.35
    assert 3 < area.max() < 4.2
    darkness = 255.0 - views(disc(), only(translation=0.25))[..., 0]
    centre = (darkness.sum(axis=1) * np.arange(48)).sum(axis=1) / darkness.sum(axis=(1, 2)) - 23.5
    assert 9 < np.abs(centre).max() <= 12.1


def test_colours_change_by_what_was_asked_and_greys_stay_grey() -> None:
    grey = np.full((8, 8, 3), 100, dtype=np.uint8)
    found = views(grey, only(saturation=0.5, hue=0.5))
    assert np.abs(found.astype(int) - 100).max() <= 1
    found = views(grey, only(brightness=0.3))
    assert 68 <= found.min() <= 74
    assert 126 <= found.max() <= 132
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 200
    assert views(red, only(hue=0.5))[..., 0].std() > 20
    dropped = views(red, only(grey_probability=1.0))
    assert np.ptp(dropped, axis=3).max() == 0
    assert dropped.max() == 60
    unchanged = views(red, only(brightness=0.9, hue=0.5, colour_probability=0.0))
    assert (unchanged == red).all()


def test_contrast_is_about_the_mean() -> None:
    halves = np.full((8, 8, 3), 80, dtype=np.uint8)
    halves[4:] = 120
    found = views(halves, only(contrast=0.5)).astype(int)
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), 100, atol=1)
    difference = found[:, -1, 0, 0] - found[:, 0, 0, 0]
    assert difference.min() >= 19
    assert difference.max() <= 61
    assert np.ptp(difference) > 30


def test_erasing_covers_a_small_rectangle() -> None:
    white = np.full((48, 48, 3), 255, dtype=np.uint8)
    share = (views(white, only(erase_probability=1.0)) != 255).any(axis=3).mean(axis=(1, 2))
    assert 0.01 < share.min() < 0.05
    assert 0.15 < share.max() < 0.22
    assert (views(white, only(erase_probability=0.5)) != 255).any(axis=(1, 2, 3)).mean() == pytest.approx(
        0.5, abs=0.1
    )
