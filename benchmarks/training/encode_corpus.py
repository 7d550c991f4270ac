"""Measure encoding a shard's images: decoded by worker processes meanwhile, against one process in turn.

    python benchmarks/training/encode_corpus.py           # a tower so small that decoding counts
    python benchmarks/training/encode_corpus.py --full    # more rounds

Ours is the path of `embed`, `eval` and `[score]`: workers read and decode into a ring of shared memory, and
the model computes meanwhile. The peer is that path before it had workers: a process reads 64 images, decodes
them with Pillow, normalises them by three passes of arithmetic, and encodes them. Rounds alternate, and the
workers are there before the first. `encode_corpus/cpu` counts the CPU seconds of all processes, which other
work on the machine does not stretch; `encode_corpus/clock` is by the clock, with the best round of each side,
and wants a machine without other work. `equal` says that the features are the same, bit for bit.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn import functional as F

from benchmarks.harness import line, parse, parser, record, report
from benchmarks.training.image_path import SIZE_PX, draw_jpegs, make_source
from pipeline.core.arrays import Float32Array
from pipeline.core.files.images import decode_square
from pipeline.core.shard_format import ByteRanges
from training.data.squares import ImageRange, SquareConfig
from training.image_encoder import ImageEncoder
from training.model.config import VisionTransformerConfig
from training.model.preprocess import MEAN, STD
from training.model.vision import build_image_tower

SMALL = VisionTransformerConfig(image_size_px=SIZE_PX, patch_size_px=32, layers=2, width=64, heads=2)
DIM, BATCH, NUM_IMAGES = 32, 64, 512  # as many as workers are started for


def main() -> int:
    options = parse(parser(__doc__, rounds=(3, 9)))
    torch.manual_seed(0)
    tower = build_image_tower(SMALL, DIM).eval()

    def encode(image_BCHW: torch.Tensor) -> torch.Tensor:
        return F.normalize(tower(image_BCHW).float(), dim=-1)

    ours = ImageEncoder(encode, SquareConfig(image_size_px=SIZE_PX), "cpu", embed_dim=DIM)
    with tempfile.TemporaryDirectory() as folder:
        images = shard_of(Path(folder), NUM_IMAGES)
        sides: dict[str, Callable[[], Float32Array]] = {
            "ours": lambda: features(ours, images, BATCH),
            "peer": lambda: in_turn(encode, images),
        }
        found = {side: run() for side, run in sides.items()}
        taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, run in sides.items():
                taken[side].append(seconds_of(run))
    rates = {
        "clock": {side: NUM_IMAGES / min(clock for clock, _ in times) for side, times in taken.items()},
        "cpu": {
            side: NUM_IMAGES / statistics.median(cpu for _, cpu in times) for side, times in taken.items()
        },
    }
    results = [
        record(
            f"encode_corpus/{kind}",
            ours=rate["ours"],
            peer=rate["peer"],
            unit=unit,
            equal=np.array_equal(found["ours"], found["peer"]),
        )
        for kind, unit, rate in (
            ("clock", "images/s", rates["clock"]),
            ("cpu", "images/CPU s", rates["cpu"]),
        )
    ]
    for one in results:
        print(line(one))
    return report(results)


def shard_of(folder: Path, number: int) -> list[ImageRange]:
    """Write a shard of JPEGs of 256 pixels on the short side, and return so many places in it, in turns."""
    source = make_source(folder, draw_jpegs())
    visits = source.reader.visits(0, range(len(source.jpegs)))
    places = [
        ImageRange(source.views.paths[0], int(visit["offset_bytes"]), int(visit["size_bytes"]), "image")
        for visit in visits
    ]
    return list(itertools.islice(itertools.cycle(places), number))


def features(encoder: ImageEncoder, images: Sequence[ImageRange], batch_size: int) -> Float32Array:
    """Return image_ND as the commands compute it."""
    return np.concatenate([batch.feature_BD for batch in encoder.features(images, batch_size)])


def in_turn(encode: Callable[[torch.Tensor], torch.Tensor], images: Sequence[ImageRange]) -> Float32Array:
    """Return the same by one process that reads, decodes and computes in turn."""
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    found = []
    with ByteRanges(images[0].path) as tar:
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            pixels_BHWC = np.empty((len(some), SIZE_PX, SIZE_PX, 3), np.uint8)
            for row, place in enumerate(some):
                data = tar.read(place.offset_bytes, place.size_bytes, place.name)
                pixels_BHWC[row] = np.asarray(decode_square(data, SIZE_PX))
            image_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).to(torch.float32).div_(255)
            with torch.inference_mode():
                found.append(encode(image_BCHW.sub_(mean_C11).div_(std_C11).contiguous()).numpy())
    return np.concatenate(found)


def seconds_of(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds by the clock and the CPU seconds of this process and its children."""
    cpu, start = cpu_seconds(), time.perf_counter()
    run()
    return time.perf_counter() - start, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """Return the CPU seconds so far of this process and of its children that run."""
    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children())]
    return float(sum(one.user + one.system for one in times))


if __name__ == "__main__":
    sys.exit(main())
