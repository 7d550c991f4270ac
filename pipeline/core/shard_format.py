"""The shard format: a tar of images and captions with one Parquet table next to it, its sidecar.

All code that writes, reads, repacks or serves shards takes names, columns and byte ranges from here.
"""

import collections
import contextlib
import io
import os
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

from pipeline.core import store
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

TAR, SIDECAR = ".tar", ".parquet"
# In this order, followed by the columns that a source carries. Offsets and sizes refer to the image's bytes
# in the tar, image_sha256 is their hex digest, perceptual_hash is the hash of data_prep.rules.image.
SIDECAR_COLUMNS = (
    "key", "offset_bytes", "size_bytes", "caption", "source", "url", "score", "width_px", "height_px",
    "image_sha256", "perceptual_hash",
)  # fmt: skip
# The limit for one image from anywhere: the web, a folder, a table, a tar, a search page. Damaged tables and
# hostile files ask for gigabytes.
MAX_IMAGE_BYTES = 64 << 20
MAX_IMAGE_BASE64_BYTES = MAX_IMAGE_BYTES // 3 * 4 + 4  # the same in base64
MAX_IMAGE_PIXELS = 100_000_000  # according to the header, before a pixel is decoded
BUILD_AGAIN = "build the shard again"  # remedy for a damaged shard of unknown origin
_OPEN_FILES = 64  # in a pool, because the rows of one shard may come from any number of tars


def too_large() -> str:
    """Return the text of errors about an image above the limit."""
    return f"more than {MAX_IMAGE_BYTES >> 20} MiB, the most that an image may have"


def all_captions(column: str) -> str:
    """Return the column that keeps every caption of a sample, one of which training draws in each epoch."""
    return f"{column}s"


def sidecar_of(tar: str) -> str:
    """Return the path of a tar's sidecar."""
    return tar.removesuffix(TAR) + SIDECAR


def tar_of(sidecar: str) -> str:
    """Return the path of a sidecar's tar."""
    return sidecar.removesuffix(SIDECAR) + TAR


def read_sidecar(path: str, columns: Sequence[str], optional: Sequence[str] = ()) -> "pa.Table":
    """Read the given columns of a sidecar, followed by those optional ones that it has.

    This uses pyarrow, because training ranks also read sidecars, and a training machine may lack polars.

    Raises:
        InputError: if the file cannot be read or lacks one of `columns`.
    """
    from pyarrow import parquet

    with foreign(path, "sidecar", "build the shard again"):
        try:
            # A remote one in a single request: its columns are most of its bytes.
            opened = store.open_read(path) if store.is_local(path) else io.BytesIO(store.read_bytes(path))
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file, and every tar needs its sidecar; build the shard again"
            ) from None
        with opened as file:
            found = parquet.ParquetFile(file)
            known = found.schema_arrow.names
            missing = [name for name in columns if name not in known]
            if missing:
                said = ": name one that it has:"
                if missing[0] in SIDECAR_COLUMNS:
                    said = ", so it is not a sidecar of this project's shards; it has"
                raise InputError(f"{path}: has no column {missing[0]}{said} {', '.join(known)}")
            table = found.read(columns=[*columns, *(name for name in optional if name in known)])
            table.validate(full=True)  # bytes that are not UTF-8 would crash a reader's process
            return table


def num_rows(path: str) -> int:
    """Return the number of rows of a sidecar.

    Raises:
        InputError: as `read_sidecar` raises it.
    """
    return int(read_sidecar(path, ("key",)).num_rows)


def read_sidecar_frame(path: str, columns: Sequence[str], optional: Sequence[str] = ()) -> "pl.DataFrame":
    """Read a sidecar like `read_sidecar`, into polars."""
    import polars as pl

    return pl.DataFrame(pl.from_arrow(read_sidecar(path, columns, optional)))


def with_each_caption(samples: "pl.DataFrame", column: str = "caption") -> "pl.DataFrame":
    """Return a row for each caption of a sample, in order; samples that keep one have no list of them."""
    import polars as pl

    several = all_captions(column)
    if not isinstance(samples.schema.get(several), pl.List):
        return samples
    listed = pl.col(several).list.drop_nulls()
    captions = pl.when(listed.list.len() > 0).then(listed).otherwise(pl.concat_list(column))
    return samples.with_columns(captions.alias(column)).drop(several).explode(column)


class ByteRanges(contextlib.AbstractContextManager["ByteRanges"]):
    """Reads byte ranges of one file, each of which is an image.

    Several threads may read a local file concurrently. A remote file reads ahead for one sequential thread;
    with `concurrent` each range is a separate request, for several threads.
    """

    def __init__(
        self,
        path: str,
        *,
        concurrent: bool = False,
        max_bytes: int = MAX_IMAGE_BYTES,
        remedy: str = BUILD_AGAIN,
    ) -> None:
        self.path = path
        self._remedy = remedy  # the remedy in errors
        self._max_bytes = max_bytes  # of a range, because a damaged table may ask for gigabytes
        self._file: IO[Any] | None = None
        self._fs: Any = None
        self._is_local = store.is_local(path)
        if self._is_local:
            store.refuse_special(path)
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        elif concurrent:
            self._fs, self._name = store.remote(path)
        else:
            self._file = store.open_read(path)

    def read(self, offset_bytes: int | None, size_bytes: int | None, name: str) -> bytes:
        """Return the bytes of one range; errors use `name`, such as `<key>.jpg`.

        Raises:
            InputError: if the range cannot be an image, or the file ends inside it.
        """
        if size_bytes is not None and size_bytes > self._max_bytes:
            raise InputError(
                f"{self.path}: {name}: its sidecar gives {size_bytes} bytes, {too_large()}; {self._remedy}"
            )
        if offset_bytes is None or size_bytes is None or offset_bytes < 0 or size_bytes <= 0:
            raise InputError(
                f"{self.path}: {name}: its sidecar gives {size_bytes} bytes at {offset_bytes}; {self._remedy}"
            )
        data = self._range(offset_bytes, size_bytes)
        if len(data) < size_bytes:
            raise InputError(
                f"{self.path}: ends inside {name}: the file is cut short or not its sidecar's; {self._remedy}"
            )
        return data

    def _range(self, offset_bytes: int, size_bytes: int) -> bytes:
        if self._is_local and self._file is not None:
            return os.pread(self._file.fileno(), size_bytes, offset_bytes)
        if self._file is not None:
            self._file.seek(offset_bytes)
            return bytes(self._file.read(size_bytes))
        return bytes(self._fs.cat_file(self._name, start=offset_bytes, end=offset_bytes + size_bytes))

    def close(self) -> None:
        """Close the file; later reads are errors."""
        if self._file is not None:
            self._file.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()


class ByteRangePool(contextlib.AbstractContextManager["ByteRangePool"]):
    """Reads byte ranges of many files, opening each on first use and closing the least recently used."""

    def __init__(self, path_of: Callable[[str], str], *, remedy: str = BUILD_AGAIN) -> None:
        self._path_of = path_of
        self._remedy = remedy
        self._open: collections.OrderedDict[str, ByteRanges] = collections.OrderedDict()

    def read(self, file: str, offset_bytes: int, size_bytes: int, name: str) -> bytes:
        """Return a range of the file at `path_of(file)`, like `ByteRanges.read`."""
        if file not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[file] = ByteRanges(self._path_of(file), remedy=self._remedy)
        self._open.move_to_end(file)
        return self._open[file].read(offset_bytes, size_bytes, name)

    def __exit__(self, *error: object) -> None:
        for ranges in self._open.values():
            ranges.close()
