"""Encodes images with the image tower of an English or a Chinese CLIP, for `data_prep.features.stage`."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from pipeline.core import store
from pipeline.core.arrays import Float32Array
from pipeline.core.config import digest
from pipeline.core.records import InputError
from training.weights.hub.locate import digest_of, pinned_path
from training.weights.hub.names import find_id

if TYPE_CHECKING:
    from training.model.multilingual_clip import ClipImages

_IMAGES_PER_BATCH = 32


class EncoderSettings(Protocol):
    """The encoder in `[image_features]` (`data_prep.features.stage.ImageFeaturesConfig`); hashable."""

    @property
    def image_encoder(self) -> str | None: ...
    @property
    def image_activation(self) -> Literal["quick_gelu", "gelu"]: ...
    @property
    def model(self) -> str | None: ...
    @property
    def device(self) -> str | None: ...


def identify(config: EncoderSettings, *, run_folder: str = "") -> str:
    """Return the encoder's digest, that of `[score]` with the same weights.

    Raises:
        InputError: if a file is missing.
    """
    key = "model" if config.model is not None else "image_encoder"
    weights = config.model or config.image_encoder
    assert weights is not None
    if find_id(weights) is None and not store.exists(weights):
        raise InputError(f"{weights}: no such file or folder; correct [image_features] {key}")
    found = digest_of(run_folder, weights)
    return digest("chinese clip", found) if config.model else digest("clip", found, config.image_activation)


@functools.lru_cache(maxsize=1)  # one process encodes many tables
def load(config: EncoderSettings, *, run_folder: str = "") -> "ChineseImages | ClipImages":
    """Load the encoder into memory, on the accelerator if there is one."""
    import torch

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.model is not None:
        return ChineseImages(pinned_path(run_folder, config.model), device)
    from training.model.multilingual_clip import ClipImages
    from training.weights.image_tower import load_image_tower

    path = pinned_path(run_folder, str(config.image_encoder))
    return ClipImages(load_image_tower(path, activation=config.image_activation), device)


class ChineseImages:
    """The image tower of a Chinese CLIP of any known format; it needs no vocabulary."""

    def __init__(self, path: str, device: str) -> None:
        from training.weights.formats import load_model

        self._model = load_model(path).eval().to(device)
        self._device = device

    def embed_images(self, images: Sequence[bytes]) -> Float32Array:
        """Return image_ND, unit-norm, of encoded images."""
        import torch

        from training.model.preprocess import preprocess

        side_px = self._model.config.vision.image_size_px
        feature_ND: Float32Array
        with torch.inference_mode():
            feature_ND = torch.cat(
                [
                    self._model.encode_image(
                        preprocess(images[start : start + _IMAGES_PER_BATCH], side_px).to(self._device)
                    ).cpu()
                    for start in range(0, len(images), _IMAGES_PER_BATCH)
                ]
            ).numpy()
        return feature_ND
