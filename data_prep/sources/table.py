"""Caption tables: any Parquet, CSV or JSON-lines file with a URL (or path) column and a caption column.

cnclip recognises the column names of LAION-5B metadata and its derivatives in any case; the recipe gives
other names.
"""

import contextlib
import dataclasses
import functools
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import BeforeValidator

from data_prep.rules.address import AROUND
from data_prep.sources import text_file
from data_prep.sources.list_columns import (
    ALL_CAPTIONS,
    becomes_rows,
    refuse_nested_columns,
    with_one_caption,
)
from data_prep.sources.local_server import HOST, IMAGES
from data_prep.sources.parquet_text import has_bad_text, read_text_safely
from data_prep.sources.table_files import parts_of
from data_prep.sources.text_rows import ListCaptions, TextLayout, check_encoding
from pipeline.core import store
from pipeline.core.config import IN_DIGEST_IF_SET
from pipeline.core.files.columns import column as by_name
from pipeline.core.files.columns import is_pattern
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError
from pipeline.core.shard_format import all_captions

Kind = Literal["table", "laion", "wukong", "coco", "visual_genome"]


def _column_name(value: Any) -> Any:
    """A column of a table without a header may be given by its number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


ColumnName = Annotated[str, BeforeValidator(_column_name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSource:
    """One `[[corpus.tables]]` or `[[corpus.sources]]` entry: where a caption table is, its columns.

    Kinds differ only in their presets: `wukong` has no scores; `coco` and `visual_genome` keep captions of
    any length; `visual_genome` joins the captions of one image into one text.
    """

    path: str
    """A file, a folder of parts, a glob pattern or an fsspec URL: `.parquet`, `.csv`, `.tsv`, `.jsonl`,
    `.json`, or `.txt` (one caption per line, for the images of `picture_folder` by name). Also `.gz`.
    """
    name: str
    """The source's name in the funnel."""
    kind: Kind = "table"
    """Preset for a known corpus."""
    url_column: ColumnName | None = None
    """Column of image addresses. Unset: `url` or `URL`."""
    caption_column: ColumnName | None = None
    """Column of captions. Unset: `TEXT`, `text` or `caption`."""
    language_column: ColumnName | None = None
    """Column of language marks. Unset: `LANGUAGE`; a source without it counts as Chinese."""
    score_column: ColumnName | None = None
    """Column of scores. Unset: `similarity`, or `pair_score` in the sidecars of a run."""
    score_pair: str | None = None
    """Pair of encoders that made the scores; scores of different pairs never meet under one threshold. Unset:
    known for LAION-5B and for the sidecars of a run.
    """
    nsfw_column: ColumnName | None = None
    """Column of NSFW marks (UNLIKELY, UNSURE, NSFW, LIKELY). Unset: `NSFW`."""
    unsafe_column: ColumnName | None = None
    """Column of probabilities that an image is unsafe. Unset: `punsafe`."""
    watermark_column: ColumnName | None = None
    """Column of probabilities that an image has a watermark. Unset: `pwatermark`."""
    image_id_column: ColumnName | None = None
    """Column of image numbers. Unset: `image_id` in `coco` and `visual_genome`."""
    image_table: str | None = None
    """Visual Genome's `image_data.json`, which says which images are also in COCO or Flickr."""
    carry_columns: tuple[str, ...] = ()
    """Further columns to keep all the way to the shards."""
    picture_folder: str | None = None
    """Folder of local images. If set, the address column holds paths below it."""
    exempt_from: tuple[str, ...] = ()
    """Rules that do not apply to this source, in addition to those of its kind."""

    join_captions: bool | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Whether the captions of one image become one text. Unset: only in `visual_genome`, whose captions
    describe regions.
    """
    separator: str | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Character between the fields of a CSV or TSV. Unset: a comma, in `.tsv` a tab."""
    quote: str | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Character around fields that hold separators or line ends; empty for none. Unset: `"`, and none if a
    tab separates.
    """
    escape: str | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Character before a quote inside quotes; empty if quotes are doubled. Unset: a backslash if the table's
    beginning shows that it is one (Spark), else empty.
    """
    encoding: str | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Encoding of a text table, such as `gb18030` or `utf-16`. Unset: UTF-8."""
    header: bool | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Whether the first line of a CSV or TSV names the columns; if not, their names are their numbers from 1.
    Unset: yes.
    """
    list_captions: ListCaptions | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """What a list of captions becomes: a row for `each`, a row with the `first`, or a row that keeps all, of
    which training draws one in each epoch at `random`. Unset: lists are refused.
    """
    address_scheme: Literal["http", "https"] | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Scheme of addresses that have none (`//host/a.jpg`). Unset: such rows are dropped as `url_invalid`."""

    def __post_init__(self) -> None:
        if self.list_captions == "random" and (self.joins or self.has_image_ids):
            raise ValueError(f'list_captions = "random" is not for kind {self.kind} or joined captions')
        if self.list_captions == "random" and all_captions("caption") in self.carry_columns:
            raise ValueError(
                'carry_columns names captions, the column of list_captions = "random"; take it out'
            )
        for name in ("separator", "quote", "escape"):
            value = getattr(self, name)
            if value is not None and (
                len(value) > 1 or value in ("\n", "\r") or (name == "separator") > len(value)
            ):
                raise ValueError(f"{name} must be one character, found {value!r}")
        if self.escape and self.escape in (self.quote, self.separator):
            raise ValueError(f"escape {self.escape!r} has another use; a doubled quote needs no escape")
        if self.quote and self.quote == (self.separator or ","):
            raise ValueError(f"quote {self.quote!r} is the separator")
        if self.encoding is not None:
            check_encoding(self.encoding)

    @property
    def layout(self) -> TextLayout:
        """Return how a text table of this source is written."""
        return TextLayout(
            separator=self.separator,
            quote=self.quote,
            escape=self.escape,
            encoding=self.encoding,
            header=self.header,
            list_captions=self.list_captions,
            addresses=self.picture_folder is None,
            image_folder=self.picture_folder,
        )

    @property
    def has_image_ids(self) -> bool:
        """Return whether images have numbers by which images of evaluation sets are dropped."""
        return self.kind in ("coco", "visual_genome")

    @property
    def joins(self) -> bool:
        """Return whether an image's captions become one text (paper, 2.2: Visual Genome's regions)."""
        return self.kind == "visual_genome" if self.join_captions is None else self.join_captions

    @property
    def exemptions(self) -> tuple[str, ...]:
        """Return the rules that do not apply: those of the kind and those of the entry."""
        preset = ("score",) if self.kind == "wukong" else self._preset
        return tuple(dict.fromkeys((*preset, *self.exempt_from)))

    @property
    def lasting_exemptions(self) -> tuple[str, ...]:
        """Return the exemptions that rows keep in a later run, which may score a source without scores."""
        return tuple(dict.fromkeys((*self._preset, *self.exempt_from)))

    @property
    def _preset(self) -> tuple[str, ...]:
        return ("characters",) if self.has_image_ids else ()


# Names in use, in lower case: LAION-5B metadata, its derivatives, img2dataset output, Wukong.
KNOWN_COLUMNS = {
    "url_column": ("url",),
    "caption_column": ("caption", "text"),
    "language_column": ("language",),
    "score_column": ("similarity", "score"),
    "nsfw_column": ("nsfw",),
    "unsafe_column": ("punsafe",),
    "watermark_column": ("pwatermark",),
}
_PAIR_COLUMNS = ("pair_text_encoder", "pair_image_encoder")  # next to pair_score (data_prep.filters.score)
_REQUIRED = ("url_column", "caption_column")
_WIDTH_COLUMNS = ("width", "original_width")
_HEIGHT_COLUMNS = ("height", "original_height")

# Columns of the canonical table that only the text rules read; filter_text does not pass them on.
JUDGED_ONLY = ("language", "nsfw", "unsafe", "watermark")


# For rows read back from shards: names of the rules that do not apply to the row, joined by commas.
EXEMPT_COLUMN = "exempt_from"


def find_files(source: TableSource) -> list[str]:
    """Return the files of a source, sorted.

    Raises:
        InputError: if the source has no files.
    """
    if store.is_local(source.path):
        files = sorted(glob.glob(source.path)) if glob.has_magic(source.path) else [source.path]
    else:
        fs, pattern = store.remote(source.path)
        files = sorted(fs.unstrip_protocol(name) for name in fs.glob(pattern))
    files = [part for path in files for part in parts_of(path, source.name)]
    missing = [path for path in files if not store.exists(path)]
    if missing or not files:
        raise InputError(
            f"{missing[0] if missing else source.path}: no such file (source {source.name});"
            f" correct `path` in [corpus]"
        )
    return files


def scan(
    path: str,
    source: TableSource,
    *,
    is_whole: bool = False,
    first: int = 0,
    count: int | None = None,
) -> pl.LazyFrame:
    """Lazily read one file of a source as the canonical table, rows in file order.

    Rows with bytes that are not UTF-8 are left out, unless the caller knows that all text is valid
    (`is_whole`). Of these, `count` rows from `first` on, under their own numbers.

    Raises:
        InputError: if the file cannot be read or lacks a column; it lists the columns found.
    """
    frame = open_parquet(path)
    with naming_damage(path):
        schema = frame.collect_schema()
    found = schema.names()
    columns = resolve(path, source, found)
    caption = str(columns["caption_column"])
    refuse_nested_columns(path, str(columns["url_column"]), caption, schema, source.list_captions)
    is_cut_late = becomes_rows(schema, caption, source.list_captions)
    if not is_cut_late:
        frame = frame.slice(first, count)  # before rows are numbered: polars then skips what lies before
    if not is_whole and is_damaged_text(path, source):
        frame = pl.concat(list(read_text_safely(path, needed_columns(path, source, found)))).lazy()
        frame = frame.filter(~text_file.is_damaged(found_text(frame.collect_schema())))
    frame = with_one_caption(frame, caption, source.list_captions)
    several = [pl.col(ALL_CAPTIONS)] if source.list_captions == "random" else []
    width = first_column(found, _WIDTH_COLUMNS)
    height = first_column(found, _HEIGHT_COLUMNS)

    def column(role: str, dtype: pl.DataType | type[pl.DataType]) -> pl.Expr:
        name = columns[role]
        return pl.lit(None, dtype=dtype) if name is None else by_name(name).cast(dtype, strict=False)

    def pixels(name: str | None) -> pl.Expr:
        if name is None:
            return pl.lit(None, dtype=pl.Int32)
        return by_name(name).cast(pl.Float64, strict=False).cast(pl.Int32, strict=False)  # "30.0" is 30

    frame = frame.with_row_index("row", offset=0 if is_cut_late else first)
    if is_cut_late:
        frame = frame.slice(first, count)
    return frame.select(
        pl.lit(source.name).alias("source"),
        pl.col("row").cast(pl.Int64),
        _url(columns["url_column"], source).alias("url"),
        column("caption_column", pl.String).alias("caption"),
        column("language_column", pl.String).alias("language"),
        column("score_column", pl.Float32).alias("score"),
        pixels(width).alias("width_px"),
        pixels(height).alias("height_px"),
        column("nsfw_column", pl.String).alias("nsfw"),
        column("unsafe_column", pl.Float32).alias("unsafe"),
        column("watermark_column", pl.Float32).alias("watermark"),
        *(by_name(name) for name in source.carry_columns),
        *several,
    )


def found_text(schema: pl.Schema) -> list[str]:
    """Return the columns of a table that hold text."""
    return [name for name, dtype in schema.items() if dtype == pl.String]


def is_damaged_text(path: str, source: TableSource) -> bool:
    """Return whether the columns that are read from a Parquet file hold bytes that are not UTF-8."""
    stamp = os.stat(path).st_mtime_ns if store.is_local(path) and os.path.exists(path) else 0
    return _is_damaged_text(path, source, stamp)


@functools.lru_cache(maxsize=64)
def _is_damaged_text(path: str, source: TableSource, stamp: int) -> bool:
    frame = open_parquet(path)
    with naming_damage(path):
        return has_bad_text(path, frame, needed_columns(path, source, frame.collect_schema().names()))


def text_layout(path: str, source: TableSource) -> tuple[list[str], TextLayout]:
    """Return the columns of a source's text table, and how the table is written."""
    names = text_file.column_names(path, source.layout)
    roles = resolve(path, source, names)
    return names, dataclasses.replace(source.layout, url=roles["url_column"], caption=roles["caption_column"])


