"""`cnclip embed`: features of images and of texts in files, for clip-retrieval and FAISS.

Written are `img_emb/img_emb_0.npy` and `text_emb/text_emb_0.npy` (unit-norm), `metadata/metadata_0.parquet`,
whose row i has the path of image i and the caption of text i, null where one side is shorter, and
`model.json`, which says whose features they are. Memory does not grow with the number of images.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from eval.datasets.cnclip_tsv import Base64Images, read_images
from eval.features.model_identity import identify, write_identity
from pipeline.core import store
from pipeline.core.arrays import Float32Array
from pipeline.core.lock import one_at_a_time
from pipeline.core.records import InputError
from pipeline.core.written import check_parquet, naming

if TYPE_CHECKING:
    import polars as pl

    from training.encoder import Encoder

Precision = Literal["float16", "float32"]
T = TypeVar("T")

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_TABLE_ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl")
# Columns that hold an image, as bytes or as a path or URL, and columns that hold a text.
_IMAGE_COLUMNS = ("image_path", "path", "image", "image_bytes", "jpg", "png", "file", "filename", "url")
_TEXT_COLUMNS = ("caption", "text", "query_text", "TEXT", "name_zh")
FEATURE_TYPES = {"float16": "<f2", "float32": "<f4"}
_IMAGES_PER_STEP = 256
_TEXTS_PER_STEP = 16_384  # grouped by length among themselves


@dataclass(frozen=True, slots=True)
class Embedded:
    """What was written."""

    num_images: int
    num_texts: int
    num_truncated: int  # texts that were cut at the context length
    dim: int


@one_at_a_time("out")
def embed_files(
    encoder: "Encoder",
    *,
    images: str | None,
    texts: str | None,
    out: str,
    context_length: int,
    dtype: Precision = "float32",
) -> Embedded:
    """Embed and write; `images` is a folder (in the order of its sorted file names, subfolders included) or a
    table, CN-CLIP's `_imgs.tsv` among them; `texts` a file with one text a line, or a table.

    InputError names the image that cannot be decoded, the table without a known column, or an empty input.
    """
    dim = encoder.model.config.embed_dim
    names, captions, num_truncated = list[str](), list[str](), 0
    if images is not None:
        source = _images(images)
        names = source.names
        path = store.join(out, "img_emb", "img_emb_0.npy")
        chunks = (
            encoder.embed_images(chunk, names=[source.called(row) for row in rows])
            for rows, chunk in zip(
                _chunks(range(len(names)), _IMAGES_PER_STEP),
                _chunks(source.read(), _IMAGES_PER_STEP),
                strict=True,
            )
        )
        _write_features(path, chunks, len(names), dim, dtype)
    if texts is not None:
        captions = _texts(texts)
        path = store.join(out, "text_emb", "text_emb_0.npy")
        counts = list[int]()

        def embedded() -> Iterator[Float32Array]:
            for chunk in _chunks(captions, _TEXTS_PER_STEP):
                tokens_NL, cut = encoder.tokenizer.encode_counting(chunk, context_length)
                counts.append(cut)
                yield encoder.embed_tokens(tokens_NL)

        _write_features(path, embedded(), len(captions), dim, dtype)
        num_truncated = sum(counts)
    write_identity(out, identify(encoder.model))
    _write_metadata(store.join(out, "metadata", "metadata_0.parquet"), names, captions)
    return Embedded(len(names), len(captions), num_truncated, dim)


@dataclass(frozen=True, slots=True)
class _Images:
    """Images in order: what to call them, and how to read them."""

    names: list[str]
    table: str | None = None  # table with the bytes in a column
    column: str | None = None
    folder: str | None = None  # what relative paths are relative to
    base64: Base64Images | None = None  # CN-CLIP's `_imgs.tsv`

    def called(self, row: int) -> str:
        """What a message calls an image."""
        if self.table is not None:
            return f"{self.table}: {self.names[row]}"
        if self.base64 is not None:
            return f"{self.base64.path}: image {self.names[row]}"
        return self._place(self.names[row])

    def read(self) -> Iterator[str | bytes]:
        if self.table is not None and self.column is not None:
            import pyarrow.parquet as pq

            with store.open_read(self.table) as file:
                for batch in pq.ParquetFile(file).iter_batches(_IMAGES_PER_STEP, columns=[self.column]):
                    for row in batch.column(0).to_pylist():
                        yield row if row is not None else b""
            return
        if self.base64 is not None:
            yield from self.base64.read(range(len(self.names)))
            return
        yield from map(self._place, self.names)

    def _place(self, name: str) -> str:
        absolute = os.path.isabs(name) or not store.is_local(name) or self.folder is None
        return name if absolute else store.join(str(self.folder), name)


def _images(source: str) -> _Images:
    if store.is_local(source) and os.path.isdir(source):
        found = sorted(
            os.path.relpath(os.path.join(folder, name), source)
            for folder, _, names in os.walk(source)
            for name in names
            if name.lower().endswith(IMAGE_ENDINGS)
        )
        if not found:
            raise InputError(f"{source}: no image in it (looked for {', '.join(IMAGE_ENDINGS)})")
        return _Images([os.path.join(source, name) for name in found])
    if _is_cn_clips(source):
        images = read_images(source)
        return _Images([str(image_id) for image_id in images.image_ids.tolist()], base64=images)
    import polars as pl

    frame = _scan(source)
    schema = frame.collect_schema()
    column = next((name for name in _IMAGE_COLUMNS if name in schema.names()), None)
    if column is None:
        raise InputError(
            f"{source}: no column of images ({', '.join(_IMAGE_COLUMNS)}); it has {', '.join(schema.names())}"
        )
    if schema[column] == pl.Binary:
        label = next((name for name in ("image_id", "key", "id") if name in schema.names()), None)
        rows = frame.select(pl.len()).collect().item()
        names = (
            [str(value) for value in frame.select(label).collect()[label].to_list()]
            if label
            else [f"row {row}" for row in range(rows)]
        )
        return _Images(names, table=source, column=column)
    paths = frame.select(pl.col(column).cast(pl.String)).collect()[column]
    if paths.null_count() or not len(paths):
        raise InputError(
            f"{source}: column {column}: {paths.null_count()} of {len(paths)} rows name no image"
        )
    return _Images(paths.to_list(), folder=os.path.dirname(source) or ".")


def _is_cn_clips(source: str) -> bool:
    """A TSV that begins with a number, as CN-CLIP's `_imgs.tsv`, and not with the names of columns."""
    if not source.endswith(".tsv") or not store.exists(source):
        return False
    with store.open_read(source) as file:
        first, tab, _ = bytes(file.read(32)).partition(b"\t")
    return bool(tab) and first.isdigit()


