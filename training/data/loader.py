"""From shards to batches: which samples a step sees, and reading them without making the step wait.

The order is a pure function of (seed, step): it depends neither on the number of ranks nor on anything that
ran before. The corpus is one sequence of samples, shard after shard, cut into `lanes` contiguous equal
ranges. A lane is an endless stream of epochs; within an epoch its pieces of shards come in seeded order and
its samples are permuted inside windows of a few pieces, so that reading stays sequential. Step s takes
positions [s·k, (s + 1)·k) of every lane, k = global_batch / lanes.
"""

import functools
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any

import cv2
import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pipeline.core import store
from pipeline.core.processes import say
from pipeline.core.records import ConfigError, InputError, Shard
from training.config.train import AugmentConfig
from training.data.augment import augment, sample_generator
from training.data.auto_augment import Pixels
from training.data.feature_cache import FeatureCache
from training.data.patch_mask import PatchMask
from training.data.statements import Bools, Questions, Statements
from training.data.text_encoder import TextEncoder

Int64s = npt.NDArray[np.int64]

_PIECE_ORDER, _SAMPLE_ORDER = 1, 2  # purposes of a draw, so that two of them never share a generator
_BATCHES_AHEAD = 4


class SampleOrder:
    """Which samples every step sees.

    `shard_num_samples` gives the sequence of samples; a sample's index is its place in it.
    ConfigError where the batch is no multiple of the lanes, or larger than the corpus.
    """

    def __init__(
        self,
        shard_num_samples: Sequence[int],
        *,
        seed: int,
        global_batch: int,
        lanes: int,
        window_shards: int,
    ) -> None:
        self.shard_starts: Int64s = np.concatenate([[0], np.cumsum(shard_num_samples, dtype=np.int64)])
        self.num_samples = int(self.shard_starts[-1])
        if global_batch % lanes:
            raise ConfigError(f"global_batch = {global_batch} is no multiple of lanes = {lanes}")
        if global_batch > self.num_samples:
            raise ConfigError(f"global_batch = {global_batch}, but the corpus has {self.num_samples} samples")
        self._seed = seed
        self._lanes = lanes
        self._samples_per_lane = global_batch // lanes
        self.window_shards = window_shards
        # A window serves many steps in a row; two a lane, since a batch may reach from one into the next.
        self._window_samples = functools.lru_cache(maxsize=2 * lanes)(self._permuted_window)
        self._windows = functools.lru_cache(maxsize=2 * lanes)(self._epoch_windows)

    def rank_lanes(self, rank: int, ranks: int) -> range:
        """The whole lanes that a rank owns; counts differ by at most one."""
        return range(rank * self._lanes // ranks, (rank + 1) * self._lanes // ranks)

    def rank_num_samples(self, rank: int, ranks: int) -> int:
        """How many samples of every global batch a rank sees."""
        return len(self.rank_lanes(rank, ranks)) * self._samples_per_lane

    def batch(self, step: int, lanes: range) -> tuple[Int64s, Int64s]:
        """(sample index, lane epoch) of the samples that `step`, counted from 0, takes of these lanes."""
        parts = [self._lane_batch(step, lane) for lane in lanes]
        return np.concatenate([index for index, _ in parts]), np.concatenate([epoch for _, epoch in parts])

    def _lane_batch(self, step: int, lane: int) -> tuple[Int64s, Int64s]:
        lane_size = self._lane_start(lane + 1) - self._lane_start(lane)
        position, end = step * self._samples_per_lane, (step + 1) * self._samples_per_lane
        indices, epochs = [], []
        while position < end:
            epoch, within = divmod(position, lane_size)
            count = min(end - position, lane_size - within)
            indices.append(self._epoch_range(lane, epoch, within, within + count))
            epochs.append(np.full(count, epoch, dtype=np.int64))
            position += count
        return np.concatenate(indices), np.concatenate(epochs)

    def _epoch_range(self, lane: int, epoch: int, start: int, end: int) -> Int64s:
        """Sample indices at positions [start, end) of one epoch of a lane."""
        _, window_starts = self._windows(lane, epoch)
        first = int(np.searchsorted(window_starts, start, side="right")) - 1
        last = int(np.searchsorted(window_starts, end, side="left"))
        samples = np.concatenate([self._window_samples(lane, epoch, window) for window in range(first, last)])
        return samples[start - window_starts[first] : end - window_starts[first]]

    def _epoch_windows(self, lane: int, epoch: int) -> tuple[list[Int64s], Int64s]:
        """The windows of an epoch, each as rows (first, end) of its pieces, and where each window starts."""
        lane_start, lane_end = self._lane_start(lane), self._lane_start(lane + 1)
        first = int(np.searchsorted(self.shard_starts, lane_start, side="right")) - 1
        last = int(np.searchsorted(self.shard_starts, lane_end, side="left"))
        pieces = np.stack(
            [
                np.maximum(self.shard_starts[first:last], lane_start),
                np.minimum(self.shard_starts[first + 1 : last + 1], lane_end),
            ],
            axis=1,
        )
        pieces = pieces[self._random(_PIECE_ORDER, lane, epoch).permutation(len(pieces))]
        windows = [pieces[i : i + self.window_shards] for i in range(0, len(pieces), self.window_shards)]
        sizes = [int((window[:, 1] - window[:, 0]).sum()) for window in windows]
        return windows, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def _permuted_window(self, lane: int, epoch: int, window: int) -> Int64s:
        pieces = self._windows(lane, epoch)[0][window]
        samples = np.concatenate([np.arange(first, end, dtype=np.int64) for first, end in pieces])
        return self._random(_SAMPLE_ORDER, lane, epoch, window).permutation(samples)

    def _lane_start(self, lane: int) -> int:
        return lane * self.num_samples // self._lanes

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, *purpose])))


