"""Damage for fuzz tests: seed images, tables and tars, and what chance does to their bytes."""

import gzip
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

# Numbers that sizes and counts are most often wrong by.
_ABSURD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
# What has no business in a caption and stands there all the same.
_ODD_TEXT = (
    "\0",
    "\x1b[31m",
    "\u202e",
    "\u200f",
    "\u2066",
    "\ufeff",
    "\ufffd",
    "\U0001f469\u200d\U0001f680",
    "\r",
    "\t",
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Cause one to four accidents: bits, bytes, runs, cuts, sizes, copies, foreign text."""
    body = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not body:
            break
        at = rng.randrange(len(body) if rng.random() < 0.5 else min(len(body), 256))
        kind = rng.randrange(8)
        if kind == 0:
            body[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            body[at : at + 4] = rng.randbytes(4)
        elif kind == 2:
            number = rng.choice(_ABSURD)
            body[at : at + 4] = struct.pack(rng.choice((">I", "<I")), number)
        elif kind == 3:
            del body[at : at + rng.randint(1, 64)]
        elif kind == 4:
            body[at:at] = body[at : at + rng.randint(1, 512)]
        elif kind == 5:
            del body[max(at, 1) :]
        elif kind == 6:
            body[at : at + 32] = bytes(32)
        else:
            body[at:at] = rng.choice(_ODD_TEXT).encode("utf-8")
    return bytes(body)


def seed_pictures() -> list[bytes]:
    """Return small images of every format that is decoded, with the parts that parsers trip over."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "描述"
    made = [
        _encode(colour, "JPEG", quality=85, exif=exif.tobytes(), icc_profile=bytes(200)),
        _encode(colour, "JPEG", quality=60, progressive=True),
        _encode(colour.convert("CMYK"), "JPEG"),
        _encode(colour, "PNG", exif=exif.tobytes()),
        _encode(colour.quantize(32), "PNG", transparency=3),
        _encode(Image.fromarray(rng.integers(0, 65536, (30, 40), dtype=np.uint16)), "PNG"),
        _encode(colour, "WEBP", quality=70),
        _encode(colour.convert("RGBA"), "WEBP", lossless=True),
        _encode(colour, "GIF", save_all=True, append_images=[colour.rotate(90)]),
        _encode(colour, "BMP"),
        _encode(colour, "TIFF", compression="tiff_lzw"),
        _encode(colour, "TIFF", compression="jpeg"),
        _encode(colour, "TIFF", compression="tiff_deflate"),
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"<!DOCTYPE html><html><body>404</body></html>",
    ]
    return made


def _encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _rows(count: int) -> pl.DataFrame:
    odd = [
        f"第{number}张图片，有一只猫{_ODD_TEXT[number % len(_ODD_TEXT)]}在窗台上" for number in range(count)
    ]
    return pl.DataFrame(
        {
            "URL": [f"http://a.cn/{number}.jpg" for number in range(count)],
            "TEXT": odd,
            "LANGUAGE": ["zh" if number % 5 else "en" for number in range(count)],
            "similarity": [0.2 + number % 10 / 50 for number in range(count)],
            "WIDTH": [100.0 + number for number in range(count)],
        }
    )


def seed_tables() -> dict[str, bytes]:
    """Return file name → bytes of a small caption table in each form that is read."""
    rows = _rows(40)
    parquet, packed = io.BytesIO(), io.BytesIO()
    rows.write_parquet(parquet, compression="zstd", row_group_size=16)
    rows.write_parquet(packed, compression="snappy", statistics=False)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.iter_rows(named=True))
    csv = rows.write_csv().encode()
    return {
        "a.csv": csv,
        "b.tsv": rows.write_csv(separator="\t").encode(),
        "c.jsonl": lines.encode(),
        "d.csv.gz": gzip.compress(csv, mtime=0),
        "e.parquet": parquet.getvalue(),
        "f.parquet": packed.getvalue(),
    }


def seed_tar(add: Callable[[tarfile.TarFile], None] | None = None) -> bytes:
    """Return a tar as img2dataset writes it, and what `add` puts into it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(6):
            for ending, data in (("jpg", seed_pictures()[number % 3]), ("txt", b"x"), ("json", b"{}")):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        if add is not None:
            add(tar)
    return buffer.getvalue()
