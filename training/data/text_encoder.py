"""What reading and statements need of `training.model.tokenizer.Tokenizer`."""

from collections.abc import Sequence
from typing import Protocol

from pipeline.core.arrays import Int32Array


class TextEncoder(Protocol):
    """Turn texts into token ids."""

    @property
    def digest(self) -> str:
        """Hexadecimal digest of the vocabulary and of how it is used: names the files of token ids."""

    def encode(self, texts: Sequence[str], context_length: int) -> Int32Array:
        """Return token ids [texts, context_length] with [CLS] and [SEP], 0 = padding; cut longer texts."""

    def num_truncated(self, texts: Sequence[str], context_length: int) -> int:
        """Return how many of the texts `encode` cuts."""
