"""Small shards on disk in the form that the shards stage writes, and a tokenizer's vocabulary for them."""

import hashlib
import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.records import Shard

COLOURS = {"红": (220, 30, 30), "绿": (30, 180, 60), "蓝": (40, 60, 220), "黄": (230, 210, 40)}
SHAPES = ("圆", "方")
VOCABULARY = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *COLOURS,
    *SHAPES,
    *"的色图片一个大小零二三四五六七八九",
)


def draw(colour: tuple[int, int, int], shape: str, size_px: int, random: np.random.Generator) -> bytes:
    """Return JPEG bytes of one coloured shape on a noisy grey ground."""
    image = random.integers(150, 200, (size_px, size_px, 3)).astype(np.uint8)
    centre = random.integers(size_px // 3, 2 * size_px // 3, 2)
    radius = int(random.integers(size_px // 6, size_px // 4))
    bgr = colour[::-1]
    if shape == "圆":
        cv2.circle(image, tuple(centre.tolist()), radius, bgr, -1)
    else:
        cv2.rectangle(image, (centre - radius).tolist(), (centre + radius).tolist(), bgr, -1)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def write_shards(
    folder: Path, sizes: list[int], *, image_size_px: int = 40, seed: int = 0
) -> tuple[Shard, ...]:
    """Write one tar and one sidecar for each size; captions name colour and shape."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    shards = []
    for number, size in enumerate(sizes):
        tar_path = folder / f"{number:05d}.tar"
        rows = []
        with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(size):
                colour, shape = list(COLOURS)[random.integers(4)], SHAPES[random.integers(2)]
                caption = f"一个{colour}色的{shape}" + "图片" * int(random.integers(3))
                jpg = draw(COLOURS[colour], shape, image_size_px, random)
                key = hashlib.sha256(f"{seed}/{number}/{row}".encode()).hexdigest()[:32]
                for name, data in ((f"{key}.jpg", jpg), (f"{key}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                rows.append({"key": key, "caption": caption, "image_sha256": hashlib.sha256(jpg).hexdigest()})
        with tarfile.open(tar_path) as tar:
            pictures = {
                member.name.removesuffix(".jpg"): member for member in tar if member.name.endswith(".jpg")
            }
        table = pa.Table.from_pylist(
            [
                row
                | {
                    "caption_en": f"picture {index}",
                    "offset_bytes": pictures[row["key"]].offset_data,
                    "size_bytes": pictures[row["key"]].size,
                }
                for index, row in enumerate(rows)
            ]
        )
        pq.write_table(table, tar_path.with_suffix(".parquet"))
        data = tar_path.read_bytes()
        shards.append(Shard(str(tar_path), size, len(data), hashlib.sha256(data).hexdigest()))
    return tuple(shards)


def write_vocabulary(path: Path) -> str:
    path.write_text("".join(f"{token}\n" for token in VOCABULARY), encoding="utf-8")
    return str(path)
