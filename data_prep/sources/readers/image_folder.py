"""Folders of images with a text file next to each, or with the metadata file of Hugging Face's imagefolder.

A row is known by its image's path below the folder, as in tables with `picture_folder`.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence

import polars as pl

from data_prep.formats.tar_images import EXTENSIONS, MOST_TEXT_BYTES, TEXTS
from data_prep.sources import text_file
from data_prep.sources.list_columns import refuse_nested_columns, with_one_caption, with_one_text
from data_prep.sources.parquet_text import read_text_safely
from data_prep.sources.readers.columns import choose_caption, choose_name
from data_prep.sources.readers.places import files_below, inside, served_folder
from data_prep.sources.readers.source import IMAGE_MISSING, IMAGE_OUTSIDE, PackedSource, Part
from data_prep.sources.readers.texts import Texts, texts_of
from data_prep.sources.table import found_text, image_address
from data_prep.sources.text_rows import MALFORMED_ENCODING, Malformed, RowBatch, TextLayout, malformed
from pipeline.core import store
from pipeline.core.files.columns import column
from pipeline.core.files.foreign import foreign
from pipeline.core.files.image_files import is_hidden
from pipeline.core.records import DropReason, InputError

_ROWS_AT_ONCE = 10_000
_FILE_NAME = "file_name"  # of imagefolder; other columns of files end in it
_PAIR = {"url": pl.String, "caption": pl.String}


def listing_digest(folder: str) -> str:
    """Return a digest of a folder's files: names and sizes of images, and what the texts say."""
    seen = hashlib.sha256()
    for path in files_below(folder):
        ending = _split(os.path.basename(path))[1]
        if ending in TEXTS and os.path.isfile(path):
            facts = store.digest_file(path)
        elif ending in EXTENSIONS and os.path.isfile(path):
            facts = str(os.path.getsize(path))
        else:
            continue
        seen.update(os.fsencode(os.path.relpath(path, folder)) + b"\0" + facts.encode() + b"\0")
    return seen.hexdigest()


def read_folder(source: PackedSource) -> Iterator[Part]:
    """Yield the images of a folder and below it in order, each with the caption of its own text file.

    Raises:
        InputError: if no image has one.
    """
    root = served_folder(source.path)
    found = _Found(source)
    for place, folders, names in os.walk(source.path):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        relative = os.path.relpath(os.path.abspath(place), root).replace(os.sep, "/")
        texts: dict[str, dict[str, str]] = {}
        images = list[str]()
        for name in sorted(names):
            stem, ending = _split(name)
            if is_hidden(name) or not os.path.isfile(os.path.join(place, name)):
                continue
            if ending in TEXTS:
                texts.setdefault(stem, {})[ending] = name
            elif ending in EXTENSIONS:
                images.append(name)
        for name in images:
            stem, _ = _split(name)
            own = {**texts.get(stem, {}), **texts.get(name, {})}  # cat.txt, and cat.jpg.txt
            found.add_image(root, place, relative, name, own)
            if found.is_full:
                yield found.take()
        of_images = {key for name in images for key in (name, _split(name)[0])}
        for key in sorted({*texts} - of_images):
            found.add_text(place, relative, texts[key])
    yield found.take()
    if not found.num_captions:
        raise InputError(
            f"{source.path}: no image with a .txt, .caption or .json of the same name (source {source.name});"
            f" {_remedy(source.path)}"
        )


class _Found:
    """Rows of a folder that wait to be handed on."""

    def __init__(self, source: PackedSource) -> None:
        self.num_captions = 0  # so far
        self._source = source
        self._clear()

    @property
    def is_full(self) -> bool:
        return len(self._rows) >= _ROWS_AT_ONCE

    def take(self) -> Part:
        """Return the rows that wait."""
        dropped = {
            reason: _frame(rows).with_columns(url=image_address(self._source.name, pl.col("url")))
            for reason, rows in self._dropped.items()
        }
        part = Part(_frame(self._rows), dropped, self._malformed)
        self._clear()
        return part

    def add_image(self, root: str, place: str, relative: str, name: str, own: Mapping[str, str]) -> None:
        """Note an image with its text files, ending → name."""
        path = name if relative == "." else f"{relative}/{name}"
        if not _is_text(path):
            self._malformed.append(
                malformed(MALFORMED_ENCODING, os.fsencode(path).decode("utf-8", "replace"))
            )
            return
        texts = self._texts(place, path, own)
        if isinstance(texts, Malformed):
            self._malformed.append(texts)
            return
        self.num_captions += bool(own)
        full = os.path.join(place, name)
        is_inside = not os.path.islink(full) or inside(root, full) is not None
        rows = self._rows if is_inside else self._dropped.setdefault(IMAGE_OUTSIDE, [])
        rows += [(path, caption) for caption in texts.captions]

    def add_text(self, place: str, relative: str, own: Mapping[str, str]) -> None:
        """Note text files without their image."""
        name = next(iter(own.values()))
        path = os.fsencode(name if relative == "." else f"{relative}/{name}").decode("utf-8", "replace")
        texts = self._texts(place, path, own)
        if isinstance(texts, Malformed):
            self._malformed.append(texts)
        else:
            self._dropped.setdefault(IMAGE_MISSING, []).extend((path, text) for text in texts.captions)

    def _texts(self, place: str, path: str, own: Mapping[str, str]) -> Texts | Malformed:
        files = {ending: os.path.join(place, name) for ending, name in own.items()}
        data = {
            ending: store.read_bytes(file)
            for ending, file in files.items()
            if os.path.getsize(file) <= MOST_TEXT_BYTES
        }
        return texts_of(place, os.path.splitext(path)[0], data, self._source)

    def _clear(self) -> None:
        self._rows = list[tuple[str, str | None]]()
        self._dropped = dict[DropReason, list[tuple[str, str | None]]]()
        self._malformed = list[Malformed]()


