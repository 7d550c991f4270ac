"""Small classification sets on disk in the three layouts, for the tests of this folder."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
NAMES = {"red": "红色", "green": "绿色", "blue": "蓝色"}


def square_image(colour: str, seed: int) -> bytes:
    """Return a noisy square of one colour."""
    noise = np.random.default_rng(seed).integers(-25, 25, (16, 16, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_cnclip(root: Path, count: int = 4) -> Path:
    """Write `test/<id>/…` with `label_cn.txt`; image i of class c has seed 100 c + i."""
    for number, colour in enumerate(COLOURS):
        folder = root / "test" / f"{number:03d}"
        folder.mkdir(parents=True)
        for row in range(count):
            (folder / f"{row}.png").write_bytes(square_image(colour, 100 * number + row))
    (root / "label_cn.txt").write_text("".join(f"{name}\n" for name in NAMES.values()), encoding="utf-8")
    return root


def write_torchvision(root: Path, count: int = 4) -> Path:
    """Write `<class name>/…` and a labels file `labels.tsv` next to the folder."""
    for number, colour in enumerate(COLOURS):
        (root / colour).mkdir(parents=True)
        for row in range(count):
            (root / colour / f"{row}.png").write_bytes(square_image(colour, 100 * number + row))
    labels = "".join(f"{colour}\t{name}\n" for colour, name in NAMES.items())
    root.with_suffix(".tsv").write_text(labels, encoding="utf-8")
    return root


def write_web(root: Path, count: int = 4) -> Path:
    """Write CLIP_benchmark's layout, one tar a class."""
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text(str(len(COLOURS)))
    (root / "classnames.txt").write_text("\n".join(COLOURS))
    for number, colour in enumerate(COLOURS):
        with tarfile.open(root / "test" / f"{number}.tar", "w") as tar:
            for row in range(count):
                _add(tar, f"s{number}_{row}.png", square_image(colour, 100 * number + row))
                _add(tar, f"s{number}_{row}.cls", str(number).encode())
    (root / "label_cn.txt").write_text("".join(f"{name}\n" for name in NAMES.values()), encoding="utf-8")
    return root


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
