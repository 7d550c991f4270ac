"""Caption tables: any Parquet, CSV or JSON-lines file with a URL (or path) column and a caption column.

Column names of LAION-5B metadata and of its derivatives are found by themselves, whatever their case;
other names are given in the recipe.
"""

import contextlib
import dataclasses
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from data_prep.site import HOST, PICTURES
from pipeline import store
from pipeline.records import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSource:
    """One `[[corpus.tables]]` entry: where a caption table lies and what its columns are called."""

    path: str  # a file, a glob pattern, or an fsspec URL; .parquet, .csv, .tsv or .jsonl
    name: str  # the source's name in the funnel
    url_column: str | None = None  # found by itself: url, URL
    caption_column: str | None = None  # found by itself: TEXT, text, caption
    language_column: str | None = None  # found by itself: LANGUAGE; a source without it is taken as Chinese
    score_column: str | None = None  # found by itself: similarity
    carry_columns: tuple[str, ...] = ()  # further columns to keep all the way to the shards
    picture_folder: str | None = None  # set where the URL column holds paths of pictures below this folder
    exempt_from: tuple[str, ...] = ()  # text rules that do not apply to this source: length, score, language


# Names in use: LAION-5B metadata (upper case), its lower-case derivatives, img2dataset output, Wukong.
_KNOWN_COLUMNS = {
    "url_column": ("url", "URL"),
    "caption_column": ("caption", "TEXT", "text", "CAPTION"),
    "language_column": ("LANGUAGE", "language"),
    "score_column": ("similarity", "SIMILARITY", "score"),
}
_WIDTH_COLUMNS = ("WIDTH", "width", "original_width")
_HEIGHT_COLUMNS = ("HEIGHT", "height", "original_height")

# Columns of the table that every source becomes, in order; carried columns follow.
CANONICAL_COLUMNS = ("source", "row", "url", "caption", "language", "score", "width_px", "height_px")


def find_files(source: TableSource) -> list[str]:
    """Files of a source, sorted; InputError where there is none."""
    if store.is_local(source.path):
        files = sorted(glob.glob(source.path)) if glob.has_magic(source.path) else [source.path]
    else:
        import fsspec

        fs, pattern = fsspec.core.url_to_fs(source.path)
        files = sorted(fs.unstrip_protocol(name) for name in fs.glob(pattern))
    missing = [path for path in files if not store.exists(path)]
    if missing or not files:
        raise InputError(
            f"{missing[0] if missing else source.path}: no such file (source {source.name});"
            f" correct `path` in [[corpus.tables]]"
        )
    return files


def scan(path: str, source: TableSource) -> pl.LazyFrame:
    """Lazily read one file of a source as the canonical table (see CANONICAL_COLUMNS), rows in file order.

    InputError where the file cannot be read or lacks a column: it lists the columns found.
    """
    frame = _open(path)
    with naming_damage(path):
        found = frame.collect_schema().names()
    columns = {
        role: _resolve(path, source, role, names, found, required=role in ("url_column", "caption_column"))
        for role, names in _KNOWN_COLUMNS.items()
    }
    for name in source.carry_columns:
        if name not in found:
            raise InputError(f"{path}: no column {name!r} to carry; found {', '.join(found)}")
    width = next((name for name in _WIDTH_COLUMNS if name in found), None)
    height = next((name for name in _HEIGHT_COLUMNS if name in found), None)

    def column(name: str | None, dtype: pl.DataType | type[pl.DataType]) -> pl.Expr:
        return pl.lit(None, dtype=dtype) if name is None else pl.col(name).cast(dtype, strict=False)

    return frame.with_row_index("row").select(
        pl.lit(source.name).alias("source"),
        pl.col("row").cast(pl.Int64),
        _url(columns["url_column"], source).alias("url"),
        column(columns["caption_column"], pl.String).alias("caption"),
        column(columns["language_column"], pl.String).alias("language"),
        column(columns["score_column"], pl.Float32).alias("score"),
        column(width, pl.Int32).alias("width_px"),
        column(height, pl.Int32).alias("height_px"),
        *(pl.col(name) for name in source.carry_columns),
    )


def _url(column: str | None, source: TableSource) -> pl.Expr:
    """The address of each row; a path below the picture folder becomes one of the loopback site's."""
    url = pl.col(str(column)).cast(pl.String)
    if source.picture_folder is None:
        return url
    return pl.concat_str(pl.lit(f"http://{HOST}/{PICTURES}/{source.name}/"), url)


@contextlib.contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """InputError in place of what polars raises where a file's inside is damaged: a scan reads it late."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(
            f"{path}: cannot be read as a table: {str(error).splitlines()[0]}; replace the file"
        ) from None


def describe(source: TableSource) -> dict[str, object]:
    """The source as plain values, for a task's arguments."""
    return dataclasses.asdict(source)


def from_description(fields: dict[str, object]) -> TableSource:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return TableSource(**values)  # type: ignore[arg-type]


def _open(path: str) -> pl.LazyFrame:
    name = path.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return pl.scan_parquet(path)
    if name.endswith((".csv", ".tsv")):
        return pl.scan_csv(path, separator="\t" if name.endswith(".tsv") else ",", infer_schema=False)
    if name.endswith((".jsonl", ".ndjson")):
        return pl.scan_ndjson(path, infer_schema_length=1000)
    raise InputError(f"{path}: unknown kind of table; give .parquet, .csv, .tsv or .jsonl")


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
    for name in known:
        if name in found:
            return name
    if required:
        raise InputError(
            f"{path}: no column for the {role.removesuffix('_column')} (source {source.name});"
            f" found {', '.join(found)}; name it with {role} in the recipe"
        )
    return None
