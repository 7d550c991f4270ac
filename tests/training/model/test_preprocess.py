"""Image preprocessing for evaluation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.records import InputError
from training.model.preprocess import MEAN, STD, normalise, preprocess


def _encoded(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def test_one_colour_is_normalised_exactly() -> None:
    image_BCHW = preprocess([_encoded(Image.new("RGB", (5, 9), (255, 0, 51)))], 8)
    assert image_BCHW.shape == (1, 3, 8, 8)
    assert image_BCHW.dtype == torch.float32
    expected = [(value / 255 - mean) / std for value, mean, std in zip((255, 0, 51), MEAN, STD, strict=True)]
    torch.testing.assert_close(image_BCHW[0, :, 4, 4], torch.tensor(expected))


def test_the_whole_picture_is_squashed_into_the_square() -> None:
    wide = Image.new("RGB", (64, 16))
    wide.paste((255, 255, 255), (0, 0, 32, 16))
    bright = preprocess([_encoded(wide)], 16)[0, 0] > 0
    assert bright[:, :7].all()
    assert not bright[:, 9:].any()


def test_palette_is_converted_before_it_is_resized() -> None:
    """Interpolating palette indices, as the reference does, would give colours of neither half."""
    colours = Image.new("RGB", (8, 8), (250, 0, 0))
    colours.paste((0, 0, 250), (4, 0, 8, 8))
    in_palette = colours.convert("P", palette=Image.Palette.ADAPTIVE, colors=3)
    torch.testing.assert_close(preprocess([_encoded(in_palette)], 32), preprocess([_encoded(colours)], 32))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    data = _encoded(Image.new(mode, (4, 4)), "TIFF")
    assert preprocess([data, data], 4).shape == (2, 3, 4, 4)


def test_torchvision_gives_the_same_pixels() -> None:
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    reference = transforms.Compose(
        [
            transforms.Resize((24, 24), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    image = Image.fromarray(pixels)
    torch.testing.assert_close(preprocess([_encoded(image)], 24)[0], reference(image), atol=1e-6, rtol=0)


def test_an_undecodable_picture_is_named() -> None:
    good = _encoded(Image.new("RGB", (4, 4)))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for bad in (b"<html>", _encoded(Image.fromarray(noise), "JPEG")[:1000]):
        with pytest.raises(InputError, match="image 1 of 2 cannot be decoded"):
            preprocess([good, bad], 4)


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalising_uint8_is_the_plain_arithmetic_bit_for_bit(channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.randint(0, 256, (3, 3, 5, 7), generator=generator, dtype=torch.uint8)
    if channels_last:
        image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    found = normalise(image_BCHW, mean_C11, std_C11)
    assert torch.equal(found, (image_BCHW.float() - mean_C11) / std_C11)
