"""Multilingual-CLIP (Carlsson et al. 2022): XLM-R text towers that meet English CLIP's image towers.

A text's feature is the mean of XLM-R's last hidden states over the tokens that are no padding, times one
linear layer (owner: github.com/FreddeFrallan/Multilingual-CLIP, `pt_multilingual_clip.py`). Which image
tower belongs to it says its name: `XLM-Roberta-Large-Vit-B-32` and `-Vit-L-14` go with OpenAI's CLIP.
"""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.core import store
from pipeline.core.arrays import Float32Array
from pipeline.core.files.foreign import foreign, parse_json
from pipeline.core.records import InputError
from training.data.squares import Fit, SquareConfig
from training.image_encoder import (
    IMAGES_PER_BATCH_ACCELERATED,
    ImageEncoder,
    Precision,
    can_compile,
    computing,
)
from training.weights.hub.locate import local_path
from training.weights.hub.names import find_id
from training.weights.image_tower import ImageTower
from training.weights.tensor_files import read_tensors

TOKENS_PER_BATCH = 4096  # of texts, padding counted, so that short ones go in larger batches
IMAGES_PER_BATCH = 64
SENTENCEPIECE_FILE = "sentencepiece.bpe.model"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CONFIG_FILE = "config.json"
# XLM-R's ids: four special tokens in front, then SentencePiece's pieces from its second on (fairseq's order).
_START, _PADDING, _END, _UNKNOWN = 0, 1, 2, 3
_HEADS = {768: 12, 1024: 16}  # of XLM-R base and large, by width
_DEFAULT_HEADS = 12  # of a configuration that says nothing of them (transformers' default)


