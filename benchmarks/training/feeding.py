"""Measure how fast worker processes feed training with images: ours against cn_clip's in torch's DataLoader.

    python benchmarks/training/feeding.py           # with one worker, and with as many as there are cores
    python benchmarks/training/feeding.py --full    # more batches

Ours is the path of training itself: shards, worker processes, their ring of shared memory, and the copy that
the step gets. The peer decodes the same images by PIL and changes them by CN-CLIP's `create_transform`, in as
many workers of a DataLoader. Both are measured between two batches when all workers are busy, in images for
each CPU second of all processes, so that other work on the machine does not count; `images_per_s` is by the
clock. `scaling` is how much of one worker's rate each of several keeps, and `scaling_by_clock` the same by
the clock, which wants a machine without other work.

`equal` says that every number of workers gives the bytes that this process computes without them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import base64
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import line, parse, parser, record, report
from benchmarks.peers import cn_clip_transform, open_as_cn_clip
from benchmarks.training.image_path import NUM_IMAGES, SIZE_PX, Source, draw_jpegs, make_source, read
from training.data.feeder import Feeder
from training.data.image_workers import ImageWorkers

WARM_UP = 5  # batches: more than are read ahead
STEPS = 10**6  # never reached


@dataclass(frozen=True, slots=True)
class Rate:
    """Images of a second."""

    by_cpu: float  # of all processes together
    of_workers: float  # by the CPU seconds of the workers only
    by_clock: float


def main() -> int:
    options = parse(parser(__doc__, full="more batches", rounds=(6, 40)))
    torch.set_num_threads(1)
    numbers = sorted({1, len(os.sched_getaffinity(0))})
    jpegs = draw_jpegs()
    results, alone = [], None
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(Path(folder), jpegs)
        expected = read(source, 1)
        for number in numbers:
            ours, image = fed(source, number, options.rounds)
            peer = by_data_loader(jpegs, number, options.rounds)
            alone = alone or ours
            found = record(
                f"feeding@{number} worker{'s' * (number > 1)}",
                ours=ours.by_cpu,
                peer=peer.by_cpu,
                unit="images/CPU s",
                equal=image.equal(expected),
                images_per_worker_cpu_s=round(ours.of_workers),
                images_per_s={"ours": round(ours.by_clock), "peer": round(peer.by_clock)},
                scaling=round(ours.of_workers / alone.of_workers, 3),
                scaling_by_clock=round(ours.by_clock / alone.by_clock / number, 3),
            )
            results.append(found)
            print(
                f"{line(found)}; {ours.of_workers:.0f} images a worker's CPU s, {ours.by_clock:.0f} images/s"
                f" by the clock (peer {peer.by_clock:.0f})"
            )
    return report(results)


def fed(source: Source, workers: int, batches: int, device: str = "cpu") -> tuple[Rate, torch.Tensor]:
    """Return the rate of the trainer's feeder, and the images of step 1."""
    decoding = ImageWorkers(workers, source.views, most_images=len(source.jpegs), pinned=device != "cpu")
    with Feeder(source.reader.requests(0, STEPS), decoding, device) as feeder:
        images = (batch.image for batch in feeder)
        next(images)
        second = next(images)
        return rate(images, len(source.jpegs), batches, decoding.processes), second.cpu()


def by_data_loader(jpegs: Sequence[bytes], workers: int, batches: int) -> Rate:
    """Return the rate of a DataLoader with cn_clip's transforms."""
    images = _AsCnClip(jpegs)
    loader = DataLoader(
        images, batch_size=NUM_IMAGES, sampler=itertools.islice(itertools.cycle(range(NUM_IMAGES)), STEPS),
        num_workers=workers,
    )  # fmt: skip
    running = iter(loader)
    pids = [process.pid for process in psutil.Process().children()]
    found = rate(running, NUM_IMAGES, batches, pids)
    del running  # ends its workers
    return found


def rate(batches: Iterator[Any], num_images: int, number: int, workers: Sequence[int]) -> Rate:
    """Take batches, and return how many images a second come when all workers are busy."""
    for _ in range(WARM_UP):
        next(batches)
    before, start = _cpu_seconds(workers), time.perf_counter()
    own = time.process_time()
    for _ in range(number):
        next(batches)
    taken, wall = _cpu_seconds(workers) - before, time.perf_counter() - start
    own, num_images = time.process_time() - own, number * num_images
    return Rate(num_images / (taken + own), num_images / taken, num_images / wall)


def _cpu_seconds(pids: Sequence[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(one.user + one.system for one in times))


class _AsCnClip(Dataset[torch.Tensor]):
    """What CN-CLIP's data set does with an image."""

    def __init__(self, jpegs: Sequence[bytes]) -> None:
        self._texts = [base64.urlsafe_b64encode(jpeg).decode() for jpeg in jpegs]
        self._transform = cn_clip_transform(SIZE_PX)

    def __getitem__(self, number: int) -> torch.Tensor:
        found: torch.Tensor = self._transform(open_as_cn_clip(self._texts[number]))
        return found


if __name__ == "__main__":
    sys.exit(main())
