"""True and false statements about what images show, as hard negatives of each other.

A sample whose caption names some of the objects is asked one question a visit: either "there is X" with X
shown against "there is Y" with Y absent, or "there is no Y" against "there is no X". Which question, objects
and template is a function of (seed, epoch, key). `training.losses.negation` has the loss of a question.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.core.arrays import BoolArray, Int64Array
from pipeline.core.records import ConfigError
from training.config.train import NegationConfig
from training.data.text_encoder import TextEncoder

_PURPOSE = 2  # a word of the generator's counter; 0 is the view's, 1 the patch mask's


@dataclass(frozen=True, slots=True)
class Questions:
    """One rank's questions of a step."""

    tokens_B2L: Tensor  # int64, the true and the false statement, 0 = padding
    asked_B: Tensor  # bool; if false, both statements are alike and count nothing


class Statements:
    """Every statement as token ids, and the draw of a sample's question."""

    def __init__(
        self, config: NegationConfig, tokenizer: TextEncoder, *, context_length: int, seed: int
    ) -> None:
        """Encode every statement.

        Raises:
            ConfigError: if a statement is longer than `context_length` tokens.
        """
        self.config, self._seed = config, seed
        templates = (*config.affirmed, *config.negated)
        texts = [template.replace("{}", thing) for template in templates for thing in config.objects]
        if tokenizer.num_truncated(texts, context_length):
            raise ConfigError(
                f"negation: a statement is longer than context_length = {context_length} tokens"
            )
        tokens_SL = tokenizer.encode(texts, context_length).astype(np.int64)
        longest = int((tokens_SL != 0).sum(1).max())
        self._tokens_TOL = tokens_SL[:, :longest].reshape(len(templates), len(config.objects), longest)

    @property
    def num_objects(self) -> int:
        """Return the number of objects that statements are about."""
        return len(self.config.objects)

    def mentions(self, captions: pa.Array) -> BoolArray:
        """Return mentioned_NO: which objects each caption names."""
        found = [pc.match_substring(captions, thing) for thing in self.config.objects]
        return np.stack([each.to_numpy(zero_copy_only=False) for each in found], axis=1).astype(np.bool_)

    def draw(self, mentioned: Sequence[BoolArray], keys: Sequence[bytes], epochs: Sequence[int]) -> Questions:
        """Draw the questions of some visits, given each sample's row of `mentions`."""
        pairs = [self._draw_one(*visit) for visit in zip(mentioned, keys, epochs, strict=True)]
        any_statement = self._tokens_TOL[0, 0]
        tokens_B2L = np.stack([(any_statement, any_statement) if pair is None else pair for pair in pairs])
        longest = int((tokens_B2L != 0).sum(2).max())
        asked = torch.tensor([pair is not None for pair in pairs])
        return Questions(torch.from_numpy(tokens_B2L[:, :, :longest].copy()), asked)

    def _draw_one(
        self, mentioned_O: BoolArray, key: bytes, epoch: int
    ) -> tuple[Int64Array, Int64Array] | None:
        if mentioned_O.all() or not mentioned_O.any():
            return None
        counter = [0, _PURPOSE, epoch, self._seed]
        random = np.random.Generator(np.random.Philox(key=int(key, 16), counter=counter))
        shown = int(random.choice(np.flatnonzero(mentioned_O)))
        absent = int(random.choice(np.flatnonzero(~mentioned_O)))
        num_affirmed, num_negated = len(self.config.affirmed), len(self.config.negated)
        if random.random() < 0.5:
            statements_OL = self._tokens_TOL[int(random.integers(num_affirmed))]
            return statements_OL[shown], statements_OL[absent]
        statements_OL = self._tokens_TOL[num_affirmed + int(random.integers(num_negated))]
        return statements_OL[absent], statements_OL[shown]
