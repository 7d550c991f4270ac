"""Which members of a tar are the images of its samples, and where they lie."""

import gzip
import os
import tarfile
import zlib
from dataclasses import dataclass

from pipeline.core.records import InputError

EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl",
    "jp2", "ppm", "pgm", "ico", "tga",
)  # fmt: skip
_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\xff\x0a", b"\0\0\0\x0cJXL ",
    b"\0\0\0\x0cjP  ",
)  # fmt: skip
TEXTS = ("txt", "caption", "json")  # members that hold a caption, in order
MOST_TEXT_BYTES = 1 << 20
_GZIP = b"\x1f\x8b"
# A gzipped tar of images is hardly smaller than its images; one of texts has a tenth of their size.
_MOST_TIMES = 100  # its size
_MOST_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Samples:
    """What a tar holds."""

    images: dict[str, tuple[int, int]]  # key → offset and size
    texts: dict[str, dict[str, bytes]]  # key → extension → bytes


def image_members(path: str) -> dict[str, tuple[int, int]]:
    """Return key → (offset, size) of the image of each sample; the key is the name without folders.

    Raises:
        InputError: as `samples_of`.
    """
    return samples_of(path).images


def samples_of(path: str, *, with_folders: bool = False, shown: str | None = None) -> Samples:
    """Return what a tar holds by sample, whose members have one name up to their extension.

    `with_folders`: names in different folders are different samples, and an extension begins at the first
    dot, as webdataset has it; texts are read then.

    An image has an image's first bytes; if no member of a sample has, an image's extension. Of several such
    the last counts, as for who unpacks the tar. Errors name `shown`, or else the file.

    Raises:
        InputError: if the file is no tar, damaged, or compressed: its members have no place to be read at.
    """
    found: dict[str, tuple[int, int]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    ranks: dict[str, int] = {}
    try:
        with open(path, "rb") as data:
            if data.read(len(_GZIP)) == _GZIP:
                raise InputError(
                    f"{shown or path}: compressed with gzip; unpack it first, with `gunzip` to a plain .tar"
                )
            with tarfile.open(path, "r:") as tar:  # never one that unpacks to whatever size
                for member in tar:
                    folder, name = os.path.split(os.path.normpath(member.name))
                    stem, dot, extension = name.rpartition(".")
                    if not member.isfile() or not dot or name.startswith("."):  # ._a.jpg: of Macintosh
                        continue
                    if with_folders:
                        stem = os.path.join(folder, name.partition(".")[0])
                    if extension.lower() in TEXTS:
                        if with_folders and member.size <= MOST_TEXT_BYTES:
                            data.seek(member.offset_data)
                            texts.setdefault(stem, {})[extension.lower()] = data.read(member.size)
                        continue
                    data.seek(member.offset_data)
                    rank = 2 if is_image(data.read(16)) else int(extension.lower() in EXTENSIONS)
                    if rank and rank >= ranks.get(stem, 0):
                        found[stem], ranks[stem] = (member.offset_data, member.size), rank
    except InputError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise _damaged(shown or path, error) from None
    return Samples(found, texts)


def is_gzipped(path: str) -> bool:
    """Whether a file begins as gzip does (RFC 1952, 2.3.1)."""
    with open(path, "rb") as file:
        return file.read(len(_GZIP)) == _GZIP


def unpack_gzip(path: str, target: str) -> None:
    """Write the tar that a file holds, piece by piece.

    Raises:
        InputError: if the file is damaged, cut, or more than a hundred times smaller than what it holds.
    """
    most = max(_MOST_TIMES * os.path.getsize(path), _MOST_TIMES * tarfile.RECORDSIZE)
    num_bytes = 0
    with open(target, "wb") as out, gzip.open(path) as packed:
        while True:
            try:
                piece = packed.read(_MOST_AT_ONCE)
            except (OSError, EOFError, zlib.error) as error:
                raise _damaged(path, error) from None
            if not piece:
                return
            num_bytes += len(piece)
            if num_bytes > most:
                raise InputError(
                    f"{path}: holds more than {_MOST_TIMES} times its own size, which no tar of images does;"
                    " look at it, and unpack it yourself if it is right"
                )
            out.write(piece)


def _damaged(path: str, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{path}: damaged ({reason}); download this shard again or remove it")


def is_image(start: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of an image format."""
    return (
        start.startswith(_SIGNATURES)
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"))
    )