@dataclass(frozen=True, slots=True)
class ShardTable:
    """What is known of a shard's samples without opening its tar, in tar order."""

    keys: npt.NDArray[np.bytes_]  # [num_samples] of 32 hexadecimal digits
    offset_bytes: Int64s  # where each picture's bytes start in the tar
    size_bytes: Int64s
    image_id: Int64s  # equal where the stored pictures are equal
    token_ids: npt.NDArray[np.int32]  # all captions' ids one after the other, without padding
    token_starts: Int64s  # [num_samples + 1]
    mentioned: Bools | None  # [num_samples, O]: objects that captions name, where statements ask for them


def sidecar_path(tar_path: str) -> str:
    """The Parquet file beside a tar."""
    return tar_path.removesuffix(".tar") + ".parquet"


def check_shards(shards: Sequence[Shard]) -> None:
    """Raise InputError for a tar or sidecar that is missing, and a tar of another length than was written.

    Nothing is opened: `cnclip verify` reads the bytes, and every read checks what it reads.
    """
    if not shards:
        raise InputError("no shards to train on: the shards stage kept no sample")
    for shard in shards:
        for path in (sidecar_path(shard.path), shard.path):
            try:
                num_bytes = store.num_bytes(path)
            except FileNotFoundError:
                raise InputError(f"{path}: no such file; run the shards stage again") from None
        if num_bytes != shard.num_bytes:
            raise InputError(
                f"{shard.path}: {num_bytes} bytes, but its manifest says {shard.num_bytes}:"
                " the tar is cut or was changed; run the shards stage again"
            )


def read_shard_table(
    shard: Shard,
    tokenizer: TextEncoder,
    *,
    caption_column: str,
    context_length: int,
    token_folder: str,
    statements: Statements | None = None,
) -> ShardTable:
    """Read a shard's sidecar; the token ids come from `token_folder` or are made and kept there.

    InputError names the sidecar that is missing, truncated, lacks a column or does not fit its tar.
    """
    path = sidecar_path(shard.path)
    columns = ["key", "offset_bytes", "size_bytes", "image_sha256", caption_column]
    table = _read_sidecar(path, columns)
    if table.num_rows != shard.num_samples:
        raise InputError(f"{path}: {table.num_rows} rows, but its manifest says {shard.num_samples} samples")
    for column in columns:
        if table[column].null_count:
            raise InputError(f"{path}: column {column} has {table[column].null_count} empty rows")
    if not pc.all(pc.match_substring_regex(table["key"], "^[0-9a-f]{32}$")).as_py():
        raise InputError(f"{path}: column key: expected 32 hexadecimal digits in every row")
    offset_bytes, size_bytes = (_int64s(table[name]) for name in ("offset_bytes", "size_bytes"))
    if (
        np.any(offset_bytes < 0)
        or np.any(size_bytes <= 0)
        or np.any(offset_bytes + size_bytes > shard.num_bytes)
    ):
        row = int(
            np.argmax((offset_bytes < 0) | (size_bytes <= 0) | (offset_bytes + size_bytes > shard.num_bytes))
        )
        raise InputError(f"{path}: row {row}: the picture lies outside the tar of {shard.num_bytes} bytes")
    captions: list[str] = table[caption_column].to_pylist()
    token_ids, token_starts = _cached_tokens(path, captions, tokenizer, context_length, token_folder)
    return ShardTable(
        keys=np.array(table["key"].to_pylist(), dtype="S32"),
        offset_bytes=offset_bytes,
        size_bytes=size_bytes,
        image_id=np.array([_image_id(sha) for sha in table["image_sha256"].to_pylist()], dtype=np.int64),
        token_ids=token_ids,
        token_starts=token_starts,
        mentioned=None if statements is None else statements.mentions(captions),
    )


