"""Encodes images with the image tower of an English or a Chinese CLIP, for `data_prep.features.stage`."""

import functools
from typing import TYPE_CHECKING, Literal, Protocol

from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.records import InputError
from training.weights.hub.locate import digest_of, pinned_path
from training.weights.hub.names import find_id

if TYPE_CHECKING:
    from training.model.multilingual_clip import ClipImages


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
def load(config: EncoderSettings, *, run_folder: str = "") -> "ClipImages":
    """Load the encoder into memory, on the accelerator if there is one."""
    import torch

    from training.model.multilingual_clip import ClipImages
    from training.weights.formats import load_model
    from training.weights.image_tower import ImageTower, load_image_tower

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.model is None:
        path = pinned_path(run_folder, str(config.image_encoder))
        return ClipImages(load_image_tower(path, activation=config.image_activation), device)
    model = load_model(pinned_path(run_folder, config.model)).eval()
    tower = ImageTower(model.visual, model.config.vision.image_size_px, model.config.embed_dim)
    return ClipImages(tower, device, fit="squash")
