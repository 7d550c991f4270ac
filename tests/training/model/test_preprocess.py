"""Image preprocessing for evaluation."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from pipeline.core.files.images import Decode
from pipeline.core.records import InputError
from tests.helpers.encoded_images import png
from training.model.config import MODELS
from training.model.preprocess import MEAN, STD, normalise, preprocess, standardise
from training.weights.export import _preprocessor_config


def _encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_one_colour_is_normalised_exactly() -> None:
    image_BCHW = preprocess([_encoded(Image.new("RGB", (5, 9), (255, 0, 51)))], 8)
    assert image_BCHW.shape == (1, 3, 8, 8)
    assert image_BCHW.dtype == torch.float32
    expected = [(value / 255 - mean) / std for value, mean, std in zip((255, 0, 51), MEAN, STD, strict=True)]
    torch.testing.assert_close(image_BCHW[0, :, 4, 4], torch.tensor(expected))


def test_looked_up_values_have_the_bits_of_torchvisions_arithmetic() -> None:
    image_BCHW = torch.arange(256, dtype=torch.uint8).view(2, 1, 8, 16).expand(2, 3, 8, 16)
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = image_BCHW.float().div(255).sub(mean_C11).div(std_C11)
    assert torch.equal(standardise(image_BCHW), expected)


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


def _odd_files() -> dict[str, bytes]:
    y, x = np.mgrid[0:24, 0:36]
    drawn = np.stack([x * 7, y * 10, (x // 9 + y // 9) % 2 * 255], axis=-1).astype(np.uint8)
    colours, words = Image.fromarray(drawn), np.stack([x * 257, y * 300 + 3, x * y], axis=-1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files = {
        f"grey of {bits} bits": png((x + y) % 2**bits, bits, 0, transparent=(1).to_bytes(2, "big"))
        for bits in (1, 2, 4, 8)
    }
    files |= {
        f"palette of {bits} bits": png(
            (x // 4 + y) % 2**bits, bits, 3, palette=bytes(range(3 * 2**bits)), transparent=b"\x80\0"
        )
        for bits in (1, 2, 4)
    }
    return files | {
        "grey of 16 bits": png(x * 1000 + y, 16, 0, transparent=(7 * 1000 + 3).to_bytes(2, "big")),
        "colours": png(
            drawn, 8, 2, transparent=b"".join(bytes([0, value]) for value in drawn[3, 5].tolist())
        ),
        "colours of 16 bits": png(
            words, 16, 2, transparent=b"".join(value.to_bytes(2, "big") for value in words[2, 3].tolist())
        ),
        "alpha of 16 bits": png(np.stack([x * 1000, x * 900], axis=-1), 16, 4),
        "CMYK": _encoded(colours.convert("CMYK"), "JPEG"),
        "turned JPEG": _encoded(colours, "JPEG", exif=exif),
        "turned PNG": _encoded(colours, "PNG", exif=exif),
        "turned TIFF": _encoded(colours, "TIFF", exif=exif),
        "turned WebP": _encoded(colours, "WEBP", exif=exif),
        "floats": _encoded(Image.fromarray((x / 36).astype(np.float32)), "TIFF"),
        "GIF": _encoded(colours.convert("P"), "GIF", transparency=3),
    }


@pytest.mark.parametrize("decode", ["upright", "reference"])
@pytest.mark.parametrize("kind", _odd_files())
def test_an_opened_image_has_the_pixels_of_its_bytes(kind: str, decode: Decode, tmp_path: Path) -> None:
    data = _odd_files()[kind]
    wanted = preprocess([data], 16, decode)
    (tmp_path / "file").write_bytes(data)
    opened = [Image.open(io.BytesIO(data)), Image.open(tmp_path / "file")]
    before = [(image.mode, image.size, dict(image.info)) for image in opened]
    for _ in range(2):  # the second time its pixels are decoded already
        for image in opened:
            assert torch.equal(preprocess([image], 16, decode), wanted)
    assert [(image.mode, image.size) for image in opened] == [one[:2] for one in before] or "TIFF" in kind
    assert opened[0].info.get("transparency") == before[0][2].get("transparency")


def test_an_opened_image_that_does_not_decode_is_named_by_its_row() -> None:
    whole = _encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "PNG")
    cut = Image.open(io.BytesIO(whole[: len(whole) // 2]))
    with pytest.raises(InputError, match="image 1 of 2 cannot be decoded: truncated"):
        preprocess([Image.open(io.BytesIO(whole)), cut], 16)


@pytest.mark.parametrize("side", [32, 224])
def test_reference_decoding_is_cn_clip_s_for_odd_files_too(side: int) -> None:
    utils = pytest.importorskip("cn_clip.clip.utils", reason="cn_clip is not installed")
    reference = utils.image_transform(side)
    y, x = np.mgrid[0:61, 0:93]
    drawn = np.stack([x * 255 // 92, y * 255 // 60, (x // 9 + y // 9) % 2 * 255], axis=-1).astype(np.uint8)
    colours = Image.fromarray(drawn)
    faded = colours.copy()
    faded.putalpha(Image.fromarray((x * 255 // 92).astype(np.uint8)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files = [
        _encoded(faded),
        _encoded(colours.convert("P", palette=Image.Palette.ADAPTIVE)),
        _encoded(faded.convert("LA")),
        _encoded(Image.fromarray(np.asarray(colours.convert("L")).astype(np.uint16) * 257)),
        _encoded(colours.convert("CMYK"), "JPEG"),
        _encoded(colours, "JPEG", exif=exif),
    ]
    for data in files:
        seen = preprocess([data], side, "reference")[0]
        assert torch.equal(seen, reference(Image.open(io.BytesIO(data))))
        assert not torch.equal(seen, preprocess([data], side)[0]) or data is files[4]


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


def _pictures() -> dict[str, Image.Image]:
    """Edges, gradients and noise, wider and higher than the square, smaller and larger; also in grey."""
    random = np.random.default_rng(5)
    y, x = np.mgrid[0:211, 0:333]
    drawn = np.stack([x * 255 // 332, y * 255 // 210, (x // 30 + y // 30) % 2 * 255], axis=-1).astype(
        np.uint8
    )
    opaque = Image.fromarray(drawn).convert("RGBA")
    return {
        "drawn": Image.fromarray(drawn),
        "tiny": Image.fromarray(random.integers(0, 256, (13, 40, 3), dtype=np.uint8)),
        "grey": Image.fromarray(random.integers(0, 256, (97, 301), dtype=np.uint8)),
        "opaque": opaque,
        "noise": Image.fromarray(random.integers(0, 256, (301, 97, 3), dtype=np.uint8)),
    }


def _apart(one: torch.Tensor, two: torch.Tensor) -> tuple[float, float]:
    """(largest, mean) difference in pixel values of 0 … 255."""
    apart = (one - two).mul(torch.tensor(STD).view(3, 1, 1) * 255).abs()
    return apart.max().item(), apart.mean().item()


@pytest.mark.parametrize("side", [224, 336])
def test_cn_clip_gives_the_same_pixels(side: int) -> None:
    utils = pytest.importorskip("cn_clip.clip.utils", reason="cn_clip is not installed")
    reference = utils.image_transform(side)
    for image in _pictures().values():
        assert torch.equal(preprocess([_encoded(image)], side)[0], reference(image))


@pytest.mark.parametrize("side", [224, 336])
@pytest.mark.parametrize(
    ("backend", "largest", "mean"),
    [("ChineseCLIPImageProcessorPil", 1e-3, 1e-4), ("ChineseCLIPImageProcessor", 20, 0.5)],
)
def test_transformers_gives_the_same_pixels_or_nearly(
    backend: str, largest: float, mean: float, side: int
) -> None:
    """Its own bicubic of torchvision rounds otherwise: printed and bounded, mostly within 2 of 255."""
    import transformers

    if not hasattr(transformers, backend):
        pytest.skip(f"this release of transformers has no {backend}")
    config = _preprocessor_config(MODELS["ViT-L-14-336" if side == 336 else "ViT-B-16"])
    processor = getattr(transformers, backend)(
        **{key: value for key, value in config.items() if key != "image_processor_type"}
    )
    for name, image in _pictures().items():
        theirs = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        found = _apart(preprocess([_encoded(image)], side)[0], theirs)
        print(f"{backend} at {side}: {name}: largest {found[0]:.2f}, mean {found[1]:.4f} of 255")
        assert found[0] <= (largest if name == "noise" else min(largest, 2.01))
        assert found[1] <= mean


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
    found = normalise(image_BCHW)
    assert torch.equal(found, (image_BCHW.float() - mean_C11) / std_C11)
