"""Images that users give to a command: a folder, a table of paths or of bytes, or CN-CLIP's `_imgs.tsv`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from eval.datasets.cnclip_tsv import Base64Images, read_images
from eval.features.tables import (
    TABLE_ENDINGS,
    find_column,
    is_table,
    parquet_schema,
    read_strings,
    reading_parquet,
)
from pipeline.core import store
from pipeline.core.files.image_files import IMAGE_ENDINGS, NO_FILE, find_images, read_image
from pipeline.core.files.images import BadImageError
from pipeline.core.records import InputError

# Columns that hold an image, as bytes or as a path or URL, and those that then name it.
_IMAGE_COLUMNS = ("image_path", "path", "image", "image_bytes", "jpg", "png", "file", "filename", "url")
_NAME_COLUMNS = ("image_id", "key", "id")
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Images in order: what to call them, and how to read them."""

    origin: str  # what the user gave
    names: list[str]
    column: str | None = None  # of a Parquet table, with the bytes
    folder: str | None = None  # what relative paths are relative to
    base64: Base64Images | None = None  # CN-CLIP's `_imgs.tsv`
    passed_over: list[tuple[str, str]] = field(
        default_factory=list
    )  # (path, reason) of files that are not images

    def called(self, row: int) -> str:
        """Return what a message calls an image."""
        if self.column is not None:
            return f"{self.origin}: {self.names[row]}"
        if self.base64 is not None:
            return f"{self.base64.path}: image {self.names[row]}"
        return self._place(self.names[row])

    def read(self) -> Iterator[bytes | BadImageError]:
        """Yield the encoded images in order; in place of one that cannot be read, the error."""
        if self.column is not None:
            yield from self._column(self.column)
        elif self.base64 is not None:
            yield from self.base64.try_read(range(len(self.names)))
        else:
            for name in self.names:
                try:
                    if not name:
                        raise BadImageError(f"{NO_FILE}: the row names no image")
                    yield read_image(self._place(name))
                except BadImageError as error:
                    yield error

    def _column(self, column: str) -> Iterator[bytes | BadImageError]:
        import pyarrow.parquet as pq

        with reading_parquet(self.origin), store.open_read(self.origin) as file:
            for batch in pq.ParquetFile(file).iter_batches(_ROWS_AT_ONCE, columns=[column]):
                for row in batch.column(0).to_pylist():
                    data: Any = row["bytes"] if isinstance(row, dict) else row
                    yield data if data is not None else BadImageError(f"{NO_FILE}: the row has no bytes")

    def _place(self, name: str) -> str:
        absolute = os.path.isabs(name) or not store.is_local(name) or self.folder is None
        return name if absolute else store.join(str(self.folder), name)


def open_images(source: str) -> ImageSource:
    """Find the images of a folder or table, without reading them.

    Raises:
        InputError: if there are none, or the table has no column of images.
    """
    if store.is_local(source) and os.path.isdir(source):
        return _folder(source)
    if not store.exists(source):
        raise InputError(f"{source}: no such file or folder")
    if _is_cn_clips(source):
        images = read_images(source)
        return ImageSource(source, [str(image_id) for image_id in images.image_ids.tolist()], base64=images)
    if not is_table(source):
        raise InputError(f"{source}: neither a folder nor a table ({', '.join(TABLE_ENDINGS)})")
    column = find_column(source, _IMAGE_COLUMNS, "images")
    if source.lower().endswith(".parquet") and _holds_bytes(source, column):
        names = _row_names(source)
        if not names:
            raise InputError(f"{source}: holds no rows; give at least one")
        return ImageSource(source, names, column=column)
    return ImageSource(source, read_strings(source, column), folder=os.path.dirname(source) or ".")


def _folder(source: str) -> ImageSource:
    found = find_images(source, IMAGE_ENDINGS)
    paths, passed_over = list[str](), sorted(found.passed_over)
    for path in sorted(found.paths, key=lambda path: os.path.relpath(path, source)):
        if path.isprintable() or _is_unicode(path):
            paths.append(path)
        else:
            passed_over.append(
                (os.fsencode(path).decode("utf-8", "replace"), "its name is not UTF-8; rename it")
            )
    passed_over += [
        (f"{source}: {count} files with the ending {ending}", "no image by its name")
        for ending, count in sorted(found.other_endings.items())
    ]
    if not paths:
        about = f"; passed over: {passed_over[0][0]}: {passed_over[0][1]}" if passed_over else ""
        raise InputError(f"{source}: no image in it (looked for {', '.join(IMAGE_ENDINGS)}){about}")
    return ImageSource(source, paths, passed_over=passed_over)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_cn_clips(source: str) -> bool:
    """Return whether a TSV begins with a number, as CN-CLIP's `_imgs.tsv`, and not with names of columns."""
    if not source.endswith(".tsv"):
        return False
    with store.open_read(source) as file:
        first, tab, _ = bytes(file.read(32)).partition(b"\t")
    return bool(tab) and first.isdigit()


def _holds_bytes(source: str, column: str) -> bool:
    """Return whether a column holds encoded images, as they are or as the `datasets` library wraps them."""
    import pyarrow as pa

    kind = parquet_schema(source).field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    )


def _row_names(source: str) -> list[str]:
    """Return what the rows of a table of bytes are called: by a column of ids, else by their numbers."""
    import pyarrow.parquet as pq

    with reading_parquet(source), store.open_read(source) as file:
        table = pq.ParquetFile(file)
        label = next((name for name in _NAME_COLUMNS if name in table.schema_arrow.names), None)
        if label is None:
            return [f"row {row}" for row in range(table.metadata.num_rows)]
        return [str(value) for value in table.read(columns=[label]).column(0).to_pylist()]
