"""Who scores images against captions: Multilingual-CLIP with its CLIP, or a Chinese CLIP trained here.

The score stage (`data_prep.filters.score`, whose `PairScorer` both are) may not import the models;
`pipeline.catalog` hands it these functions.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from pipeline.core import store
from pipeline.core.arrays import Float32Array
from pipeline.core.config import digest
from pipeline.core.records import InputError

if TYPE_CHECKING:
    from training.model.tokenizer import Tokenizer


class PairSettings(Protocol):
    """What `[score]` says about the encoders (`data_prep.filters.score.ScoreConfig`); hashable."""

    @property
    def text_encoder(self) -> str | None: ...
    @property
    def image_encoder(self) -> str | None: ...
    @property
    def image_activation(self) -> Literal["quick_gelu", "gelu"]: ...
    @property
    def model(self) -> str | None: ...
    @property
    def vocabulary(self) -> str | None: ...
    @property
    def context_length(self) -> int: ...
    @property
    def device(self) -> str | None: ...


def identify_pair(config: PairSettings) -> tuple[str, str]:
    """Digests of the text and the image encoder: weights, tokeniser and whatever else changes a feature.

    InputError where a file is missing. A model id is fetched to Hugging Face's cache.
    """
    if config.model is not None:
        _exists(config.model, "model")
        weights = store.digest_tree(config.model)
        vocabulary = _vocabulary(config)
        text = digest("chinese clip", weights, vocabulary.digest, config.context_length)
        return text, digest("chinese clip", weights)
    from training.model.multilingual_clip import find_text_folder, text_files

    assert config.text_encoder is not None
    assert config.image_encoder is not None
    _exists(config.image_encoder, "image_encoder")
    files = text_files(find_text_folder(config.text_encoder))
    text = digest("mclip", [store.digest_file(path) for path in files])
    image = digest("clip", store.digest_tree(config.image_encoder), config.image_activation)
    return text, image


@functools.lru_cache(maxsize=1)  # one process scores many partitions with one pair
def load(config: PairSettings) -> "OwnModel | MultilingualPair":
    """Load both encoders into memory, on the accelerator if there is one."""
    if config.model is not None:
        return OwnModel(config)
    return MultilingualPair(config)


class MultilingualPair:
    """mCLIP: an XLM-R text tower and the image tower of the CLIP that it was taught to meet."""

    def __init__(self, config: PairSettings) -> None:
        import torch

        from training.model.multilingual_clip import ClipImages, load_text
        from training.weights.image_tower import load_image_tower

        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._text = load_text(str(config.text_encoder), device)
        tower = load_image_tower(str(config.image_encoder), activation=config.image_activation)
        self._images = ClipImages(tower, device)
        if self._text.embed_dim != self._images.embed_dim:
            raise InputError(
                f"score: {config.text_encoder} ends in {self._text.embed_dim} dimensions,"
                f" {config.image_encoder} in {self._images.embed_dim}: give the two of one pair"
            )

    def embed_texts(self, texts: Sequence[str]) -> Float32Array:
        return self._text.embed_texts(texts)

    def embed_images(self, images: Sequence[bytes]) -> Float32Array:
        return self._images.embed_images(images)


class OwnModel:
    """A Chinese CLIP of any known format: as the paper plans it, a corpus scored by the model it trained."""

    def __init__(self, config: PairSettings) -> None:
        from training.encoder import Encoder
        from training.weights.formats import load_model

        self._encoder = Encoder(load_model(str(config.model)), _vocabulary(config), device=config.device)
        self._context_length = min(config.context_length, self._encoder.model.config.text.max_positions)

    def embed_texts(self, texts: Sequence[str]) -> Float32Array:
        tokens_NL, _ = self._encoder.tokenizer.encode_counting(texts, self._context_length)
        return self._encoder.embed_tokens(tokens_NL)

    def embed_images(self, images: Sequence[bytes]) -> Float32Array:
        return self._encoder.embed_images(images)


def _vocabulary(config: PairSettings) -> "Tokenizer":
    from training.weights.formats import read_weights
    from training.weights.vocabulary_lookup import find_vocabulary

    weights = read_weights(str(config.model))
    if weights.config is None:
        raise InputError(
            f"{config.model}: {weights.format}: not a whole Chinese CLIP; give weights of both towers"
        )
    return find_vocabulary(str(config.model), weights.config.text.vocab_size, given=config.vocabulary)


def _exists(path: str, key: str) -> None:
    if not store.exists(path):
        raise InputError(f"{path}: no such file or folder; correct [score] {key}")
