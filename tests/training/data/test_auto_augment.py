import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from training.config.train import AugmentConfig
from training.data.augment import augment, sample_generator
from training.data.auto_augment import ORIGINAL_POLICY, apply_operations, auto_augment, level_of
from training.model import torchvision_ops

KEY = b"0123456789abcdef0123456789abcdef"


def picture(seed: int, height: int = 60, width: int = 60) -> npt.NDArray[np.uint8]:
    """Smooth blotches with an edge, and channels of different ranges."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(20, 220, (8, 8, 3)).astype(np.uint8))
    image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 3 : height // 2, :, 0] = 250
    image[..., 2] //= 2
    return image


@functools.cache
def timm_policy() -> list[list[Any]]:
    torchvision_ops.install()
    from timm.data.auto_augment import auto_augment_policy

    bicubic_always = {"interpolation": Image.Resampling.BICUBIC}
    policy: list[list[Any]] = auto_augment_policy("original", bicubic_always)  # type: ignore[no-untyped-call]
    return policy


def by_timm(image: npt.NDArray[np.uint8], name: str, level: float) -> npt.NDArray[np.uint8]:
    operation = next(found for pair in timm_policy() for found in pair if found.name == name)
    arguments = () if operation.level_fn is None else (int(level) if name == "PosterizeOriginal" else level,)
    return np.asarray(operation.aug_fn(Image.fromarray(image), *arguments, **operation.kwargs))


LEVELS = {
    "PosterizeOriginal": (6, 7),
    "Solarize": (76, 128, 204),
    "Invert": (0,),
    "Equalize": (0,),
    "AutoContrast": (0,),
    "Contrast": (1.54, 0.5),
    "Color": (0.1, 0.46, 0.82, 1.54),
    "Sharpness": (1.36, 0.2),
    "Rotate": (27.0, -9.0),
    "ShearX": (0.15, -0.15),
}
EXACT = ("PosterizeOriginal", "Solarize", "Invert", "Equalize", "AutoContrast")


def test_every_operation_of_the_policy_is_here() -> None:
    assert {name for pair in ORIGINAL_POLICY for name, _, _ in pair} == set(LEVELS)
    with pytest.raises(KeyError):
        apply_operations(picture(0), [("Cutout", 1.0)])


def test_the_policy_and_its_levels_are_timm_s() -> None:
    for ours, theirs in zip(ORIGINAL_POLICY, timm_policy(), strict=True):
        for (name, probability, magnitude), operation in zip(ours, theirs, strict=True):
            assert (name, probability, magnitude) == (operation.name, operation.prob, operation.magnitude)
            level = operation.level_fn and operation.level_fn(magnitude, operation.hparams)[0]
            assert level_of(name, magnitude) == abs(level or 0.0)


@pytest.mark.parametrize("name", LEVELS)
def test_an_operation_is_timm_s(name: str) -> None:
    for seed in range(3):
        image = picture(seed)
        for level in LEVELS[name]:
            ours = apply_operations(image, [(name, level)]).astype(int)
            difference = np.abs(ours - by_timm(image, name, level))
            if name in EXACT:
                assert difference.max() == 0
            elif name in ("Rotate", "ShearX"):  # another bicubic kernel, and edges where white comes in
                assert difference.mean() < 1.3
                assert np.abs(ours - image).mean() > 4
            else:
                assert difference.max() <= 1


@pytest.mark.parametrize("second", ["Equalize", "AutoContrast", "Contrast", "Rotate"])
def test_tables_in_a_row_are_one_after_the_other(second: str) -> None:
    image = picture(5)
    for first in EXACT:
        once = apply_operations(image, [(first, LEVELS[first][0])])
        ours = apply_operations(image, [(first, LEVELS[first][0]), (second, LEVELS[second][0])])
        np.testing.assert_array_equal(ours, apply_operations(once, [(second, LEVELS[second][0])]))


def test_a_picture_of_one_colour_stays() -> None:
    image = np.full((10, 10, 3), 77, dtype=np.uint8)
    for name in ("Equalize", "AutoContrast"):
        np.testing.assert_array_equal(apply_operations(image, [(name, 0.0)]), image)


def test_draws_come_from_the_generator_alone() -> None:
    image = picture(0)
    first, second = (
        [auto_augment(image, np.random.default_rng(seed)) for seed in range(60)] for _ in range(2)
    )
    assert all(np.array_equal(*pair) for pair in zip(first, second, strict=True))
    assert len({view.tobytes() for view in first}) > 15
    np.testing.assert_array_equal(image, picture(0))  # the input is left alone


def test_a_slightly_shrunken_picture_is_as_pil_s() -> None:
    """Two of 255 to PIL's filtered bicubic, at the sizes of shards of 256 pixels and models of 224."""
    plain = AugmentConfig(crop_area=(1, 1), crop_aspect=(0.5, 2.0), horizontal_flip=0.0, auto_augment="none")
    for height, width in ((256, 256), (256, 341), (300, 256)):
        image = picture(1, height, width)
        view = augment(image, 224, plain, sample_generator(0, 0, KEY)).astype(int)
        # crops of the whole area do not fit other aspects, so that the view is the whole picture
        pil = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        assert np.abs(view - np.asarray(pil)).mean() < 2
