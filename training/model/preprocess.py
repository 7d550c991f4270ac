"""Image preprocessing for evaluation: what a stored image becomes before it enters the image tower."""

import functools
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image

from pipeline.core.files.images import Decode
from pipeline.core.records import InputError
from training.data.squares import SquareConfig

# Per channel, of pixel values in [0, 1]: OpenAI CLIP's, kept by Chinese CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(
    images: Sequence[bytes | Image.Image], image_size_px: int, decode: Decode = "upright"
) -> torch.Tensor:
    """Return image_BCHW float32, normalised, of images that are encoded or opened with Pillow.

    As Chinese CLIP: bicubic resize to the square, without keeping the aspect and without a crop. `decode`
    says what is seen of images that are turned by EXIF, have a palette, transparency or more than 8 bits
    (`pipeline.core.files.images`).

    Raises:
        InputError: if an image cannot be decoded; it names its position.
    """
    pixels_BHWC = np.empty((len(images), image_size_px, image_size_px, 3), dtype=np.uint8)
    left_out = SquareConfig(image_size_px=image_size_px, decode=decode).open().read(images, pixels_BHWC)
    for row, reason in left_out.items():
        raise InputError(f"image {row} of {len(images)} cannot be decoded: {reason}")
    return standardise(torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2))


def standardise(image_BCHW: torch.Tensor) -> torch.Tensor:
    """Return (pixels / 255 - mean) / std in float32 of uint8 images, as torchvision computes it.

    On a CPU it is looked up, as `normalise` does; a GPU's result may differ in the last bit.
    """
    mean_C11, std_C11 = _mean_and_std(image_BCHW.device, 1)
    if image_BCHW.device.type != "cpu":
        return image_BCHW.float().div_(255).sub_(mean_C11).div_(std_C11)
    table_VC = (torch.arange(256.0)[:, None] / 255 - mean_C11.flatten()) / std_C11.flatten()
    return _look_up(image_BCHW, table_VC).contiguous()


def normalise(image_BCHW: torch.Tensor) -> torch.Tensor:
    """Return (pixels - mean) / std in float32 of uint8 images, channels last in memory.

    On a CPU it is looked up, with the same bits: there are 256 values a channel, and three passes of
    arithmetic over float32 images take nine times as long.
    """
    mean_C11, std_C11 = _mean_and_std(image_BCHW.device, 255)
    if image_BCHW.device.type != "cpu":
        return (image_BCHW.float() - mean_C11) / std_C11
    table_VC = (torch.arange(256.0)[:, None] - mean_C11.flatten()) / std_C11.flatten()
    return _look_up(image_BCHW, table_VC)


def _look_up(image_BCHW: torch.Tensor, table_VC: torch.Tensor) -> torch.Tensor:
    """Return the table's values for uint8 images, float32, channels last in memory."""
    pixels_BHWC = image_BCHW.permute(0, 2, 3, 1).numpy()
    normal_BHWC = np.empty(pixels_BHWC.shape, dtype=np.float32)
    for pixels_HWC, normal_HWC in zip(pixels_BHWC, normal_BHWC, strict=True):
        cv2.LUT(np.ascontiguousarray(pixels_HWC), table_VC.numpy()[None], dst=normal_HWC)
    return torch.from_numpy(normal_BHWC).permute(0, 3, 1, 2)


@functools.cache
def _mean_and_std(device: torch.device, white: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean_C11 and std_C11 for pixels of 0 to `white`, in float32 on a device.

    They are no buffers of a module, which a run in bfloat16 would round, and the host waits for a GPU only
    when they are made.
    """
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) * white for values in (MEAN, STD))
    return mean_C11.to(device), std_C11.to(device)