def _texts(source: str) -> list[str]:
    if source.endswith(_TABLE_ENDINGS):
        import polars as pl

        frame = _scan(source)
        names = frame.collect_schema().names()
        column = next((name for name in _TEXT_COLUMNS if name in names), None)
        if column is None:
            raise InputError(
                f"{source}: no column of texts ({', '.join(_TEXT_COLUMNS)}); it has {', '.join(names)}"
            )
        texts: list[str] = (
            frame.select(pl.col(column).cast(pl.String).fill_null("")).collect()[column].to_list()
        )
    else:
        try:
            text = store.read_text(source)
        except OSError as error:
            raise InputError(f"{source}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{source}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
        texts = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
        if texts[-1] == "":  # the last line's end
            texts.pop()
    if not texts:
        raise InputError(f"{source}: no text in it; give one text a line")
    return texts


def _scan(source: str) -> "pl.LazyFrame":
    import polars as pl

    if not store.exists(source):
        raise InputError(f"{source}: no such file or folder")
    try:
        if source.endswith(".parquet"):
            frame = pl.scan_parquet(source)
        elif source.endswith((".csv", ".tsv")):
            frame = pl.scan_csv(source, separator="\t" if source.endswith(".tsv") else ",")
        elif source.endswith(".jsonl"):
            frame = pl.scan_ndjson(source)
        else:
            raise InputError(f"{source}: neither a folder nor a table ({', '.join(_TABLE_ENDINGS)})")
        frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{source}: not a readable table: {str(error).splitlines()[0]}") from None
    return frame


def _chunks(items: Iterable[T], size: int) -> Iterator[Sequence[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _write_features(
    path: str, chunks: Iterable[Float32Array], num_rows: int, dim: int, dtype: Precision
) -> None:
    """Write a .npy chunk by chunk; it appears once whole. InputError for features that are not finite."""
    with store.publish(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": FEATURE_TYPES[dtype], "fortran_order": False, "shape": (num_rows, dim)}
        )
        written = 0
        for chunk_ND in chunks:
            if not np.isfinite(chunk_ND).all():
                raise InputError(f"{path}: the model gives NaN: its weights or the input are damaged")
            file.write(np.ascontiguousarray(chunk_ND, dtype=FEATURE_TYPES[dtype]).tobytes())
            written += len(chunk_ND)
        if written != num_rows:
            raise InputError(
                f"{path}: the input has {written} rows now, {num_rows} before: it changed meanwhile"
            )


def _write_metadata(path: str, names: Sequence[str], captions: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_rows = max(len(names), len(captions))
    columns = {
        name: pa.array([*values, *[None] * (num_rows - len(values))], pa.string())
        for name, values in (("image_path", names), ("caption", captions))
        if len(values)
    }
    with store.publish(path) as temporary, naming(path):
        pq.write_table(pa.table(columns), temporary)
        check_parquet(temporary, path, num_rows)
