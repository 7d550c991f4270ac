"""A bounded part of the shards of an object store on the local disk, read ahead by window.

A rank's order of samples is known to the last step, so this is no cache that guesses: each lane's current
window and the next one are there. What is left of the room keeps finished pieces for the next epoch.
docs/guides/cluster.md, "Training from an object store", says how large it has to be.
"""

import collections
import contextlib
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.config import digest
from pipeline.core.records import ConfigError, InputError, Shard
from training.data.sampler import SampleOrder, Window
from training.data.views import piece_path

_THREADS = 8  # of a rank, each with a request under way
_REQUEST_BYTES = 16 << 20
_PIECE_FILE = re.compile(r"\d{8}")
_WAITS_SECONDS = (1, 2, 4, 8, 16, 32)  # between tries: an outage of a minute does not end a training
_ABANDONED_SECONDS = 24 * 3600  # a machine's folder that has not been marked as in use for that long
_MARK_SECONDS = 600

# (shard, first row, end row) → where in the tar the images of these rows begin and end
ByteRange = Callable[[int, int, int], tuple[int, int]]


class _Bytes(dict[int, int]):
    """The sizes of pieces, with their sum."""

    total = 0

    def __setitem__(self, piece: int, num_bytes: int) -> None:
        self.total += num_bytes - self.get(piece, 0)
        super().__setitem__(piece, num_bytes)

    def drop(self, piece: int) -> None:
        """Forget a piece, if it is there."""
        self.total -= self.pop(piece, 0)


@dataclass(slots=True)
class _Lane:
    windows: Iterator[Window]
    coming: Window | None  # the next one to plan; None after the last
    planned: collections.deque[Window] = field(default_factory=collections.deque)  # not finished yet


