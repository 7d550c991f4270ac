"""Measure from JPEG bytes to a normalised tensor, with augmentation: our reader against cn_clip's data set.

    python benchmarks/training/image_path.py           # images of 256 pixels on the short side, to 224
    python benchmarks/training/image_path.py --full    # more rounds

The peer is what CN-CLIP 1.6.0's data set does with an image in training: base64, PIL, and timm's
`create_transform` with its arguments (random crop of 90-100%, flip, AutoAugment, bicubic). Ours reads the
same images from a shard as an image worker does, with the check of each image's digest, and has the same
augmentation; its batch is normalised as the engine does. Times are CPU seconds of one thread.
`image_path@uint8` stops at the uint8 tensor that goes to an accelerator, where normalising is free; there is
no --device, since the rest is work of the CPU.

`equal` compares pixels for the same draws, ours: PIL and timm repeat each image's crop, flip and AutoAugment
operations; the mean absolute difference is under 2 of 255.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import base64
import hashlib
import io
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.harness import line, medians, parse, parser, record, report
from benchmarks.peers import cn_clip_transform, open_as_cn_clip
from pipeline.core.files.images import decode_pixels
from pipeline.core.records import Shard
from training.config.train import AugmentConfig
from training.data import augment as ours_augment
from training.data import auto_augment
from training.data.augment import augment, sample_generator
from training.data.loader import BatchReader, CaptionConfig
from training.data.sampler import SampleOrder
from training.data.text_encoder import TextEncoder
from training.data.views import ViewConfig, ViewReader
from training.model import torchvision_ops
from training.model.preprocess import normalise

NUM_IMAGES, SIZE_PX, SHORT_SIDE_PX = 128, 224, 256
TOLERANCE = 2.0  # of 255, in the mean
# width / height of web images, with their shares
ASPECTS = {1.0: 0.3, 4 / 3: 0.35, 3 / 2: 0.15, 3 / 4: 0.2}


def main() -> int:
    options = parse(parser(__doc__, rounds=(4, 9)))
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    jpegs = draw_jpegs()
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(Path(folder), jpegs)
        transform = cn_clip_transform(SIZE_PX)
        encoded = [base64.urlsafe_b64encode(jpeg).decode() for jpeg in jpegs]
        seconds: dict[str, list[float]] = {"tensor": [], "uint8": [], "peer": []}
        for round_number in range(options.rounds):
            for name, run in (
                ("tensor", lambda epoch: normalise(read(source, epoch))),
                ("uint8", lambda epoch: read(source, epoch)),
                ("peer", lambda _: [transform(open_as_cn_clip(text)) for text in encoded]),
            ):
                start = time.process_time()
                run(round_number)
                if round_number:  # the first warms up
                    seconds[name].append(time.process_time() - start)
    difference = pixel_difference(jpegs)
    taken = medians(seconds)
    results = []
    for name, of in (("image_path", "tensor"), ("image_path@uint8", "uint8")):
        found = record(
            name,
            ours=NUM_IMAGES / taken[of],
            peer=NUM_IMAGES / taken["peer"],
            unit="images/CPU s",
            equal=difference < TOLERANCE,
            pixel_difference=round(difference, 3),
        )
        results.append(found)
        print(f"{line(found)}, mean difference of a pixel {difference:.2f} of 255")
    return report(results)


def draw_jpegs(number: int = NUM_IMAGES) -> list[bytes]:
    """Return images with the spectrum of photographs (amplitude 1/f), 256 pixels on the short side."""
    random = np.random.default_rng(0)
    jpegs = []
    for _ in range(number):
        aspect = float(random.choice(list(ASPECTS), p=list(ASPECTS.values())))
        height, width = (round(SHORT_SIDE_PX * max(1.0, side)) for side in (1 / aspect, aspect))
        shape = np.fft.rfft2(random.normal(size=(height, width, 3)), axes=(0, 1))
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        shape /= np.maximum(frequency, 1 / width)[..., None] ** 1.2
        image = np.fft.irfft2(shape, (height, width), axes=(0, 1))
        image = (image - image.mean()) / image.std() * 50 + 120
        bgr = np.clip(image, 0, 255).astype(np.uint8)
        jpegs.append(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    return jpegs


class OneToken:
    """Captions are not what is measured."""

    digest = "one token"

    def encode(self, texts: Any, context_length: int) -> Any:
        return np.pad(np.ones((len(texts), 1), np.int32), ((0, 0), (0, context_length - 1)))

    def num_truncated(self, texts: Any, context_length: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Source:
    """A shard with images, and what reads it."""

    reader: BatchReader
    views: ViewConfig
    jpegs: tuple[bytes, ...]


def make_source(
    folder: Path, jpegs: Sequence[bytes], *, tokenizer: TextEncoder | None = None, size_px: int = SIZE_PX
) -> Source:
    """Return a shard of the images, each step of which is an epoch."""
    keys = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(len(jpegs))]
    tar_path = folder / "00000.tar"
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, jpeg in zip(keys, jpegs, strict=True):
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(jpeg)
            tar.addfile(member, io.BytesIO(jpeg))
    with tarfile.open(tar_path) as tar:
        offsets = [member.offset_data for member in tar]
    table = {
        "key": keys,
        "caption": ["。"] * len(jpegs),
        "image_sha256": [hashlib.sha256(jpeg).hexdigest() for jpeg in jpegs],
        "offset_bytes": offsets,
        "size_bytes": [len(jpeg) for jpeg in jpegs],
    }
    pq.write_table(pa.table(table), tar_path.with_suffix(".parquet"))
    shard = Shard(str(tar_path), len(jpegs), tar_path.stat().st_size, "0" * 64)
    order = SampleOrder([len(jpegs)], seed=0, global_batch=len(jpegs), lanes=1, window_shards=1)
    captions = CaptionConfig(
        weights={"caption": 1.0}, context_length=52, token_folder=str(folder / "tokens"), seed=0
    )
    reader = BatchReader([shard], order, tokenizer or OneToken(), captions, lanes=range(1))
    views = ViewConfig(
        paths=[shard.path],
        image_size_px=size_px,
        augment=AugmentConfig(),
        seed=0,
        open_shards=reader.open_shards,
    )
    return Source(reader, views, tuple(jpegs))


def read(source: Source, step: int) -> torch.Tensor:
    """Return a step's images, uint8 [B, 3, H, W], decoded in this process."""
    visits = source.reader.request(step).visits
    assert visits is not None
    image_BHWC = np.empty((len(visits), SIZE_PX, SIZE_PX, 3), np.uint8)
    ViewReader(source.views).read(visits, image_BHWC)
    return torch.from_numpy(image_BHWC).permute(0, 3, 1, 2)


