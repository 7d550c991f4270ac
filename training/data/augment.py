"""What happens to an image between its bytes and the tower, in training.

Every draw is a function of the key.

The generator is counter-based (Philox): the sample's key is its key, and (seed, epoch) its counter, so
that a view depends on nothing that happened before it: not on the rank, the batch or the thread.
"""

import math

import cv2
import numpy as np

from training.config.train import AugmentConfig
from training.data.auto_augment import Pixels, auto_augment

_LUMA = np.array([0.299, 0.587, 0.114])  # of RGB (ITU-R BT.601)
# RGB to luma and two colour axes: the hue turns in their plane (NTSC).
_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_YIQ_INVERSE = np.linalg.inv(_YIQ)
_BILINEAR_PIXELS = 1.75  # source pixels a pixel up to which bilinear shrinks: 256 × 341 to 224 has 1.74
_CROP_ATTEMPTS = 10  # as timm and torchvision, before the largest centred crop is taken


def sample_generator(seed: int, epoch: int, key: bytes) -> np.random.Generator:
    """Return the generator of one sample in one epoch; `key` is 32 hexadecimal digits."""
    return np.random.Generator(np.random.Philox(key=int(key, 16), counter=[0, 0, epoch, seed]))


def augment(image: Pixels, size_px: int, config: AugmentConfig, random: np.random.Generator) -> Pixels:
    """Draw a view [size_px, size_px, 3] of an RGB image (paper A.2; CN-CLIP's `create_transform`)."""
    top, left, height, width = _random_crop(image.shape[0], image.shape[1], config, random)
    view = _resize(image[top : top + height, left : left + width], size_px)
    if random.random() < config.horizontal_flip:
        view = np.asarray(cv2.flip(view, 1), dtype=np.uint8)
    if config.auto_augment == "original":
        view = auto_augment(view, random)
    if _warps(config):
        view = _warp(view, config, random)
    if _recolours(config):
        view = _recolour(view, config, random)
    if random.random() < config.erase_probability:
        view = _erase(view, random)
    return view


def _random_crop(
    height_px: int, width_px: int, config: AugmentConfig, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a crop, drawn as timm's and torchvision's RandomResizedCrop do."""
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
    # Only OpenCV's area mode filters when it shrinks. If a pixel has few source pixels, bilinear reads
    # nearly all of them, ends as near to PIL's filtered bicubic, and takes a fifth of the time.
    shrinks = image.shape[0] > size_px and image.shape[1] > size_px
    few = image.shape[0] * image.shape[1] < _BILINEAR_PIXELS * size_px**2
    mode = (cv2.INTER_LINEAR if few else cv2.INTER_AREA) if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (size_px, size_px), interpolation=mode), dtype=np.uint8)


def _warps(config: AugmentConfig) -> bool:
    largest = (config.stretch, config.rotation_degrees, config.shear_degrees, config.translation)
    return any(largest) or config.zoom != (1.0, 1.0)


def _warp(image: Pixels, config: AugmentConfig, random: np.random.Generator) -> Pixels:
    """Zoom, stretch, turn, slant and shift about the centre; what comes in from outside is white."""
    size_px = image.shape[0]
    zoom = math.exp(random.uniform(math.log(config.zoom[0]), math.log(config.zoom[1])))
    stretch = math.exp(random.uniform(-config.stretch, config.stretch) / 2)
    turn = math.radians(random.uniform(-config.rotation_degrees, config.rotation_degrees))
    slant = math.tan(math.radians(random.uniform(-config.shear_degrees, config.shear_degrees)))
    shift_px = random.uniform(-config.translation, config.translation, 2) * size_px
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    linear = zoom * rotation @ np.array([[stretch, slant], [0, 1 / stretch]])
    centre = np.full(2, (size_px - 1) / 2)
    matrix = np.column_stack([linear, centre + shift_px - linear @ centre])
    warped = cv2.warpAffine(
        np.ascontiguousarray(image), matrix, (size_px, size_px), borderValue=(255.0, 255.0, 255.0)
    )
    return np.asarray(warped, dtype=np.uint8)


def _recolours(config: AugmentConfig) -> bool:
    return any((config.brightness, config.contrast, config.saturation, config.hue, config.grey_probability))


def _recolour(image: Pixels, config: AugmentConfig, random: np.random.Generator) -> Pixels:
    """Change brightness, contrast, saturation and hue, all linear in the pixel: one 3 × 4 matrix."""
    matrix, offset = np.eye(3), np.zeros(3)
    brightness, contrast, saturation = (
        random.uniform(1 - largest, 1 + largest)
        for largest in (config.brightness, config.contrast, config.saturation)
    )
    hue = 2 * math.pi * random.uniform(-config.hue, config.hue)
    if random.random() < config.colour_probability:
        mean_luma = brightness * float(_LUMA @ np.array(cv2.mean(np.ascontiguousarray(image))[:3]))
        rotation = np.array(
            [[1, 0, 0], [0, math.cos(hue), -math.sin(hue)], [0, math.sin(hue), math.cos(hue)]]
        )
        towards_grey = saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1))
        matrix = brightness * contrast * _YIQ_INVERSE @ rotation @ _YIQ @ towards_grey
        offset[:] = (1 - contrast) * mean_luma  # a grey, which saturation and hue leave as it is
    if random.random() < config.grey_probability:
        matrix = np.tile(_LUMA @ matrix, (3, 1))
    return np.asarray(cv2.transform(image, np.column_stack([matrix, offset])), dtype=np.uint8)


def _erase(image: Pixels, random: np.random.Generator) -> Pixels:
    """Paint one colour over a rectangle (Random Erasing, Zhong et al. 2017)."""
    size_px = image.shape[0]
    area, aspect = random.uniform(0.02, 0.2), math.exp(random.uniform(-0.7, 0.7))
    height = min(size_px, round(math.sqrt(area * aspect) * size_px))
    width = min(size_px, round(math.sqrt(area / aspect) * size_px))
    top, left = random.integers(size_px - height + 1), random.integers(size_px - width + 1)
    erased = image.copy()
    erased[top : top + height, left : left + width] = random.integers(0, 256, 3)
    return erased
