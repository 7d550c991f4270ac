"""Images that are here already: Chinese-CLIP's TSV and LMDB, img2dataset's output, a run's shards, tars of
webdataset, folders of Hugging Face `datasets` and of images with a text file each.

A pair becomes a row of a caption table with two addresses: `url`, what the row is known by, and `picture_at`,
where the loopback site (`data_prep.sources.local_server`) finds the image's bytes, so that images from disk
take the same way through the resizer as those from the web. Images in files of their own need no second
address: their table has an image folder.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import polars as pl
import pyarrow as pa

from data_prep.accounting.drop_table import drops_as_they_come
from data_prep.formats.parquet import write_table
from data_prep.sources.readers import cn_clip, huggingface, image_folder, tars
from data_prep.sources.readers.copies import Copies, copies
from data_prep.sources.readers.places import find_files, served_folder
from data_prep.sources.readers.source import IMAGE_AT, PackedSource, Part
from data_prep.sources.regions import Converted, Places, malformed_rows
from data_prep.sources.table import TableSource
from data_prep.sources.text_rows import BETWEEN
from pipeline.core import store
from pipeline.core.files.written import ParquetRows, parquet_rows
from pipeline.core.records import InputError
from pipeline.core.shard_format import sidecar_of

_TARS = (".tar", ".tar.gz", ".tgz")


def pieces(source: PackedSource) -> list[list[str]]:
    """Files of each task, such as one tar and its table. InputError where one is missing."""
    folder = Path(source.path)
    if source.kind == "cn_clip_tsv":
        files = [str(folder / f"{source.split}{suffix}") for suffix in ("_imgs.tsv", "_texts.jsonl")]
        _exist(source, files)
        return [files]
    if source.kind == "cn_clip_lmdb":
        root = folder / "lmdb" / source.split if (folder / "lmdb").is_dir() else folder / source.split
        files = [str(root / name / "data.mdb") for name in ("pairs", "imgs")]
        _exist(source, files)
        return [files]
    if source.kind == "webdataset":
        return _webdataset(source)
    if source.kind == "huggingface":
        return huggingface.pieces(source)
    if source.kind == "folder":
        if not folder.is_dir():
            raise InputError(f"{source.path}: no such folder (source {source.name}); correct its path")
        return [[source.path]]
    found = sorted(folder.glob("*.tar"))
    if not found and source.kind == "img2dataset":
        return _img2dataset_without_tars(source)
    if not found:
        raise InputError(f"{source.path}: no .tar of a run's shards (source {source.name})")
    both = [[str(tar), sidecar_of(str(tar))] for tar in found]
    for tar_path, table_path in both:
        if source.kind == "img2dataset" and not os.path.isfile(table_path):
            raise InputError(
                f"{table_path}: no such file (source {source.name}): img2dataset writes this table next to"
                f" {os.path.basename(tar_path)}, and its captions and addresses are needed; add it, or set"
                ' kind = "webdataset", which reads tars by themselves'
            )
    for files in both:
        _exist(source, files)
    return both


def digests(source: PackedSource, files: Sequence[str]) -> dict[str, str] | None:
    """Return the inputs of a piece whose files are too many to name; None for the digests of its files."""
    if source.kind == "folder":
        return {"images and texts": image_folder.listing_digest(files[0])}
    if source.kind == "img2dataset" and len(files) == 1 and os.path.isdir(tars.folder_beside(files[0])):
        images = image_folder.listing_digest(tars.folder_beside(files[0]))
        return {"table": store.digest_file(files[0]), "images and texts": images}
    return None


def unpack(
    source: PackedSource,
    files: list[str],
    to: Places,
    exemptions: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Converted:
    """Write one piece as a caption table with columns url, caption, picture_at.

    Rows of shards keep what they are exempt from; `exemptions` (source → rules) is that of their run.
    """
    with (
        malformed_rows(to.malformed) as malformed,
        drops_as_they_come(to.drops) as listed,
        copies(source, to.copies) as copied,
        _table(to.table) as table,
    ):
        for part in _read(source, files, copied, exemptions):
            malformed.add(part.malformed)
            for reason, dropped in part.dropped.items():
                listed.add(_with_first_caption(dropped, source), reason)
            table.add(part.rows)
    description = TableSource(
        path=to.table,
        name=source.name,
        url_column="url",
        caption_column="caption",
        carry_columns=tuple(name for name in table.columns if name not in ("url", "caption")),
        picture_folder=None if IMAGE_AT in table.columns else served_folder(source.path),
        exempt_from=source.exempt_from,
        list_captions="random" if source.list_captions == "random" else None,
    )
    counts = dict(sorted((listed.counts + malformed.counts).items()))
    return Converted(
        description, table.num_rows, counts, num_drops=listed.counts.total(), num_copies=copied.count
    )


def _with_first_caption(rows: pl.DataFrame, source: PackedSource) -> pl.DataFrame:
    """Return rows by whose first caption they are known, if a row keeps several."""
    if source.list_captions != "random":
        return rows
    return rows.with_columns(pl.col("caption").str.split(BETWEEN).list.first())


def _read(
    source: PackedSource, files: list[str], copied: Copies, exemptions: Mapping[str, Sequence[str]]
) -> Iterator[Part]:
    match source.kind:
        case "cn_clip_tsv":
            return cn_clip.read_tsv(source, files)
        case "cn_clip_lmdb":
            return cn_clip.read_lmdb(source, files)
        case "img2dataset":
            return tars.read_img2dataset(source, files, copied)
        case "webdataset":
            return tars.read_webdataset(source, files, copied)
        case "shards":
            return tars.read_shards(source, files, exemptions)
        case "folder":
            return image_folder.read_folder(source)
        case "huggingface":
            if huggingface.is_metadata(files[0]):
                return image_folder.read_metadata(source, files[0])
            return huggingface.read_table(source, files[0], copied)


class _Table:
    """A caption table that is written part by part; the first part has the columns of all."""

    def __init__(self, path: str, stack: contextlib.ExitStack) -> None:
        self.columns: list[str] = []
        self.num_rows = 0
        self._path, self._stack = path, stack
        self._first: pl.DataFrame | None = None
        self._writer: ParquetRows | None = None

    def add(self, rows: pl.DataFrame) -> None:
        """Add rows to those that are there."""
        self.num_rows += rows.height
        if not self.columns:
            self._first, self.columns = rows, rows.columns
            return
        if self._first is not None:
            first, self._first = _arrow(self._first), None
            self._writer = self._stack.enter_context(parquet_rows(self._path, first.schema))
            self._schema = first.schema
            self._writer.write_table(first)
        if self._writer is not None and rows.height:
            self._writer.write_table(_arrow(rows).cast(self._schema))

    def finish(self) -> None:
        """Write a table of one part, as tables that are made at once are written."""
        if self._first is not None:
            write_table(self._first, self._path)


def _arrow(rows: pl.DataFrame) -> pa.Table:
    return rows.to_arrow(compat_level=pl.CompatLevel.oldest())


@contextlib.contextmanager
def _table(path: str) -> Iterator[_Table]:
    """Publish the caption table that is written while the block runs."""
    with contextlib.ExitStack() as stack:
        table = _Table(path, stack)
        yield table
        table.finish()


def _webdataset(source: PackedSource) -> list[list[str]]:
    found = find_files(source.path, _TARS, source.name)
    if not found:
        raise InputError(f"{source.path}: no .tar in it or below it (source {source.name})")
    for path in found:
        if path.endswith(_TARS[1:]) and (plain := _plain(path)) in found:
            raise InputError(
                f"{path}: {os.path.basename(plain)} next to it holds the same; remove one of them"
            )
    return [[path] for path in found]


def _plain(path: str) -> str:
    return path.removesuffix(".gz") if path.endswith(".gz") else path.removesuffix(".tgz") + ".tar"


def _img2dataset_without_tars(source: PackedSource) -> list[list[str]]:
    """Return the tables of img2dataset's `files` and `parquet` outputs, each a piece."""
    tables = [str(path) for path in sorted(Path(source.path).glob("*.parquet"))]
    for table in tables:
        if not os.path.isdir(tars.folder_beside(table)) and tars.image_column(table) is None:
            raise InputError(
                f"{table}: neither a .tar nor a folder of that name next to it, nor a column of images in it"
                f" (source {source.name}); copy img2dataset's output again"
            )
    if not tables:
        raise InputError(
            f"{source.path}: neither .tar nor .parquet of img2dataset's output (source {source.name}); give"
            " the folder that holds 00000.parquet"
        )
    return [[table] for table in tables]


def _exist(source: PackedSource, files: list[str]) -> None:
    for path in files:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file (source {source.name}, {source.kind}); correct its path")
