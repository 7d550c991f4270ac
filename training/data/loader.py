"""From shards to batches: what each step reads."""

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.records import Shard
from training.config.train import CaptionCut
from training.data.feature_cache import FeatureCache
from training.data.feeder import Request
from training.data.patch_mask import PatchMask
from training.data.sampler import SampleOrder, by_shard
from training.data.shard_cache import ShardCache
from training.data.shard_table import ShardTable, read_shard_table
from training.data.statements import Questions, Statements
from training.data.text_encoder import TextEncoder
from training.data.views import NO_PIECE, VISIT, Visits

_TABLE_LOCKS = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a global batch."""

    step: int
    keys: npt.NDArray[np.bytes_]  # [B]
    # uint8 RGB [B, C, H, W], channels last in memory, not normalised; or cached float16 features [B, D]
    image: torch.Tensor
    tokens_BL: torch.Tensor  # int64, 0 = padding, as long as this batch's longest caption
    image_id_B: torch.Tensor  # int64, equal for equal images
    caption_id_B: torch.Tensor  # int64, equal for captions of equal tokens
    kept_BP: torch.Tensor | None = None  # int64, patches to compute on; unset: all (training.data.patch_mask)
    questions: Questions | None = None  # true and false statements (training.data.statements)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionConfig:
    """Which captions are read, and how."""

    weights: Mapping[str, float]  # columns of the sidecars, and how often each is drawn
    context_length: int  # most tokens of a caption, with [CLS] and [SEP]
    token_folder: str  # where token ids are kept
    seed: int  # of which caption a sample with several has in an epoch
    cut: CaptionCut = "end"  # which words of a longer one are kept


class BatchReader:
    """Reads one rank's part of any step, except for its images: it says which they are."""

    def __init__(
        self,
        shards: Sequence[Shard],
        order: SampleOrder,
        tokenizer: TextEncoder,
        config: CaptionConfig,
        *,
        lanes: range,
        patch_mask: PatchMask | None = None,
        statements: Statements | None = None,
    ) -> None:
        self._order, self._lanes, self._seed = order, lanes, config.seed
        self.features: FeatureCache | None = None  # if set, batches have these instead of images
        self.cache: ShardCache | None = None  # if set, it holds the images' bytes on this machine
        self._patch_mask, self._statements = patch_mask, statements
        # As many as a rank's lanes have open at once, and the next of each. A cache reads a window ahead.
        is_remote = not all(store.is_local(shard.path) for shard in shards)
        self.open_shards = len(lanes) * (order.window_shards * (2 if is_remote else 1) + 1) + 1
        self._table = functools.lru_cache(maxsize=self.open_shards)(
            lambda shard: read_shard_table(
                shards[shard],
                tokenizer,
                caption_weights=config.weights,
                context_length=config.context_length,
                token_folder=config.token_folder,
                cut=config.cut,
                statements=statements,
            )
        )
        # Threads of a cache that want the same shard wait for the first of them.
        self._table_locks = [threading.Lock() for _ in range(_TABLE_LOCKS)]

    def requests(self, first_step: int, end_step: int) -> Iterator[Request[Batch]]:
        """Yield what the batches of steps [first, end) need."""
        return (self.request(step) for step in range(first_step, end_step))

    def request(self, step: int) -> Request[Batch]:
        """Return what the rank's part of a step needs.

        Raises:
            InputError: with the sidecar or the file of features that cannot be read.
        """
        if self.cache is not None:
            self.cache.wait(step)
        index, epoch_B = self._order.batch(step, self._lanes)
        shard_B = np.searchsorted(self._order.shard_starts, index, side="right") - 1
        row_B = index - self._order.shard_starts[shard_B]
        parts = [_Part(shard, at, self._table(shard)) for shard, at in by_shard(shard_B)]

        caption_B = np.empty_like(row_B)
        for part in parts:
            caption_B[part.at] = part.table.drawn_captions(row_B[part.at], self._seed, epoch_B[part.at])
        keys, image_id_B = np.empty(len(row_B), "S32"), np.empty_like(row_B)
        caption_id_B, length_B = np.empty_like(row_B), np.empty_like(row_B)
        for part in parts:
            row, caption = row_B[part.at], caption_B[part.at]
            keys[part.at], image_id_B[part.at] = part.table.keys[row], part.table.image_id[row]
            caption_id_B[part.at] = part.table.caption_id[caption]
            length_B[part.at] = part.table.num_tokens[caption]
        tokens_BL = np.zeros((len(row_B), length_B.max()), dtype=np.int64)
        for part in parts:
            part.table.copy_tokens(caption_B[part.at], tokens_BL, part.at)

        questions = None
        if self._statements is not None:
            mentioned = np.empty((len(row_B), self._statements.num_objects), dtype=np.bool_)
            for part in parts:
                assert part.table.mentioned is not None
                mentioned[part.at] = part.table.mentioned[caption_B[part.at]]
            questions = self._statements.draw(list(mentioned), keys.tolist(), epoch_B.tolist())
        kept_BP = None
        if self._patch_mask is not None:
            kept_BP = self._patch_mask.draw(keys.tolist(), epoch_B.tolist())

        def finish(image: torch.Tensor) -> Batch:
            if self.cache is not None:
                self.cache.done(step)
            return Batch(
                step=step,
                keys=keys,
                image=image,
                tokens_BL=torch.from_numpy(tokens_BL),
                image_id_B=torch.from_numpy(image_id_B),
                caption_id_B=torch.from_numpy(caption_id_B),
                kept_BP=kept_BP,
                questions=questions,
            )

        if self.features is not None:
            return Request(finish, ready=self.features.read(shard_B, row_B, epoch_B))
        visits = np.empty(len(row_B), VISIT)
        for part in parts:
            visits[part.at] = self._visits(part.shard, row_B[part.at], epoch_B[part.at])
        return Request(finish, visits=visits)

    def visits(self, shard: int, rows: range) -> Visits:
        """Return which images these rows of a shard have, in epoch 0."""
        return self._visits(shard, np.arange(rows.start, rows.stop), np.zeros(len(rows), np.int64))

    def _visits(self, shard: int, row: Int64Array, epoch: Int64Array) -> Visits:
        table, visits = self._table(shard), np.empty(len(row), VISIT)
        visits["shard"], visits["epoch"] = shard, epoch
        for name, column in (
            ("offset_bytes", table.offset_bytes),
            ("size_bytes", table.size_bytes),
            ("key", table.keys),
            ("image_id", table.image_id),
        ):
            visits[name] = column[row]
        visits["piece"], visits["piece_start_bytes"] = NO_PIECE, 0
        if self.cache is not None:
            visits["piece"], visits["piece_start_bytes"] = self.cache.places(shard, row)
        return visits

    def byte_range(self, shard: int, first_row: int, end_row: int) -> tuple[int, int]:
        """Return where in a shard's tar the images of rows [first, end) begin and end."""
        with self._table_locks[shard % len(self._table_locks)]:
            table = self._table(shard)
        offset = table.offset_bytes[first_row:end_row]
        return int(offset.min()), int((offset + table.size_bytes[first_row:end_row]).max())


@dataclass(frozen=True, slots=True)
class _Part:
    """The samples of a batch that lie in one shard."""

    shard: int
    at: Int64Array  # their places in the batch
    table: ShardTable
