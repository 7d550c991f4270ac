"""Measure decoding and resizing: the download's, plain and with scaled decode, against img2dataset's own.

    python benchmarks/data_prep/resize.py [--full] [--images N]

Images are JPEGs of 1,000 pixels on the longer side, at quality 85, cut from the two photographs that come
with scikit-learn, laid side by side and mirrored; their mean size is printed. All sides reduce them to a
short side of 256 and write a JPEG of quality 95, on one thread. The sides take turns, so that a busy
machine hits all alike; times are CPU seconds, and a side's rate is that of its best round. The pixel
difference is the mean absolute one of the stored images, of 255; img2dataset's store colour at half the
resolution, ours do not.
Last line: one JSON list; `equal` says that the difference is under 2 of 255.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import io
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks.harness import parse, parser, record, report
from data_prep.download.resize import UprightResizer

SHORT_SIDE_PX = 256
SIZES = ((1000, 750), (1000, 667), (750, 1000), (1000, 1000))
ROUNDS = 5


def photographs(count: int) -> list[bytes]:
    """Return JPEGs cut from a wall of two photographs of 640 x 427 pixels and their mirror images."""
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    wall = np.vstack([np.hstack([china, flower]), np.hstack([flower[:, ::-1], china[:, ::-1]])])
    wall = np.vstack([wall, wall[::-1]])
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        top = int(rng.integers(wall.shape[0] - height))
        left = int(rng.integers(wall.shape[1] - width))
        buffer = io.BytesIO()
        Image.fromarray(wall[top : top + height, left : left + width]).save(buffer, "JPEG", quality=85)
        made.append(buffer.getvalue())
    return made


def img2dataset_resizer() -> Callable[[Any], Any]:
    from img2dataset.resizer import Resizer

    return Resizer(
        image_size=SHORT_SIDE_PX, resize_mode="keep_ratio", resize_only_if_bigger=True, encode_quality=95
    )  # type: ignore[no-any-return]


def rates(sides: dict[str, Callable[[Any], Any]], images: list[bytes]) -> dict[str, float]:
    """Return images a CPU second of each side, best of the rounds."""
    best = dict.fromkeys(sides, float("inf"))
    for side in sides.values():
        side(io.BytesIO(images[0]))
    for _ in range(ROUNDS):
        for name, side in sides.items():
            started = time.process_time()
            for data in images:
                answer = side(io.BytesIO(data))
                assert answer[5] is None, answer[5]
            best[name] = min(best[name], time.process_time() - started)
    return {name: len(images) / seconds for name, seconds in best.items()}


def difference(
    side: Callable[[Any], Any], other: Callable[[Any], Any], images: list[bytes]
) -> tuple[float, int]:
    """Return the mean and largest absolute difference of the stored images, of 255."""
    means, largest = [], 0
    for data in images:
        first, second = (
            np.asarray(Image.open(io.BytesIO(f(io.BytesIO(data))[0])), np.int16) for f in (side, other)
        )
        gap = np.abs(first - second)
        means.append(float(gap.mean()))
        largest = max(largest, int(gap.max()))
    return float(np.mean(means)), largest


def main() -> None:
    made = parser(__doc__, full="400 images")
    made.add_argument("--images", "--pictures", type=int, default=48)
    options = parse(made)
    cv2.setNumThreads(1)
    images = photographs(400 if options.full else options.images)
    sides: dict[str, Callable[[Any], Any]] = {
        "plain": UprightResizer(SHORT_SIDE_PX, 100_000_000, 95),
        "scaled": UprightResizer(SHORT_SIDE_PX, 100_000_000, 95, scaled_decode=True),
        "img2dataset": img2dataset_resizer(),
    }
    rate = rates(sides, images)
    print(f"{len(images)} images of {np.mean([len(data) for data in images]) / 1000:.0f} kB on average")
    records = []
    for name, against in (("plain", "img2dataset"), ("scaled", "img2dataset"), ("scaled", "plain")):
        mean, largest = difference(sides[name], sides[against], images)
        print(
            f"{name:<7} {rate[name]:7.1f} images/CPU s, {against} {rate[against]:7.1f}:"
            f" {rate[name] / rate[against]:.2f} times; pixels differ by {mean:.2f} of 255 on average,"
            f" {largest} at most"
        )
        records.append(
            record(
                f"resize/{name}" + ("" if against == "img2dataset" else f"@{against}"),
                ours=rate[name],
                peer=rate[against],
                unit="images/CPU s",
                equal=mean < 2,
                difference=round(mean, 3),
            )
        )
    report(records)


if __name__ == "__main__":
    main()
