"""The encoders of `[image_features]`: images as the model itself sees them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.features.stage import ImageFeaturesConfig
from pipeline import image_encoders
from pipeline.core.records import InputError
from tests.helpers.tiny_model import write_tiny_model
from training.encoder import load


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_chinese_clip_gives_the_features_of_embed(tmp_path: Path) -> None:
    weights, vocabulary = write_tiny_model(tmp_path)
    encoder = image_encoders.load(ImageFeaturesConfig(model=weights, device="cpu"))
    images = [_png(seed) for seed in range(3)]
    expected = load(weights, vocabulary=vocabulary, device="cpu").embed_images(images)
    np.testing.assert_array_equal(encoder.embed_images(images), expected)
    english = image_encoders.load(ImageFeaturesConfig(image_encoder=weights, device="cpu"))
    assert np.abs(english.embed_images(images) - expected).max() > 1e-3  # cropped, not squashed
    with pytest.raises(InputError, match="image 1 cannot be decoded"):
        encoder.embed_images([images[0], b"<html>"])
