"""Image preprocessing for evaluation: what a stored image becomes before it enters the image tower."""

import io
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image

from pipeline.core.records import InputError

# Per channel, of pixel values in [0, 1]: OpenAI CLIP's, kept by Chinese CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: Sequence[bytes], image_size_px: int) -> torch.Tensor:
    """image_BCHW float32, normalised, of encoded images in any format that Pillow reads.

    As Chinese CLIP: bicubic resize to the square, without keeping the aspect and without a crop. Unlike it,
    the image is converted to RGB before it is resized: interpolating palette indices makes colours that are
    not there. So images with a palette, with transparency or of more than 8 bits differ from it.
    InputError names the position of an image that cannot be decoded.
    """
    pixels_BHWC = np.empty((len(images), image_size_px, image_size_px, 3), dtype=np.uint8)
    for row, data in enumerate(images):
        try:
            with Image.open(io.BytesIO(data)) as image:
                square = image.convert("RGB").resize((image_size_px, image_size_px), Image.Resampling.BICUBIC)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"image {row} of {len(images)} cannot be decoded: {error}") from None
        pixels_BHWC[row] = np.asarray(square)
    image_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).to(torch.float32).div_(255)
    mean_C11 = torch.tensor(MEAN).view(3, 1, 1)
    std_C11 = torch.tensor(STD).view(3, 1, 1)
    return image_BCHW.sub_(mean_C11).div_(std_C11).contiguous()


def normalise(image_BCHW: torch.Tensor, mean_C11: torch.Tensor, std_C11: torch.Tensor) -> torch.Tensor:
    """(pixels - mean) / std in float32 of uint8 images, channels last in memory; all in units of 0…255.

    On a CPU it is looked up, with the same bits: there are 256 values a channel, and three passes of
    arithmetic over float32 images take nine times as long.
    """
    if image_BCHW.device.type != "cpu":
        return (image_BCHW.float() - mean_C11) / std_C11
    table_VC = (torch.arange(256.0)[:, None] - mean_C11.flatten()) / std_C11.flatten()
    pixels_BHWC = image_BCHW.permute(0, 2, 3, 1).numpy()
    normal_BHWC = np.empty(pixels_BHWC.shape, dtype=np.float32)
    for pixels_HWC, normal_HWC in zip(pixels_BHWC, normal_BHWC, strict=True):
        cv2.LUT(np.ascontiguousarray(pixels_HWC), table_VC.numpy()[None], dst=normal_HWC)
    return torch.from_numpy(normal_BHWC).permute(0, 3, 1, 2)