def resolve(path: str, source: TableSource, found: list[str]) -> dict[str, str | None]:
    """Return role → column of a file of this source.

    Raises:
        InputError: if a column is missing; it lists the columns found.
    """
    columns = {
        role: _resolve(path, source, role, names, found, required=role in _REQUIRED)
        for role, names in KNOWN_COLUMNS.items()
    }
    for name in source.carry_columns:
        if is_pattern(name):
            raise InputError(f"{path}: column {name!r} cannot be carried: its name is a pattern; rename it")
        if name not in found:
            raise InputError(f"{path}: no column {name!r} to carry; found {', '.join(found)}")
    return columns


def encoder_pairs(path: str, source: TableSource) -> list[str]:
    """Return the encoder pairs that made a table's scores; empty if it has no scores."""
    frame = open_parquet(path)
    with naming_damage(path):
        found = frame.collect_schema().names()
    column = resolve(path, source, found)["score_column"]
    if column is None:
        return []
    if source.score_pair is None and {column, *_PAIR_COLUMNS} == {"pair_score", *_PAIR_COLUMNS} <= {*found}:
        # A run's sidecar names its pair in columns.
        both = pl.concat_str([pl.col(name) for name in _PAIR_COLUMNS], separator="+")
        with naming_damage(path):
            pairs = frame.select(both.alias("pair")).drop_nulls().unique().collect()["pair"]
        return sorted(pairs)
    with naming_damage(path):
        if not frame.select(by_name(column).is_not_null().any()).collect().item():
            return []
    return [source.score_pair or ("LAION-5B" if source.kind == "laion" else "not named")]


