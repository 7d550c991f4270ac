"""Which samples a step sees: a pure function of (seed, step), on any number of ranks.

The corpus is cut into lanes, and a step takes the same number of samples from each.
docs/concepts/determinism.md, "The order of samples", defines lanes and windows.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core.arrays import Int64Array
from pipeline.core.records import ConfigError

_PIECE_ORDER, _SAMPLE_ORDER = 1, 2  # purposes of a draw, so that two of them never share a generator


@dataclass(frozen=True, slots=True)
class Window:
    """A window of a lane, and the steps that take samples of it."""

    first_step: int
    last_step: int
    pieces: tuple[int, ...]  # places in `SampleOrder.piece_starts`


class SampleOrder:
    """Which samples every step sees.

    `shard_num_samples` gives the sequence of samples; a sample's index is its place in it.

    Raises:
        ConfigError: if the batch is not a multiple of the lanes, or larger than the corpus.
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
        self.shard_starts: Int64Array = np.concatenate([[0], np.cumsum(shard_num_samples, dtype=np.int64)])
        self.num_samples = int(self.shard_starts[-1])
        if global_batch % lanes:
            raise ConfigError(f"global_batch = {global_batch} is not a multiple of lanes = {lanes}")
        if global_batch > self.num_samples:
            raise ConfigError(f"global_batch = {global_batch}, but the corpus has {self.num_samples} samples")
        self._seed = seed
        self.num_lanes = lanes
        lane_starts = [self._lane_start(lane) for lane in range(lanes)]
        # Where the pieces begin: the parts of a shard that lie in one lane.
        self.piece_starts: Int64Array = np.unique(np.concatenate([self.shard_starts, lane_starts]))
        self.samples_per_lane = global_batch // lanes
        self.window_shards = window_shards
        # A window serves many steps in a row; two a lane, since a batch may reach from one into the next.
        self._window_samples = functools.lru_cache(maxsize=2 * lanes)(self._permuted_window)
        self._windows = functools.lru_cache(maxsize=2 * lanes)(self._epoch_windows)

    def rank_lanes(self, rank: int, ranks: int) -> range:
        """Return the whole lanes that a rank owns; counts differ by at most one."""
        return range(rank * self.num_lanes // ranks, (rank + 1) * self.num_lanes // ranks)

    def rank_num_samples(self, rank: int, ranks: int) -> int:
        """Return how many samples of every global batch a rank sees."""
        return len(self.rank_lanes(rank, ranks)) * self.samples_per_lane

    def batch(self, step: int, lanes: range) -> tuple[Int64Array, Int64Array]:
        """Return (sample index, lane epoch) of the samples that `step`, from 0, takes of these lanes."""
        parts = [self._lane_batch(step, lane) for lane in lanes]
        return np.concatenate([index for index, _ in parts]), np.concatenate([epoch for _, epoch in parts])

    def lane_pieces(self, lane: int) -> range:
        """Return the pieces of a lane."""
        first, end = np.searchsorted(self.piece_starts, [self._lane_start(lane), self._lane_start(lane + 1)])
        return range(int(first), int(end))

    def windows(self, lane: int, first_step: int, end_step: int) -> Iterator[Window]:
        """Yield the windows of a lane that steps [first, end) take samples of, in their order."""
        lane_size = self._lane_start(lane + 1) - self._lane_start(lane)
        position, end = first_step * self.samples_per_lane, end_step * self.samples_per_lane
        for epoch in range(position // lane_size, -(-end // lane_size)):
            windows, window_starts = self._windows(lane, epoch)
            starts = (epoch * lane_size + window_starts).tolist()
            for pieces, start, stop in zip(windows, starts[:-1], starts[1:], strict=True):
                if stop > position and start < end:
                    yield Window(
                        first_step=max(start, position) // self.samples_per_lane,
                        last_step=(min(stop, end) - 1) // self.samples_per_lane,
                        pieces=tuple(np.searchsorted(self.piece_starts, pieces[:, 0]).tolist()),
                    )

    def _lane_batch(self, step: int, lane: int) -> tuple[Int64Array, Int64Array]:
        lane_size = self._lane_start(lane + 1) - self._lane_start(lane)
        position, end = step * self.samples_per_lane, (step + 1) * self.samples_per_lane
        indices, epochs = [], []
        while position < end:
            epoch, within = divmod(position, lane_size)
            count = min(end - position, lane_size - within)
            indices.append(self._epoch_range(lane, epoch, within, within + count))
            epochs.append(np.full(count, epoch, dtype=np.int64))
            position += count
        return np.concatenate(indices), np.concatenate(epochs)

    def _epoch_range(self, lane: int, epoch: int, start: int, end: int) -> Int64Array:
        """Return the sample indices at positions [start, end) of one epoch of a lane."""
        _, window_starts = self._windows(lane, epoch)
        first = int(np.searchsorted(window_starts, start, side="right")) - 1
        last = int(np.searchsorted(window_starts, end, side="left"))
        samples = np.concatenate([self._window_samples(lane, epoch, window) for window in range(first, last)])
        return samples[start - window_starts[first] : end - window_starts[first]]

    def _epoch_windows(self, lane: int, epoch: int) -> tuple[list[Int64Array], Int64Array]:
        """Return the windows of an epoch, each as rows (first, end) of its pieces, and where each starts."""
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

    def _permuted_window(self, lane: int, epoch: int, window: int) -> Int64Array:
        pieces = self._windows(lane, epoch)[0][window]
        samples = np.concatenate([np.arange(first, end, dtype=np.int64) for first, end in pieces])
        return self._random(_SAMPLE_ORDER, lane, epoch, window).permutation(samples)

    def _lane_start(self, lane: int) -> int:
        return lane * self.num_samples // self.num_lanes

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, *purpose])))


def by_shard(shard_B: Int64Array) -> Iterator[tuple[int, Int64Array]]:
    """Yield each shard of some samples with the places of those that lie in it."""
    order = np.argsort(shard_B, kind="stable")
    shards, starts = np.unique(shard_B[order], return_index=True)
    return zip(shards.tolist(), np.split(order, starts[1:]), strict=True)