def _read_sidecar(path: str, columns: list[str]) -> pa.Table:
    try:
        with store.open_read(path) as file:
            found = pq.ParquetFile(file)
            missing = [column for column in columns if column not in found.schema_arrow.names]
            if missing:
                names = ", ".join(found.schema_arrow.names)
                raise InputError(f"{path}: no column {', '.join(missing)}; columns found: {names}")
            return found.read(columns=list(dict.fromkeys(columns)))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file: every tar needs its sidecar; run the shards stage again"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a whole Parquet file ({error}); run the shards stage again".replace("\n", " ")
        ) from None


def _cached_tokens(
    sidecar: str, captions: list[str], tokenizer: TextEncoder, context_length: int, token_folder: str
) -> tuple[npt.NDArray[np.int32], Int64s]:
    # The name holds all that the ids depend on, so that a file that is there is right and never stale.
    digest = blake2b(f"{tokenizer.digest} {context_length} ".encode(), digest_size=16)
    for caption in captions:
        digest.update(blake2b(caption.encode(), digest_size=16).digest())
    path = store.join(token_folder, f"{digest.hexdigest()}.npz")
    if store.exists(path):
        try:
            with store.open_read(path) as file, np.load(file, allow_pickle=False) as arrays:
                return arrays["token_ids"], arrays["token_starts"]
        except Exception as error:  # damaged bytes surface as whatever zipfile and numpy trip over
            say(f"{path}: cannot be read ({error}): token ids are made again")
    tokens_NL = tokenizer.encode(captions, context_length)
    full = [caption for caption, last in zip(captions, tokens_NL[:, -1], strict=True) if last]
    if full and (num_cut := tokenizer.num_truncated(full, context_length)):
        say(f"{sidecar}: {num_cut} of {len(captions)} captions cut to {context_length} tokens")
    is_token = tokens_NL != 0
    token_ids = tokens_NL[is_token]
    token_starts = np.concatenate([[0], np.cumsum(is_token.sum(axis=1), dtype=np.int64)])
    with store.publish(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, token_ids=token_ids, token_starts=token_starts)
    return token_ids, token_starts


def _image_id(image_sha256: str) -> int:
    return int(image_sha256[:15], 16)  # 60 bits: what an int64 holds of the digest


