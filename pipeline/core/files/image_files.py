"""Finds image files in folders, and reads one without blocking."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.core import store
from pipeline.core.files.images import BadImageError
from pipeline.core.records import DropReason
from pipeline.core.shard_format import MAX_IMAGE_BYTES, too_large

NO_FILE = DropReason("no_file")  # a FIFO, a device, a socket, or nothing at all
TOO_LARGE = DropReason("too_large")  # more bytes than an image may have
UNREADABLE = DropReason("unreadable")
# Endings of image files, unless a data set has its own rule.
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif",
    ".heic", ".heif", ".jxl", ".jp2", ".j2k",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FoundImages:
    """The images of a folder, and skipped entries with the reason; both unsorted."""

    paths: list[str] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    others: list[str] = field(default_factory=list)  # files without an image's ending

    @property
    def other_endings(self) -> Counter[str]:
        """Count the other files by the endings of their names."""
        return Counter(os.path.splitext(path)[1].lower() or "without ending" for path in self.others)


def find_images(folder: str, endings: Sequence[str], *, below: bool = True) -> FoundImages:
    """Find the images in and below a local folder by the endings of their names (`.jpg`, lower case).

    Links are followed. FIFOs, devices, sockets, broken links, links back to a folder above, and hidden
    entries (names that begin with a dot, such as macOS's `._cat.jpg`, and `__MACOSX`) are skipped and listed.
    """
    found = FoundImages()
    _find(folder, tuple(endings), below, (), found)
    return found


def is_hidden(name: str) -> bool:
    """Return whether this is a hidden file or folder that an operating system makes."""
    return name.startswith(".") or name == "__MACOSX"


def what_else(path: str) -> str | None:
    """Return what a local path is if it is not a regular file, such as `a FIFO` or `a link to nothing`."""
    try:
        return store.what_else(os.stat(path).st_mode)
    except OSError:
        return "a link to nothing"


def read_image(path: str) -> bytes:
    """Read one image file, local or remote.

    Raises:
        BadImageError: if it is not a file, is larger than an image may be, or cannot be read.
    """
    try:
        # Opening a FIFO waits for a writer, and a device may have no end.
        if store.is_local(path) and (kind := store.what_else(os.stat(path).st_mode)) is not None:
            raise BadImageError(f"{NO_FILE}: {kind}, not an image file")
        with store.open_read(path) as file:
            data = bytes(file.read(MAX_IMAGE_BYTES + 1))
    except FileNotFoundError:
        raise BadImageError(f"{NO_FILE}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise BadImageError(f"{UNREADABLE}: {getattr(error, 'strerror', None) or error}") from None
    check_bytes(len(data))
    return data


def check_bytes(num_bytes: int) -> None:
    """Raise BadImageError for more bytes than an image may have."""
    if num_bytes > MAX_IMAGE_BYTES:
        raise BadImageError(f"{TOO_LARGE}: {too_large()}")


def summary(left_out: Iterable[tuple[str, str]], shown: int = 5) -> str:
    """Return one line on the skipped entries: the first few with their reasons, and the number of others."""
    items = list(left_out)
    named = "; ".join(f"{name}: {reason}" for name, reason in items[:shown])
    return named + (f"; and {len(items) - shown:,} more" if len(items) > shown else "")


def _find(
    folder: str, endings: tuple[str, ...], below: bool, above: tuple[tuple[int, int], ...], found: FoundImages
) -> None:
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        found.passed_over.append((folder, f"{UNREADABLE}: {error.strerror}"))
        return
    own = (status.st_dev, status.st_ino)
    if own in above:
        found.passed_over.append((folder, "a link to a folder above it"))
        return
    for entry in entries:
        is_image = entry.name.lower().endswith(endings)
        try:
            kind = store.what_else(entry.stat().st_mode)
        except OSError:  # a link to nothing
            if is_image:
                found.passed_over.append((entry.path, f"{NO_FILE}: a link to nothing"))
            continue
        if is_hidden(entry.name):
            if is_image or kind == "a folder":
                found.passed_over.append((entry.path, "hidden"))
        elif kind == "a folder":
            if below:
                _find(entry.path, endings, below, (*above, own), found)
        elif kind is not None:
            found.passed_over.append((entry.path, f"{NO_FILE}: {kind}"))
        elif is_image:
            found.paths.append(entry.path)
        else:
            found.others.append(entry.path)