class MultilingualTextTower(nn.Module):
    """XLM-R without its pooler, the masked mean, and the linear layer to CLIP's space."""

    def __init__(self, transformer: nn.Module, width: int, embed_dim: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.projection = nn.Linear(width, embed_dim)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Return feature_BD, not unit-norm, of token ids padded with XLM-R's padding id."""
        mask_BL = tokens_BL.ne(_PADDING)
        hidden_BLH = self.transformer(input_ids=tokens_BL, attention_mask=mask_BL.long()).last_hidden_state
        weight_BL1 = mask_BL.unsqueeze(2).to(hidden_BLH.dtype)
        mean_BH = (hidden_BLH * weight_BL1).sum(dim=1) / weight_BL1.sum(dim=1)
        feature_BD: torch.Tensor = self.projection(mean_BH)
        return feature_BD


class MultilingualText:
    """A text tower with its tokeniser, on one device."""

    def __init__(self, tower: MultilingualTextTower, pieces: Any, max_tokens: int, device: str) -> None:
        self.tower = tower.eval().to(device)
        self.max_tokens = max_tokens
        self.device = device
        self.precision: Precision = "float32"  # in which matrices are multiplied
        self._pieces = pieces

    @property
    def embed_dim(self) -> int:
        return self.tower.projection.out_features

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return XLM-R's ids of each text, <s> … </s>, cut at the model's positions."""
        found: list[list[int]] = self._pieces.encode(list(texts), out_type=int)
        return [
            [_START, *(piece + 1 if piece else _UNKNOWN for piece in ids[: self.max_tokens - 2]), _END]
            for ids in found
        ]

    def embed(self, texts: Sequence[str]) -> Float32Array:
        """Return text_ND, as the tower gives them; texts of like length are encoded together."""
        tokens = self.tokens(texts)
        feature_ND = np.empty((len(texts), self.embed_dim), np.float32)
        with torch.inference_mode(), computing(self.precision, torch.device(self.device).type):
            for rows in batches_by_length([len(ids) for ids in tokens], TOKENS_PER_BATCH):
                longest = max(len(tokens[row]) for row in rows)
                tokens_BL = torch.full((len(rows), longest), _PADDING, dtype=torch.long)
                for at, row in enumerate(rows):
                    tokens_BL[at, : len(tokens[row])] = torch.tensor(tokens[row])
                feature_ND[rows] = self.tower(tokens_BL.to(self.device)).float().cpu().numpy()
        return feature_ND

    def embed_texts(self, texts: Sequence[str]) -> Float32Array:
        """Return text_ND, unit-norm."""
        return F.normalize(torch.from_numpy(self.embed(texts)), dim=-1).numpy()


class ClipImages:
    """A CLIP's image tower with its preprocessing, OpenAI's if no other `fit` is given, on one device."""

    def __init__(
        self, tower: ImageTower, device: str, precision: Precision = "float32", fit: Fit = "crop"
    ) -> None:
        """Compile a ViT for a GPU, which takes a minute: whoever scores has many images."""
        tower.module.to(device)
        compiled = can_compile(tower.module, device)
        is_cpu = torch.device(device).type == "cpu"
        self.embed_dim = tower.embed_dim
        self._batch_size = IMAGES_PER_BATCH if is_cpu else IMAGES_PER_BATCH_ACCELERATED
        self._images = ImageEncoder(
            functools.partial(tower.encode, compiled=compiled),
            SquareConfig(image_size_px=tower.image_size_px, fit=fit),
            device,
            embed_dim=tower.embed_dim,
            precision=precision,
            fixed_batches=compiled,
        )

    def embed_images(self, images: Sequence[bytes]) -> Float32Array:
        """Return image_ND, unit-norm, of encoded images.

        Raises:
            InputError: if one is not an image; it names the position.
        """
        features, first = [np.empty((0, self.embed_dim), np.float32)], 0
        for feature_BD, left_out, num_images in self._images.features(images, self._batch_size):
            for row, reason in left_out.items():
                raise InputError(f"image {first + row} cannot be decoded: {reason}")
            features.append(feature_BD)
            first += num_images
        return np.concatenate(features)


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield row numbers, every row once, in batches, shortest first.

    Rows times the longest of a batch is at most `max_tokens`.

    A row that is longer than `max_tokens` has a batch of its own.
    """
    batch: list[int] = []
    for row in np.argsort(np.asarray(lengths), kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[row] > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def find_text_folder(source: str) -> str:
    """Return a local folder, or the cache's for a model id.

    Raises:
        InputError: if the source is neither, or the hub does not give the model.
    """
    if os.path.isdir(source):
        return source
    if os.path.isabs(source) or find_id(source) is None:
        raise InputError(f"{source}: no such folder; give a Multilingual-CLIP folder, or a model id")
    return os.path.dirname(local_path(source))


def text_files(folder: str) -> list[str]:
    """Return the files that make a text tower's features: configuration, SentencePiece model, weights."""
    weights = next((name for name in WEIGHT_FILES if store.exists(store.join(folder, name))), None)
    paths = [
        store.join(folder, name) for name in (CONFIG_FILE, SENTENCEPIECE_FILE, weights or WEIGHT_FILES[1])
    ]
    for path in paths:
        if not store.exists(path):
            raise InputError(f"{path}: no such file; give a whole Multilingual-CLIP folder")
    return paths


def load_text(source: str, device: str) -> MultilingualText:
    """Load the text tower of a folder or model id.

    Raises:
        InputError: one line if something is missing.
    """
    folder = find_text_folder(source)
    config_path, pieces_path, weights_path = text_files(folder)
    pieces = _read_pieces(pieces_path)
    tensors = read_tensors(weights_path).tensors
    try:
        weight = tensors["LinearTransformation.weight"]
        words = tensors["transformer.embeddings.word_embeddings.weight"]
        positions = tensors["transformer.embeddings.position_embeddings.weight"]
        kinds = tensors["transformer.embeddings.token_type_embeddings.weight"]
        inner = tensors["transformer.encoder.layer.0.intermediate.dense.weight"]
    except KeyError as error:
        raise InputError(
            f"{weights_path}: no tensor {error}; give a Multilingual-CLIP text tower (transformer.*,"
            " LinearTransformation.*)"
        ) from None
    if len(kinds) != 1:
        raise InputError(f"{weights_path}: its base is not XLM-RoBERTa; give an XLM-Roberta-* text tower")
    if len(pieces) + 2 != len(words):
        raise InputError(
            f"{pieces_path}: {len(pieces)} pieces, but the embedding has {len(words)} rows, which takes"
            f" {len(words) - 2}; give the SentencePiece model of these weights"
        )
    import transformers

    width = int(words.shape[1])
    layers = 1 + max(
        int(m[1]) for name in tensors if (m := re.match(r"transformer\.encoder\.layer\.(\d+)\.", name))
    )
    sizes = transformers.XLMRobertaConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=_heads(config_path, width),
        intermediate_size=int(inner.shape[0]),
        max_position_embeddings=len(positions),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=_PADDING,
        bos_token_id=_START,
        eos_token_id=_END,
    )
    with torch.random.fork_rng(devices=[]):
        base = transformers.XLMRobertaModel(sizes, add_pooling_layer=False)
        tower = MultilingualTextTower(base, width, int(weight.shape[0]))
    state = {
        name.replace("LinearTransformation.", "projection."): tensor
        for name, tensor in tensors.items()
        if ".pooler." not in name and not name.endswith("position_ids")
    }
    try:
        tower.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{weights_path}: does not fit XLM-RoBERTa: {reason}") from None
    # Positions count from the padding id on: two of them are never used.
    return MultilingualText(tower, pieces, len(positions) - 2, device)


def _heads(config_path: str, width: int) -> int:
    """Return the number of heads: of the base's own configuration if that is a local folder, else XLM-R's."""
    try:
        base = parse_json(store.read_text(config_path)).get("modelBase", "")
    except (ValueError, AttributeError, OSError) as error:
        raise InputError(f"{config_path}: not readable JSON ({error}); download the folder again") from None
    path = store.join(str(base), CONFIG_FILE)
    if base and os.path.isfile(path):
        with foreign(path, "configuration of XLM-RoBERTa"):
            return int(parse_json(store.read_text(path)).get("num_attention_heads", _DEFAULT_HEADS))
    if width not in _HEADS:
        raise InputError(
            f"{config_path}: a text tower of width {width} is not one of XLM-RoBERTa's, and modelBase names"
            f" no folder with a {CONFIG_FILE}, so its number of heads is unknown; give its base's folder"
        )
    return _HEADS[width]


def _read_pieces(path: str) -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise InputError(
            f'{path}: needs the sentencepiece package: pip install "cnclip-pretraining[mclip]"'
        ) from None
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{path}: not a SentencePiece model ({str(error).strip()}); download it again"
        ) from None
