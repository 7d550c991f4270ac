"""Scores images against captions with Multilingual-CLIP and its CLIP, or with a Chinese CLIP.

The score stage (`data_prep.filters.score`, whose `PairScorer` both implement) may not import the models, so
`pipeline.catalog` passes it these functions.
"""

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from pipeline.core import store
from pipeline.core.arrays import Float32Array
from pipeline.core.config import digest
from pipeline.core.records import InputError
from training.weights.hub.locate import digest_of, pin_of, pinned_path
from training.weights.hub.names import find_id

if TYPE_CHECKING:
    from training.model.tokenizer import Tokenizer


class PairSettings(Protocol):
    """The encoders in `[score]` (`data_prep.filters.score.ScoreConfig`); hashable."""

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
    @property
    def precision(self) -> Literal["float32", "bf16"]: ...


def identify_pair(config: PairSettings, *, run_folder: str = "") -> tuple[str, str]:
    """Return digests of the text and the image encoder, which cover everything that changes a feature.

    For weights given by name, the look-ups of the run in `run_folder` count; nothing is downloaded.

    Raises:
        InputError: if a file is missing.
    """
    rounded = () if config.precision == "float32" else (config.precision,)
    if config.model is not None:
        _exists(config.model, "model")
        weights = digest_of(run_folder, config.model)
        vocabulary = _vocabulary_digest(config, run_folder)
        text = digest("chinese clip", weights, vocabulary, config.context_length, *rounded)
        return text, digest("chinese clip", weights, *rounded)
    assert config.text_encoder is not None
    assert config.image_encoder is not None
    _exists(config.image_encoder, "image_encoder")
    text = digest("mclip", _text_digests(config.text_encoder, run_folder), *rounded)
    image = digest("clip", digest_of(run_folder, config.image_encoder), config.image_activation, *rounded)
    return text, image


@functools.lru_cache(maxsize=1)  # one process scores many partitions with the same pair
def load(config: PairSettings, *, run_folder: str = "") -> "OwnModel | MultilingualPair":
    """Load both encoders into memory, on the accelerator if there is one."""
    if config.model is not None:
        return OwnModel(config, run_folder)
    return MultilingualPair(config, run_folder)


class MultilingualPair:
    """mCLIP: an XLM-R text tower and the image tower of the CLIP with which it was aligned."""

    def __init__(self, config: PairSettings, run_folder: str) -> None:
        import torch

        from training.model.multilingual_clip import ClipImages, load_text
        from training.weights.image_tower import load_image_tower

        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        text = str(config.text_encoder)
        if find_id(text) is not None:  # the folder of the cache that the named weights are in
            text = os.path.dirname(pinned_path(run_folder, text))
        self._text = load_text(text, device)
        self._text.precision = config.precision
        image = pinned_path(run_folder, str(config.image_encoder))
        tower = load_image_tower(image, activation=config.image_activation)
        self._images = ClipImages(tower, device, config.precision)
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
    """A Chinese CLIP of any known format, to score a corpus with the model it trained, as the paper plans."""

    def __init__(self, config: PairSettings, run_folder: str) -> None:
        from training.encoder import Encoder
        from training.weights.formats import load_model

        path = pinned_path(run_folder, str(config.model))
        self._encoder = Encoder(
            load_model(path),
            _vocabulary(path, config),
            device=config.device,
            precision=config.precision,
            many=True,
        )
        self._context_length = min(config.context_length, self._encoder.model.config.text.max_positions)

    def embed_texts(self, texts: Sequence[str]) -> Float32Array:
        tokens_NL, _ = self._encoder.tokenizer.encode_counting(texts, self._context_length)
        return self._encoder.embed_tokens(tokens_NL)

    def embed_images(self, images: Sequence[bytes]) -> Float32Array:
        return self._encoder.embed_images(images)


def _vocabulary_digest(config: PairSettings, run_folder: str) -> str:
    """Return the digest of the model's vocabulary, or the id of a named model without one."""
    assert config.model is not None
    if find_id(config.model) is None:
        return _vocabulary(config.model, config).digest
    if config.vocabulary is not None and store.exists(config.vocabulary):
        from training.model.tokenizer import Tokenizer

        return Tokenizer.load(config.vocabulary).digest
    pin = pin_of(run_folder, config.model)
    own = pin.sha256_of("vocab.txt") if pin is not None and config.vocabulary is None else None
    return own or config.vocabulary or "the public one"


def _text_digests(source: str, run_folder: str) -> list[str]:
    """Return the digests of a text tower's configuration, SentencePiece model and weights."""
    if os.path.isdir(source) or find_id(source) is None:
        from training.model.multilingual_clip import find_text_folder, text_files

        return [store.digest_file(path) for path in text_files(find_text_folder(source))]
    pin = pin_of(run_folder, source)
    if pin is None:
        return [digest_of(run_folder, source)]
    names = ("config.json", "sentencepiece.bpe.model", pin.weights)
    return [pin.sha256_of(name) or "" for name in names]


def _vocabulary(path: str, config: PairSettings) -> "Tokenizer":
    from training.weights.formats import read_weights
    from training.weights.vocabulary_lookup import find_vocabulary

    weights = read_weights(path)
    if weights.config is None:
        raise InputError(f"{path}: {weights.format}: not a whole Chinese CLIP; give weights of both towers")
    return find_vocabulary(path, weights.config.text.vocab_size, given=config.vocabulary)


def _exists(path: str, key: str) -> None:
    if find_id(path) is None and not store.exists(path):
        raise InputError(f"{path}: no such file or folder; correct [score] {key}")
