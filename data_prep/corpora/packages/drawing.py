"""Draws SVG and PNG files of packages as small square images on white."""

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.core.processes import die_with_parent
from pipeline.core.records import ConfigError

SIDE_PX = 64
MAX_SVG_BYTES = 4 << 20
MAX_PIXELS = 1 << 24  # of a source image, which is decoded whole
_CHUNK = 64  # images that travel to a process together
# What an SVG may refer to: parts of itself, and images inside it.
_OUTSIDE = re.compile(r"""<(?:image|use|feImage)\b[^>]*?href\s*=\s*["'](?!#|data:)([^"']{0,80})""")


@dataclass(frozen=True, slots=True)
class Source:
    """An image file as a package holds it."""

    kind: Literal["svg", "image"]
    content: bytes


@dataclass(frozen=True, slots=True)
class Drawn:
    """PNG bytes (SIDE_PX square, RGB on white), or why there are none."""

    png: bytes = b""
    refused: str = ""


def on_white(image: Image.Image) -> Image.Image:
    """Return an image in the middle of a white square of SIDE_PX, RGB."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image.convert("RGBA"), ((side - image.width) // 2, (side - image.height) // 2))
    rgb = square.convert("RGB")
    return rgb if side == SIDE_PX else rgb.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)


def render_svg(svg: bytes) -> Image.Image:
    """Render at SIDE_PX.

    Raises:
        ConfigError: if the renderer is not installed.
        ValueError: if the SVG is broken, larger than MAX_SVG_BYTES, or names a file outside itself.
    """
    try:
        import resvg_py
    except ImportError:
        raise ConfigError("resvg-py: not installed; pip install 'cnclip-pretraining[emoji]'") from None
    if len(svg) > MAX_SVG_BYTES:
        raise ValueError(f"{len(svg)} bytes, more than {MAX_SVG_BYTES}")
    text = svg.decode()
    if outside := _OUTSIDE.search(text):
        raise ValueError(f"it refers to {outside[1]!r}, outside itself")
    # System fonts would make the images differ between machines.
    png = resvg_py.svg_to_bytes(svg_string=text, width=SIDE_PX, height=SIDE_PX, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def draw(source: Source) -> bytes:
    """Return PNG bytes, SIDE_PX square, RGB on white.

    Raises:
        ValueError, OSError: if the file cannot be drawn.
    """
    if source.kind == "svg":
        image = render_svg(source.content)
    else:
        image = Image.open(io.BytesIO(source.content))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, more than {MAX_PIXELS}")
    buffer = io.BytesIO()
    on_white(image).save(buffer, "PNG")
    return buffer.getvalue()


def _attempt(source: Source) -> Drawn:
    try:
        png = draw(source)
    except (ValueError, OSError) as error:
        return Drawn(refused=f"it cannot be drawn ({error})")
    if np.ptp(np.asarray(Image.open(io.BytesIO(png)))) == 0:
        return Drawn(refused="it shows one colour only")
    return Drawn(png)


@contextmanager
def drawing() -> Iterator[Callable[[Sequence[Source]], list[Drawn]]]:
    """Yield a function that draws images in as many processes as there are cores to use.

    An image of one colour is refused: white lines are drawn for dark backgrounds.
    """
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=die_with_parent,
        initargs=(os.getpid(),),
    ) as pool:

        def draw_all(sources: Sequence[Source]) -> list[Drawn]:
            if len(sources) <= _CHUNK:  # not worth a process
                return list(map(_attempt, sources))
            return list(pool.map(_attempt, sources, chunksize=_CHUNK))

        yield draw_all
