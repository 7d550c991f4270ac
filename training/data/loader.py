"""From shards to batches: reading samples without making the step wait."""

import functools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.core.files.images import BadImageError, decode_pixels
from pipeline.core.records import InputError, Shard
from pipeline.core.shard_format import ByteRanges
from training.config.train import AugmentConfig
from training.data.augment import augment, sample_generator
from training.data.auto_augment import Pixels
from training.data.feature_cache import FeatureCache
from training.data.patch_mask import PatchMask
from training.data.sampler import SampleOrder
from training.data.shard_table import ShardTable, image_id_of, read_shard_table
from training.data.statements import Questions, Statements
from training.data.text_encoder import TextEncoder

_BATCHES_AHEAD = 4


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
class ReaderConfig:
    """How samples are read: what a view and a caption are, and with how many threads."""

    image_size_px: int
    augment: AugmentConfig
    caption_column: str  # of the sidecars
    context_length: int  # most tokens of a caption, with [CLS] and [SEP]
    token_folder: str  # where token ids are kept
    seed: int  # of the views, and of which caption a sample with several has in an epoch
    threads: int = 1  # that decode


class BatchReader:
    """Reads, decodes and augments one rank's part of any step."""

    def __init__(
        self,
        shards: Sequence[Shard],
        order: SampleOrder,
        tokenizer: TextEncoder,
        config: ReaderConfig,
        *,
        lanes: range,
        patch_mask: PatchMask | None = None,
        statements: Statements | None = None,
    ) -> None:
        self._shards, self._order, self._lanes, self._config = shards, order, lanes, config
        self.features: FeatureCache | None = None  # if set, batches have these instead of images
        self._patch_mask, self._statements = patch_mask, statements
        self._pool = ThreadPoolExecutor(config.threads, "decode") if config.threads > 1 else None
        # As many as a rank's lanes have open at once, and the next of each.
        open_shards = len(lanes) * (order.window_shards + 1) + 1
        self._table = functools.lru_cache(maxsize=open_shards)(
            lambda shard: read_shard_table(
                shards[shard],
                tokenizer,
                caption_column=config.caption_column,
                context_length=config.context_length,
                token_folder=config.token_folder,
                statements=statements,
            )
        )
        self._tar = functools.lru_cache(maxsize=open_shards)(
            lambda shard: ByteRanges(shards[shard].path, concurrent=True)
        )

    def read(self, step: int) -> Batch:
        """Return the rank's part of a step.

        Raises:
            InputError: with the tar and key of an image that cannot be read.
        """
        index, epoch = self._order.batch(step, self._lanes)
        shard = np.searchsorted(self._order.shard_starts, index, side="right") - 1
        row = index - self._order.shard_starts[shard]
        tables = {int(s): self._table(int(s)) for s in np.unique(shard)}
        places = list(zip(shard.tolist(), row.tolist(), epoch.tolist(), strict=True))
        if self.features is not None:
            image = torch.from_numpy(np.stack([self.features.read(*place) for place in places]))
        else:
            image = torch.from_numpy(self.images(places)).permute(0, 3, 1, 2)

        captions = [(s, tables[s].drawn_caption(r, self._config.seed, e)) for s, r, e in places]
        tokens = [tables[s].token_ids[slice(*tables[s].token_starts[c : c + 2])] for s, c in captions]
        tokens_BL = np.zeros((len(tokens), max(map(len, tokens))), dtype=np.int64)
        for i, ids in enumerate(tokens):
            tokens_BL[i, : len(ids)] = ids
        caption_id = [int.from_bytes(blake2b(ids.tobytes(), digest_size=7).digest()) for ids in tokens]
        keys = np.array([tables[s].keys[r] for s, r, _ in places])
        questions = None
        if self._statements is not None:
            mentioned = [rows[c] for s, c in captions if (rows := tables[s].mentioned) is not None]
            questions = self._statements.draw(mentioned, keys.tolist(), epoch.tolist())
        kept_BP = None
        if self._patch_mask is not None:
            kept_BP = self._patch_mask.draw(keys.tolist(), epoch.tolist())
        return Batch(
            step=step,
            keys=keys,
            image=image,
            tokens_BL=torch.from_numpy(tokens_BL),
            image_id_B=torch.tensor([int(tables[s].image_id[r]) for s, r, _ in places]),
            caption_id_B=torch.tensor(caption_id),
            kept_BP=kept_BP,
            questions=questions,
        )

    def images(self, places: list[tuple[int, int, int]]) -> Pixels:
        """Return augmented views, uint8 [B, H, W, 3], of samples named by (shard, row, epoch)."""
        side, threads = self._config.image_size_px, self._config.threads
        image_BHWC = np.empty((len(places), side, side, 3), dtype=np.uint8)

        def fill(part: range) -> None:
            for i in part:
                s, r, e = places[i]
                image_BHWC[i] = self._view(s, self._table(s), r, e)

        if self._pool is None:
            fill(range(len(places)))
        else:
            list(self._pool.map(fill, [range(i, len(places), threads) for i in range(threads)]))
        return image_BHWC

    def _view(self, shard: int, table: ShardTable, row: int, epoch: int) -> Pixels:
        key = bytes(table.keys[row])
        data = self._tar(shard).read(
            int(table.offset_bytes[row]), int(table.size_bytes[row]), f"{key.decode()}.jpg"
        )
        # Hashing costs a tenth of decoding, and a damaged JPEG often still decodes, to another image.
        if image_id_of(sha256(data).hexdigest()) != table.image_id[row]:
            raise InputError(
                f"{self._shards[shard].path}: {key.decode()}.jpg is not the image whose digest its sidecar"
                " holds: the tar is corrupt or not its sidecar's; run the shards stage again"
            )
        try:
            pixels = decode_pixels(data)
        except BadImageError as error:
            raise InputError(
                f"{self._shards[shard].path}: {key.decode()}.jpg cannot be decoded ({error}); leave the"
                " sample out: run filter_image and shards again"
            ) from None
        random = sample_generator(self._config.seed, epoch, key)
        return augment(pixels, self._config.image_size_px, self._config.augment, random)


class Prefetcher:
    """Batches of steps [first, end) in order, read ahead by a thread; iterating raises what reading did."""

    def __init__(self, reader: BatchReader, first_step: int, end_step: int) -> None:
        self.wait_seconds = 0.0  # how long iterating has waited so far
        self._end_step = end_step
        self._queue: queue.Queue[Batch | Exception] = queue.Queue(_BATCHES_AHEAD)
        self._stopped = threading.Event()
        self._next_step = first_step
        self._thread = threading.Thread(
            target=self._read_ahead, args=(reader, first_step), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while self._next_step < self._end_step:
            start = time.perf_counter()
            item = self._queue.get()
            self.wait_seconds += time.perf_counter() - start
            if isinstance(item, Exception):
                raise item
            self._next_step += 1
            yield item

    def close(self) -> None:
        """Stop the thread; batches read ahead are dropped."""
        self._stopped.set()
        self._thread.join()

    def _read_ahead(self, reader: BatchReader, first_step: int) -> None:
        for step in range(first_step, self._end_step):
            item: Any
            try:
                item = reader.read(step)
            except Exception as error:
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stopped.is_set() or isinstance(item, Exception):
                return