def pixel_difference(jpegs: list[bytes]) -> float:
    """Return how far our views are from the same crops, flips and operations by PIL and timm, in the mean."""
    config = AugmentConfig()
    differences = []
    for number, jpeg in enumerate(jpegs):
        crops: list[tuple[int, int, int, int]] = []
        done: list[tuple[str, float]] = []
        random_crop, apply = ours_augment._random_crop, auto_augment.apply_operations

        def crop(*arguments: Any, kept: Any = crops, draw: Any = random_crop) -> Any:
            kept.append(draw(*arguments))
            return kept[-1]

        def operations(image: Any, drawn: Any, kept: Any = done, do: Any = apply) -> Any:
            kept.extend(drawn)
            return do(image, drawn)

        flips: list[int] = []

        def flip(image: Any, axis: int, kept: Any = flips, do: Any = cv2.flip) -> Any:
            kept.append(axis)
            return do(image, axis)

        with (
            mock.patch.object(ours_augment, "_random_crop", crop),
            mock.patch.object(auto_augment, "apply_operations", operations),
            mock.patch.object(cv2, "flip", flip),
        ):
            random = sample_generator(0, 0, f"{number:032x}".encode())
            view = augment(decode_pixels(jpeg), SIZE_PX, config, random)
        ((top, left, height, width),) = crops
        theirs = Image.open(io.BytesIO(jpeg)).convert("RGB").crop((left, top, left + width, top + height))
        theirs = theirs.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
        if flips:
            theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for name, level in done:
            theirs = by_timm(theirs, name, level)
        differences.append(np.abs(view.astype(int) - np.asarray(theirs)).mean())
    return float(np.mean(differences))


def by_timm(image: Image.Image, name: str, level: float) -> Image.Image:
    torchvision_ops.install()  # timm imports torchvision, which does not load next to a CPU-only torch
    from timm.data.auto_augment import auto_augment_policy

    policy: Any = auto_augment_policy("original", {"interpolation": Image.Resampling.BICUBIC})  # type: ignore[no-untyped-call]
    found = [each for pair in policy for each in pair if each.name == name]
    arguments: tuple[float, ...] = ()
    if found[0].level_fn is not None:
        arguments = (int(level) if name == "PosterizeOriginal" else level,)
    result: Image.Image = found[0].aug_fn(image, *arguments, **found[0].kwargs)
    return result


if __name__ == "__main__":
    sys.exit(main())