class ShardCache(contextlib.AbstractContextManager["ShardCache"]):
    """The pieces of a rank's lanes in a folder of files, each with a range of a tar's bytes.

    What an earlier start left in the folder counts if it has the right length; every image is compared with
    its digest when it is read (`training.data.views`).
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        order: SampleOrder,
        lanes: range,
        folder: str,
        *,
        size_gb: float,
        ranks_here: int,
        byte_range: ByteRange,
        steps: range,
        in_use: str | None = None,
    ) -> None:
        """Begin to fetch what `steps` need, into a folder that only this rank uses.

        `size_gb` is the size of the caches of all `ranks_here`, the ranks on this machine. `in_use` is a
        folder whose time of change tells other machines that it is in use.

        Raises:
            ConfigError: if two windows of each lane do not fit into it.
            InputError: if the disk has no room for them.
        """
        self.folder = os.path.join(
            folder, digest([shard.digest for shard in shards], order.piece_starts.tolist())[:16]
        )
        self._shards, self._order, self._byte_range = shards, order, byte_range
        self._max_bytes = int(1e9 * size_gb / ranks_here)
        self._in_use, self._marked = in_use, time.monotonic()
        self._condition = threading.Condition()
        self._error: Exception | None = None
        self._closed = threading.Event()
        self._done_step = steps.start - 1
        of_lanes = [order.windows(lane, steps.start, steps.stop) for lane in lanes]
        self._lanes = [_Lane(windows, next(windows, None)) for windows in of_lanes]
        self._uses = collections.Counter[int]()  # by planned windows
        self._bytes = _Bytes()  # of pieces on the disk or under way
        self._idle = _Bytes()  # of those that no planned window uses, the last finished last
        self._ready, self._under_way = set[int](), set[int]()
        self._start_bytes = dict[int, int]()
        own = [piece for lane in lanes for piece in order.lane_pieces(lane)]
        self._find_earlier(folder, set(own))
        self._refuse_too_small(lanes, own, size_gb, ranks_here)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
        with self._condition:
            self._plan()

    def wait(self, step: int) -> None:
        """Wait until all bytes of a step's images are on the disk.

        Raises:
            InputError: if they cannot be had, or the cache is closed.
        """
        with self._condition:
            while not (self._error or self._closed.is_set() or self._has(step)):
                self._condition.wait()
            if self._error is not None:
                raise self._error
            if self._closed.is_set():
                raise InputError(f"{self.folder}: the cache of shards is closed")

    def done(self, step: int) -> None:
        """Note that the images of the steps up to this one are decoded."""
        with self._condition:
            self._done_step = max(self._done_step, step)
            if not self._closed.is_set():
                self._plan()
        if self._in_use is not None and time.monotonic() - self._marked > _MARK_SECONDS:
            os.utime(self._in_use)
            self._marked = time.monotonic()

    def places(self, shard: int, row: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the pieces of rows of a shard, and where in the tar these begin."""
        starts = self._order.piece_starts
        piece = np.searchsorted(starts, self._order.shard_starts[shard] + row, side="right") - 1
        found, place = np.unique(piece, return_inverse=True)
        with self._condition:
            return piece, np.array([self._start_bytes[int(each)] for each in found], np.int64)[place]

    def close(self) -> None:
        """Stop fetching, and let those who wait fail; what is on the disk stays for the next start."""
        with self._condition:
            self._closed.set()
            self._condition.notify_all()
        self._pool.shutdown(cancel_futures=True)

    def remove(self) -> None:
        """Remove the files."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(self, *error: object) -> None:
        self.close()

    def _find_earlier(self, folder: str, own: set[int]) -> None:
        os.makedirs(self.folder, exist_ok=True)
        for entry in os.scandir(folder):
            if entry.path != self.folder:  # of other shards or lanes
                shutil.rmtree(entry.path, ignore_errors=True)
        for entry in os.scandir(self.folder):
            if _PIECE_FILE.fullmatch(entry.name) and int(entry.name) in own:
                self._bytes[int(entry.name)] = self._idle[int(entry.name)] = entry.stat().st_size
            else:
                os.remove(entry.path)

    def _refuse_too_small(self, lanes: range, own: Sequence[int], size_gb: float, ranks_here: int) -> None:
        needed = 0
        for lane in lanes:
            sizes = sorted(map(self._expected_bytes, self._order.lane_pieces(lane)), reverse=True)
            needed += sum(sizes[: 2 * self._order.window_shards])
            # A window of fewer samples than a step takes may lie between the two.
            needed += int(
                sum(sizes) * self._order.samples_per_lane * self._order.num_lanes / self._order.num_samples
            )
        if needed > self._max_bytes:
            raise ConfigError(
                f"cache_gb = {size_gb:g}: too small: two windows of each of {len(lanes)} lanes have"
                f" {needed / 1e9:.4g} GB, those of {ranks_here} ranks on this machine"
                f" {needed * ranks_here / 1e9:.4g} GB: raise cache_gb to that, or set fewer lanes"
            )
        most = min(self._max_bytes, sum(map(self._expected_bytes, own)))
        free = shutil.disk_usage(self.folder).free + self._bytes.total
        if free < most:
            raise InputError(
                f"{self.folder}: {free / 1e9:.3g} GB free, but this rank's shards may take"
                f" {most / 1e9:.3g} GB: make room, set cache_folder to another disk, or lower cache_gb"
            )

    def _has(self, step: int) -> bool:
        """Return whether all windows of a step are planned and on the disk."""
        for lane in self._lanes:
            for window in lane.planned:
                if window.first_step <= step and not self._ready.issuperset(window.pieces):
                    return False
            if lane.planned and lane.planned[-1].last_step < step:
                return False  # it is planned once an earlier one is done
        return True

    def _plan(self) -> None:
        """Release the windows that are done, and have those fetched that come next."""
        for lane in self._lanes:
            while lane.planned and lane.planned[0].last_step <= self._done_step:
                for piece in lane.planned.popleft().pieces:
                    self._uses[piece] -= 1
                    if not self._uses[piece] and piece in self._bytes:
                        self._idle[piece] = self._bytes[piece]
        next_step, new = self._done_step + 1, list[Window]()
        for lane in self._lanes:
            while lane.coming is not None and lane.coming.first_step <= next_step:
                new.append(self._take(lane, lane.coming))
        for lane in self._lanes:
            if lane.coming is None or (lane.planned and lane.planned[-1].first_step > next_step):
                continue  # one window is read ahead already
            missing = sum(map(self._expected_bytes, set(lane.coming.pieces) - self._bytes.keys()))
            idle = sum(self._idle.get(piece, 0) for piece in lane.coming.pieces)
            if self._bytes.total - self._idle.total + idle + missing <= self._max_bytes:
                new.append(self._take(lane, lane.coming))
        for window in sorted(new, key=lambda window: window.first_step):
            for piece in window.pieces:
                if piece not in self._ready and piece not in self._under_way:
                    self._under_way.add(piece)
                    self._pool.submit(self._fetch, piece)
        self._condition.notify_all()

    def _take(self, lane: _Lane, window: Window) -> Window:
        """Plan the next window of a lane, with room for its pieces."""
        lane.planned.append(window)
        lane.coming = next(lane.windows, None)
        for piece in window.pieces:
            self._uses[piece] += 1
            self._idle.drop(piece)
        for piece in window.pieces:
            if piece not in self._bytes:
                self._make_room(self._expected_bytes(piece))
                self._bytes[piece] = self._expected_bytes(piece)
        return window

    def _make_room(self, num_bytes: int) -> None:
        """Remove finished pieces, the last finished first: their next turn is the furthest away."""
        while self._idle and self._bytes.total + num_bytes > self._max_bytes:
            piece = next(reversed(self._idle))
            self._idle.drop(piece)
            self._bytes.drop(piece)
            self._ready.discard(piece)
            with contextlib.suppress(FileNotFoundError):
                os.remove(piece_path(self.folder, piece))

    def _fetch(self, piece: int) -> None:
        if self._error is not None or self._closed.is_set():
            return
        try:
            start, stop, sha = self._range(piece)
            path = piece_path(self.folder, piece)
            if not (os.path.exists(path) and os.path.getsize(path) == stop - start):
                self._download(piece, path, start, stop, sha)
        except Exception as error:
            with self._condition:
                self._error = self._error or error
                self._condition.notify_all()
            return
        with self._condition:
            self._start_bytes[piece], self._bytes[piece] = start, stop - start
            self._under_way.discard(piece)
            self._ready.add(piece)
            self._condition.notify_all()

    def _download(self, piece: int, path: str, start: int, stop: int, sha: str | None) -> None:
        """Copy a range of a tar to a file, which appears whole or not at all.

        Raises:
            InputError: if the tar is gone or has other bytes than were written, or the disk is full.
        """
        url, found = self._shards[self._place(piece)[0]].path, sha256()
        partial = f"{path}.partial"
        try:
            with open(partial, "wb") as file:
                for at in range(start, stop, _REQUEST_BYTES):
                    data = self._request(url, at, min(at + _REQUEST_BYTES, stop))
                    file.write(data)
                    found.update(data)
            if sha is not None and found.hexdigest() != sha:
                raise InputError(
                    f"{url}: other bytes than the shards stage wrote (its sha256 differs): the object was"
                    " changed; run the shards stage again"
                )
            os.replace(partial, path)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}): make room, set cache_folder to another disk,"
                " or lower cache_gb; then rerun the same command to resume"
            ) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)

    def _request(self, url: str, start: int, stop: int) -> bytes:
        fs, name = store.remote(url)
        for wait_seconds in (*_WAITS_SECONDS, None):
            try:
                data = bytes(fs.cat_file(name, start=start, end=stop))
            except FileNotFoundError:
                raise InputError(
                    f"{url}: no such object: it was removed after training began; restore it, or run the"
                    " shards stage again, and rerun the same command to resume"
                ) from None
            except PermissionError as error:
                raise InputError(f"{url}: may not be read ({error}): check the credentials") from None
            except (OSError, ConfigError) as error:
                problem = str(error)
            else:
                if len(data) == stop - start:
                    return data
                problem = (
                    f"bytes {start} to {stop - 1}: {len(data)} of {stop - start}: the object was cut short"
                )
            if wait_seconds is None or self._closed.is_set():
                break
            self._closed.wait(wait_seconds)
        raise InputError(f"{url}: cannot be read: {problem}; rerun the same command to resume")

    def _place(self, piece: int) -> tuple[int, int, int]:
        """Return the shard, the first row and the end row of a piece."""
        first, end = self._order.piece_starts[piece : piece + 2].tolist()
        shard = int(np.searchsorted(self._order.shard_starts, first, side="right")) - 1
        shard_start = int(self._order.shard_starts[shard])
        return shard, first - shard_start, end - shard_start

    def _range(self, piece: int) -> tuple[int, int, str | None]:
        """Return which bytes of a tar a piece has, and their sha256 if it is known: that of a whole tar."""
        shard, first, end = self._place(piece)
        found = self._shards[shard]
        start, stop = self._byte_range(shard, first, end)  # it also reads the sidecar, which batches need
        is_whole = end - first == found.num_samples
        return (0, found.num_bytes, found.digest) if is_whole else (start, stop, None)

    def _expected_bytes(self, piece: int) -> int:
        """Return the size of a piece: of one that is not a whole shard by its share of the samples."""
        shard, first, end = self._place(piece)
        found = self._shards[shard]
        return -(-found.num_bytes * (end - first) // found.num_samples)


def cache_of_rank(
    shards: Sequence[Shard],
    order: SampleOrder,
    lanes: range,
    folder: str,
    *,
    size_gb: float,
    byte_range: ByteRange,
    steps: range,
) -> ShardCache | None:
    """Return the cache of this rank below a stage's folder; None if no shard is in an object store.

    Machines that share the folder have one each in it, and each keeps `size_gb`. Its ranks have a folder each
    and equal parts. Folders of ranks that an earlier start had more of are removed, and those of machines
    that have not used theirs for a day.

    Raises:
        ConfigError: if it is too small, or the number of ranks on this machine is not known.
        InputError: if the disk is.
    """
    if all(store.is_local(shard.path) for shard in shards):
        return None
    here, num_ranks = int(os.environ["LOCAL_RANK"]), ranks_here()
    root = os.path.join(folder, "shard_cache")
    machine = os.path.join(root, socket.gethostname())
    os.makedirs(machine, exist_ok=True)
    if here == 0:
        os.utime(machine)
        for entry in os.scandir(root):
            with contextlib.suppress(FileNotFoundError):  # another machine removes it, too
                if entry.path != machine and time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(entry.path, ignore_errors=True)
        for name in set(os.listdir(machine)) - {str(number) for number in range(num_ranks)}:
            shutil.rmtree(os.path.join(machine, name), ignore_errors=True)
    return ShardCache(
        shards,
        order,
        lanes,
        os.path.join(machine, str(here)),
        size_gb=size_gb,
        ranks_here=num_ranks,
        byte_range=byte_range,
        steps=steps,
        in_use=machine,
    )


def ranks_here() -> int:
    """Return the number of ranks on this machine, from the environment that their launcher gives them.

    Raises:
        ConfigError: if none does.
    """
    # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher the other.
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if (text := os.environ.get(name)) is not None:
            if text.isdecimal() and int(text) > 0:
                return int(text)
            raise ConfigError(f"{name} = {text!r}: set it to the number of ranks on this machine")
    if os.environ["WORLD_SIZE"] == "1":
        return 1
    raise ConfigError(
        f"no LOCAL_WORLD_SIZE in the environment of one of {os.environ['WORLD_SIZE']} ranks: those of a"
        " machine share cache_gb, so set it to their number, as torchrun, deepspeed and `cnclip launch` do"
    )