def read_metadata(source: PackedSource, path: str) -> Iterator[Part]:
    """Yield the rows of an imagefolder's metadata file whose images are there.

    Raises:
        InputError: if the columns of names and captions are not clear; it lists them.
    """
    if path.endswith(".parquet"):
        with foreign(path, "table", "copy it again"):
            schema = pl.read_parquet_schema(path)
        names = list(schema)
    else:
        names = text_file.column_names(path)
    file = source.image_column or _file_column(path, names)
    caption = source.caption_column or choose_caption(path, names)
    if missing := [name for name in (file, caption, *source.carry_columns) if name not in names]:
        raise InputError(
            f"{path}: no column {missing[0]!r} (source {source.name}); found {', '.join(names)}; correct its"
            " name"
        )
    columns = list(dict.fromkeys((file, caption, *source.carry_columns)))
    batches: Iterator[RowBatch]
    if path.endswith(".parquet"):
        refuse_nested_columns(path, file, caption, pl.Schema(schema), source.list_captions)
        batches = _parquet_batches(source, path, columns, caption)
    else:
        layout = TextLayout(url=file, caption=caption, list_captions=source.list_captions, addresses=False)
        batches = text_file.read_batches(path, columns, layout)
    root = served_folder(source.path)
    folder = os.path.relpath(os.path.abspath(os.path.dirname(path)), root)
    prefix = "" if folder == "." else f"{folder}/"
    known = pl.DataFrame({"url": _files(root, os.path.dirname(path))}, schema={"url": pl.String})
    for batch in batches:
        carried = {name: column(name) for name in source.carry_columns}
        rows = batch.rows.select(
            url=prefix + column(file).str.replace(r"^(\./)+", ""), caption=column(caption), **carried
        )
        missing_rows = rows.join(known, on="url", how="anti", maintain_order="left")
        address = image_address(source.name, pl.col("url"))
        yield Part(
            rows.join(known, on="url", how="semi", maintain_order="left"),
            {IMAGE_MISSING: missing_rows.select(url=address, caption="caption")},
            batch.malformed,
        )


def _parquet_batches(
    source: PackedSource, path: str, columns: Sequence[str], caption: str
) -> Iterator[RowBatch]:
    for rows in read_text_safely(path, columns):
        if source.list_captions == "random":
            unfolded = with_one_text(rows.lazy(), caption).collect()
        else:
            unfolded = with_one_caption(rows.lazy(), caption, source.list_captions).collect()
        yield text_file.without_damaged(unfolded, found_text(unfolded.schema))


def _file_column(path: str, names: Sequence[str]) -> str:
    known = [_FILE_NAME] if _FILE_NAME in names else [name for name in names if name.endswith(_FILE_NAME)]
    return choose_name(path, "file name", "image_column", names, known)


def _files(root: str, folder: str) -> list[str]:
    """Return the paths of the files in a folder and below it, from the root; links to elsewhere are none."""
    return [
        os.path.relpath(os.path.abspath(file), root).replace(os.sep, "/")
        for file in files_below(folder)
        if _is_text(file) and (not os.path.islink(file) or inside(root, file) is not None)
    ]


def _frame(rows: Sequence[tuple[str, str | None]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=_PAIR, orient="row")


def _split(name: str) -> tuple[str, str]:
    """Return a file's name without its ending, and the ending in lower case."""
    stem, _, ending = name.rpartition(".")
    return (stem, ending.lower()) if stem else (name, "")


def _is_text(path: str) -> bool:
    """Return whether a path is UTF-8, as addresses are."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _remedy(folder: str) -> str:
    names = {os.path.basename(path) for path in files_below(folder)}
    if found := sorted(names & {"metadata.jsonl", "metadata.csv", "metadata.parquet"}):
        return f'kind = "huggingface" reads {found[0]}'
    return 'for captions in one table give kind = "table" with picture_folder'