def needed_columns(path: str, source: TableSource, found: list[str]) -> list[str]:
    """Return the columns of a file that `scan` reads, in the file's order."""
    used = {name for name in resolve(path, source, found).values() if name is not None}
    used |= {name for names in (_WIDTH_COLUMNS, _HEIGHT_COLUMNS) if (name := first_column(found, names))}
    used |= set(source.carry_columns)
    if source.image_id_column:
        used.add(source.image_id_column)
    return [name for name in found if name in used]


def first_column(found: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the first known name (in lower case) that a file has in any case."""
    for name in known:
        for candidate in found:
            if candidate.lower() == name:
                return candidate
    return None


def _url(column: str | None, source: TableSource) -> pl.Expr:
    """Return the address of each row; a path below the image folder becomes a loopback address."""
    url = by_name(str(column)).cast(pl.String)
    if source.picture_folder is not None:
        return image_address(source.name, url)
    url = url.str.strip_chars(AROUND)
    if source.address_scheme is None:
        return url
    return url.str.replace(r"^[/\\]{2}", f"{source.address_scheme}://")


def image_address(source: str, path: pl.Expr) -> pl.Expr:
    """Return the address of the run's own server for a path below a source's image folder."""
    # In a file's name these are letters, in an address they would end the path or begin an escape.
    for letter, escape in (("%", "%25"), ("#", "%23"), ("?", "%3F")):
        path = path.str.replace_all(letter, escape, literal=True)
    return pl.concat_str(pl.lit(f"http://{HOST}/{IMAGES}/{source}/"), path)


@contextlib.contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """Raise InputError instead of polars errors for damaged files, which a lazy scan reads late."""
    with foreign(path, "table", "replace the file"):
        store.refuse_special(path)
        yield


def describe(source: TableSource) -> dict[str, object]:
    """Return the source as plain values."""
    return dataclasses.asdict(source)


def from_description(fields: dict[str, object]) -> TableSource:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return TableSource(**values)  # type: ignore[arg-type]


def open_parquet(path: str) -> pl.LazyFrame:
    """Scan a Parquet file; raise InputError for any other kind of file."""
    if path.lower().endswith(".parquet"):
        return pl.scan_parquet(path)
    if text_file.is_text(path):
        raise InputError(f"{path}: a text table is read by the corpus stage first; give its Parquet form")
    raise InputError(f"{path}: unknown kind of table; give .parquet, .csv, .tsv, .jsonl, .json or .txt")


def find_column(
    path: str, source: TableSource, role: str, known: Sequence[str], found: list[str]
) -> str | None:
    """Return the column for a role: the one that the source names, otherwise the first known one, or None."""
    return _resolve(path, source, role, known, found, required=False)


def _resolve(
    path: str, source: TableSource, role: str, known: Sequence[str], found: list[str], required: bool
) -> str | None:
    named: str | None = getattr(source, role)
    if named is not None:
        if named in found:
            return named
        raise InputError(
            f"{path}: no column {named!r} ({role} of source {source.name}); found {', '.join(found)}"
        )
    if name := first_column(found, known):
        return name
    if required:
        raise InputError(
            f"{path}: no column for the {role.removesuffix('_column')} (source {source.name});"
            f" found {', '.join(found)}; name it with {role} in the recipe"
        )
    return None
