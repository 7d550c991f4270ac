"""What happens to an image between its bytes and the tower, in training. Every draw is a function of the key.

The generator is counter-based (Philox): the sample's key is its key, and (seed, epoch) its counter, so
that a view depends on nothing that happened before it: not on the rank, the batch or the thread.
"""

import functools
import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from training.config import AugmentConfig

Pixels = npt.NDArray[np.uint8]  # [height, width, 3], RGB

# Sub-policies of timm whose magnitude has a random sign.
_SIGNED_OPERATIONS = frozenset({"Rotate", "ShearX"})
_CROP_ATTEMPTS = 10  # as timm and torchvision, before the largest centred crop is taken


def sample_generator(seed: int, epoch: int, key: bytes) -> np.random.Generator:
    """The generator of one sample in one epoch; `key` is 32 hexadecimal digits."""
    return np.random.Generator(np.random.Philox(key=int(key, 16), counter=[0, 0, epoch, seed]))


def augment(image: Pixels, size_px: int, config: AugmentConfig, random: np.random.Generator) -> Pixels:
    """A random view [size_px, size_px, 3] of an RGB image (paper A.2; CN-CLIP's `create_transform`)."""
    top, left, height, width = _random_crop(image.shape[0], image.shape[1], config, random)
    view = _resize(image[top : top + height, left : left + width], size_px)
    if random.random() < config.horizontal_flip:
        view = view[:, ::-1]
    if config.auto_augment == "original":
        view = _auto_augment(view, random)
    return view


def _random_crop(
    height_px: int, width_px: int, config: AugmentConfig, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop, drawn as timm's and torchvision's RandomResizedCrop do."""
    low, high = (math.log(aspect) for aspect in config.crop_aspect)
    for _ in range(_CROP_ATTEMPTS):
        area = height_px * width_px * random.uniform(*config.crop_area)
        aspect = math.exp(random.uniform(low, high))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= width_px and 0 < height <= height_px:
            top = int(random.integers(height_px - height + 1))
            left = int(random.integers(width_px - width + 1))
            return top, left, height, width
    aspect = min(max(width_px / height_px, config.crop_aspect[0]), config.crop_aspect[1])
    width, height = min(width_px, round(height_px * aspect)), min(height_px, round(width_px / aspect))
    return (height_px - height) // 2, (width_px - width) // 2, height, width


def _resize(image: Pixels, size_px: int) -> Pixels:
    # OpenCV's bicubic does not filter when it shrinks; its area mode does, and is the cheaper one there.
    shrinks = image.shape[0] > size_px and image.shape[1] > size_px
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (size_px, size_px), interpolation=mode), dtype=np.uint8)


@functools.cache
def _original_policy() -> list[list[Any]]:
    """AutoAugment's 25 sub-policies for ImageNet, as timm's "original" (Cubuk et al. 2019)."""
    from timm.data.auto_augment import auto_augment_policy

    import training.model  # noqa: F401  (declares what torchvision lacks beside a CPU-only torch)

    bicubic_always = {"interpolation": Image.Resampling.BICUBIC}
    policy: list[list[Any]] = auto_augment_policy("original", bicubic_always)  # type: ignore[no-untyped-call]
    return policy


def _auto_augment(image: Pixels, random: np.random.Generator) -> Pixels:
    """One sub-policy of AutoAugment. timm's operations with our draws: timm's are from a global state."""
    policy = _original_policy()
    picture = Image.fromarray(np.ascontiguousarray(image))
    for operation in policy[int(random.integers(len(policy)))]:
        applies, negative = random.random() < operation.prob, random.random() < 0.5
        if not applies:
            continue
        level: tuple[Any, ...] = ()
        if operation.level_fn is not None:
            level = operation.level_fn(operation.magnitude, operation.hparams)
        if operation.name in _SIGNED_OPERATIONS:
            level = ((-abs(level[0]) if negative else abs(level[0])), *level[1:])
        picture = operation.aug_fn(picture, *level, **operation.kwargs)
    return np.asarray(picture, dtype=np.uint8)
