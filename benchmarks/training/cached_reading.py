"""Measure how fast stage 1 reads cached features with their captions: ours against a loop over samples.

    python benchmarks/training/cached_reading.py           # 65,536 samples with 512 values each, batch 4,096
    python benchmarks/training/cached_reading.py --full    # more steps

Ours is what a rank's thread does for each step: the order of samples, tables of shards, captions as token
ids, and features with their CRCs. The peer does the same work a sample at a time on what the tables hold,
with a CRC for each feature. Captions have lengths like Flickr30K-CN's. Times are CPU seconds of one thread.

`equal` says that both give the same batches.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hashlib
import tempfile
import time
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.harness import line, parse, parser, record, report
from benchmarks.training.step_models import LENGTHS
from pipeline.core.arrays import Float16Array, Int64Array
from pipeline.core.records import Shard
from training.data.feature_cache import FeatureCache
from training.data.loader import Batch, BatchReader, CaptionConfig
from training.data.sampler import SampleOrder
from training.data.shard_table import ShardTable, read_shard_table
from training.model.tokenizer import Tokenizer

NUM_SHARDS, SAMPLES, VIEWS, DIM = 8, 8192, 2, 512
BATCH, LANES, WINDOW = 4096, 2, 1  # so that fewer tables stay open than there are shards
CHARACTERS = "的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会"
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS)


def main() -> int:
    options = parse(parser(__doc__, full="more steps", rounds=(16, 64)))
    torch.set_num_threads(1)
    tokenizer = Tokenizer(VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        shards = [write_shard(Path(folder), number) for number in range(NUM_SHARDS)]
        cache = FeatureCache(shards, "benchmark", num_views=VIEWS, dim=DIM)
        features = [write_features(cache, shard) for shard in range(NUM_SHARDS)]
        order = SampleOrder(
            [SAMPLES] * NUM_SHARDS, seed=0, global_batch=BATCH, lanes=LANES, window_shards=WINDOW
        )
        captions = CaptionConfig(
            weights={"caption": 1.0}, context_length=52, token_folder=str(Path(folder) / "tokens"), seed=0
        )
        reader = BatchReader(shards, order, tokenizer, captions, lanes=range(LANES))
        reader.features = cache
        loop = Loop(order, features, [table_of(shard, tokenizer, captions) for shard in shards])
        equal = all(same(batch_of(reader, step), loop.batch(step)) for step in range(3))
        ours = timed(lambda step: batch_of(reader, step), options.rounds)
        peer = timed(loop.batch, options.rounds)
    found = record(
        "cached_reading",
        ours=BATCH / ours,
        peer=BATCH / peer,
        unit="samples/CPU s",
        equal=equal,
        bytes_a_sample=2 * DIM,
        batch=BATCH,
    )
    print(line(found))
    return report(found)


def timed(batch: Any, rounds: int) -> float:
    """Return the CPU seconds of a batch."""
    batch(0)
    start = time.process_time()
    for step in range(3, 3 + rounds):
        batch(step)
    return (time.process_time() - start) / rounds


def write_shard(folder: Path, number: int) -> Shard:
    """Write a sidecar; nobody reads its tar."""
    random = np.random.default_rng(number)
    letters = random.choice(list(CHARACTERS), (SAMPLES, max(LENGTHS)))
    texts = ["".join(row[: LENGTHS[place % len(LENGTHS)]]) for place, row in enumerate(letters)]
    keys = [hashlib.sha256(f"{number}/{row}".encode()).hexdigest() for row in range(SAMPLES)]
    table = {
        "key": [key[:32] for key in keys],
        "caption": texts,
        "image_sha256": keys,
        "offset_bytes": np.zeros(SAMPLES, np.int64),
        "size_bytes": np.ones(SAMPLES, np.int64),
    }
    path = folder / f"{number:05d}.tar"
    pq.write_table(pa.table(table), path.with_suffix(".parquet"))
    return Shard(str(path), SAMPLES, 1, hashlib.sha256(str(path).encode()).hexdigest())


def write_features(cache: FeatureCache, shard: int) -> Float16Array:
    """Write features of a shard and return them, [views, samples, values]."""
    random = np.random.default_rng(shard)
    feature_KND = random.standard_normal((VIEWS, SAMPLES, DIM), np.float32).astype(np.float16)
    cache.write(shard, feature_KND)
    return feature_KND


def table_of(shard: Shard, tokenizer: Tokenizer, captions: CaptionConfig) -> ShardTable:
    return read_shard_table(
        shard,
        tokenizer,
        caption_weights=captions.weights,
        context_length=captions.context_length,
        token_folder=captions.token_folder,
    )


def batch_of(reader: BatchReader, step: int) -> Batch:
    request = reader.request(step)
    assert request.ready is not None
    return request.finish(torch.from_numpy(request.ready))


class Loop:
    """The same batches, a sample at a time."""

    def __init__(self, order: SampleOrder, features: list[Float16Array], tables: list[ShardTable]) -> None:
        self._order, self._features, self._tables = order, features, tables
        self._crcs = [
            np.array([[zlib.crc32(row) for row in view] for view in feature_KND]) for feature_KND in features
        ]

    def batch(self, step: int) -> Batch:
        """Return a step's batch."""
        index, epoch = self._order.batch(step, range(LANES))
        shard: Int64Array = np.searchsorted(self._order.shard_starts, index, side="right") - 1
        row = index - self._order.shard_starts[shard]
        places = list(zip(shard.tolist(), row.tolist(), epoch.tolist(), strict=True))
        tokens = [self._tokens(s, r) for s, r, _ in places]
        tokens_BL = np.zeros((len(tokens), max(map(len, tokens))), dtype=np.int64)
        for i, ids in enumerate(tokens):
            tokens_BL[i, : len(ids)] = ids
        caption_id = [
            int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=7).digest()) for ids in tokens
        ]
        return Batch(
            step=step,
            keys=np.array([self._tables[s].keys[r] for s, r, _ in places]),
            image=torch.from_numpy(np.stack([self._feature(*place) for place in places])),
            tokens_BL=torch.from_numpy(tokens_BL),
            image_id_B=torch.tensor([int(self._tables[s].image_id[r]) for s, r, _ in places]),
            caption_id_B=torch.tensor(caption_id),
        )

    def _tokens(self, shard: int, row: int) -> npt.NDArray[np.int32]:
        table = self._tables[shard]
        caption = int(table.caption_starts[0, row])
        return table.token_ids[slice(*table.token_starts[caption : caption + 2])]

    def _feature(self, shard: int, row: int, epoch: int) -> Float16Array:
        feature_D: Float16Array = self._features[shard][epoch % VIEWS, row]
        assert zlib.crc32(feature_D.tobytes()) == self._crcs[shard][epoch % VIEWS, row]
        return feature_D


def same(ours: Batch, theirs: Batch) -> bool:
    """Return true if two batches are alike; ids of captions are whatever tells them apart."""
    numbers = [np.unique(batch.caption_id_B.numpy(), return_inverse=True)[1] for batch in (ours, theirs)]
    first = [np.unique(ids, return_index=True)[1][ids] for ids in numbers]
    return (
        ours.keys.tolist() == theirs.keys.tolist()
        and all(
            torch.equal(getattr(ours, name), getattr(theirs, name))
            for name in ("image", "tokens_BL", "image_id_B")
        )
        and np.array_equal(*first)
    )


if __name__ == "__main__":
    sys.exit(main())