def _int64s(column: pa.ChunkedArray) -> Int64s:
    return np.asarray(column.to_numpy(), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a global batch."""

    step: int
    keys: npt.NDArray[np.bytes_]  # [B]
    # uint8 RGB [B, C, H, W], channels last in memory, not normalised; or cached float16 features [B, D]
    image: torch.Tensor
    tokens_BL: torch.Tensor  # int64, 0 = padding, as long as this batch's longest caption
    image_id_B: torch.Tensor  # int64, equal for equal pictures
    caption_id_B: torch.Tensor  # int64, equal for captions of equal tokens
    kept_BP: torch.Tensor | None = None  # int64, patches to compute on; unset: all (training.data.patch_mask)
    questions: Questions | None = None  # true and false statements (training.data.statements)


class BatchReader:
    """Reads, decodes and augments one rank's part of any step."""

    def __init__(
        self,
        shards: Sequence[Shard],
        order: SampleOrder,
        tokenizer: TextEncoder,
        *,
        lanes: range,
        image_size_px: int,
        augment_config: AugmentConfig,
        caption_column: str,
        context_length: int,
        token_folder: str,
        seed: int,
        threads: int,
        patch_mask: PatchMask | None = None,
        statements: Statements | None = None,
    ) -> None:
        self._shards, self._order, self._lanes = shards, order, lanes
        self._image_size_px, self._augment_config, self._seed = image_size_px, augment_config, seed
        self._threads = threads
        self.features: FeatureCache | None = None  # where set, batches have these instead of pictures
        self._patch_mask, self._statements = patch_mask, statements
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        # As many as a rank's lanes have open at once, and the next of each.
        open_shards = len(lanes) * (order.window_shards + 1) + 1
        self._table = functools.lru_cache(maxsize=open_shards)(
            lambda shard: read_shard_table(
                shards[shard],
                tokenizer,
                caption_column=caption_column,
                context_length=context_length,
                token_folder=token_folder,
                statements=statements,
            )
        )
        self._tar = functools.lru_cache(maxsize=open_shards)(lambda shard: _Tar(shards[shard].path))

    def read(self, step: int) -> Batch:
        """The rank's part of a step; InputError names the tar and key of a picture that cannot be read."""
        index, epoch = self._order.batch(step, self._lanes)
        shard = np.searchsorted(self._order.shard_starts, index, side="right") - 1
        row = index - self._order.shard_starts[shard]
        tables = {int(s): self._table(int(s)) for s in np.unique(shard)}
        places = list(zip(shard.tolist(), row.tolist(), epoch.tolist(), strict=True))
        if self.features is not None:
            image = torch.from_numpy(np.stack([self.features.read(*place) for place in places]))
        else:
            image = torch.from_numpy(self.pictures(places)).permute(0, 3, 1, 2)

        tokens = [tables[s].token_ids[slice(*tables[s].token_starts[r : r + 2])] for s, r, _ in places]
        tokens_BL = np.zeros((len(tokens), max(map(len, tokens))), dtype=np.int64)
        for i, ids in enumerate(tokens):
            tokens_BL[i, : len(ids)] = ids
        caption_id = [int.from_bytes(blake2b(ids.tobytes(), digest_size=7).digest()) for ids in tokens]
        keys = np.array([tables[s].keys[r] for s, r, _ in places])
        questions = None
        if self._statements is not None:
            mentioned = [rows[r] for s, r, _ in places if (rows := tables[s].mentioned) is not None]
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

    def pictures(self, places: list[tuple[int, int, int]]) -> Pixels:
        """Augmented views, uint8 [B, H, W, 3], of samples named by (shard, row, epoch)."""
        image_BHWC = np.empty((len(places), self._image_size_px, self._image_size_px, 3), dtype=np.uint8)

        def fill(part: range) -> None:
            for i in part:
                s, r, e = places[i]
                image_BHWC[i] = self._view(s, self._table(s), r, e)

        if self._pool is None:
            fill(range(len(places)))
        else:
            list(self._pool.map(fill, [range(i, len(places), self._threads) for i in range(self._threads)]))
        return image_BHWC

    def _view(self, shard: int, table: ShardTable, row: int, epoch: int) -> Pixels:
        key = bytes(table.keys[row])
        data = self._tar(shard).read(int(table.offset_bytes[row]), int(table.size_bytes[row]))
        # Hashing costs a tenth of decoding, and a damaged JPEG often still decodes, to another picture.
        is_intact = _image_id(sha256(data).hexdigest()) == table.image_id[row]
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB) if is_intact else None
        if image is None:
            raise InputError(
                f"{self._shards[shard].path}: {key.decode()}.jpg is not the picture whose digest its sidecar"
                " holds: the tar is damaged or not its sidecar's; run the shards stage again"
            )
        random = sample_generator(self._seed, epoch, key)
        return augment(np.asarray(image, dtype=np.uint8), self._image_size_px, self._augment_config, random)


class _Tar:
    """Byte ranges of a tar, safe to read from several threads."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0) if store.is_local(path) else None  # noqa: SIM115
        self._fs: Any = None
        if self._file is None:
            self._fs, self._name = fsspec.core.url_to_fs(path)

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        if self._file is not None:
            return os.pread(self._file.fileno(), size_bytes, offset_bytes)
        data: bytes = self._fs.cat_file(self._name, start=offset_bytes, end=offset_bytes + size_bytes)
        return data

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


class Prefetcher:
    """Batches of steps [first, end) in order, read ahead by a thread; raises what reading raised."""

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
