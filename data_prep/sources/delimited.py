"""Reads CSV and TSV so that every line belongs to one row or to one that is set aside.

Compiled readers parse lines without quotes, and lines whose quotes close, many at a time. A line that leaves
a quote open is followed through the next lines: the quote must close at the end of a field, and the row must
have as many fields as the header. Otherwise only the first line is malformed and reading restarts at the
second, so that no quote swallows rows.
"""

import bisect
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.csv

from data_prep.sources.text_lines import BLOCK_BYTES, head_of, lines_of, plain_name, unreadable
from data_prep.sources.text_rows import (
    MALFORMED_COLUMNS,
    MALFORMED_HEADER,
    MALFORMED_QUOTE,
    Malformed,
    RowBatch,
    TextLayout,
    malformed,
)
from pipeline.core.records import InputError

_MOST_COMPILED_FIELDS = 64  # in one expression; wider rows with quotes are parsed one at a time
_LOOKED_AT = 1000  # lines with \" that are sampled to learn what it means
_ADDRESS = re.compile(r"""[\s"']*(https?:)?//[^\s,]+[\s"']*""")
_IS_ADDRESS = re.compile(r"\s*https?://\S+\s*")
_SEPARATORS = {"\t": r"\t", ",": ",", ";": ";", "|": "|"}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a table is written, with every setting resolved."""

    names: tuple[str, ...]
    has_header: bool
    separator: str
    quote: str  # "": none
    escape: str  # "": a quote inside quotes is doubled


def dialect_of(path: str, layout: TextLayout) -> Dialect:
    """Learn how a table is written from its source's settings, its name and its first lines."""
    separator = layout.separator or ("\t" if plain_name(path).endswith(".tsv") else ",")
    # TSV has no quoting: a quote at the start of a caption belongs to the caption.
    quote = layout.quote if layout.quote is not None else ("" if separator == "\t" else '"')
    head = head_of(path, layout)
    first = head.split("\n", 1)[0].rstrip("\r")
    if not first:
        raise unreadable(path, "it is empty")
    if len(first) > BLOCK_BYTES // 16:
        raise unreadable(path, f"its first line is longer than {BLOCK_BYTES >> 24} MiB")
    escape = layout.escape
    if escape is None:
        escape = "\\" if quote and _escapes_by_backslash(head, separator, quote) else ""
    fields = _Fields(separator, quote, escape)
    found, _ = fields.split(first)
    names = [name.strip() for name in found]
    if layout.header is False:
        names = [str(number) for number in range(1, len(found) + 1)]
        return Dialect(tuple(names), False, separator, quote, escape)
    _refuse_no_header(path, names, separator, quote)
    return Dialect(tuple(names), True, separator, quote, escape)


def read_delimited(path: str, columns: Sequence[str], layout: TextLayout) -> Iterator[RowBatch]:
    """Read a table in batches; an empty field becomes null."""
    dialect = dialect_of(path, layout)
    url = layout.url if layout.addresses else None
    reader = _Reader(dialect, columns, dialect.names.index(url) if url in dialect.names else None)
    left = list[str]()
    pieces = lines_of(path, layout)
    following = next(pieces, None)
    skip = int(dialect.has_header)
    while following is not None:
        lines, following = left + following[skip:], next(pieces, None)
        skip = 0
        batch, left = reader.read(lines, is_last=following is None)
        if sum(map(len, left)) > BLOCK_BYTES:  # no value is this long: its quote never closes
            batch, left = reader.read(lines, is_last=True)
        yield batch


def _refuse_no_header(path: str, names: list[str], separator: str, quote: str) -> None:
    where = [number for number, name in enumerate(names, 1) if _IS_ADDRESS.fullmatch(name)]
    if where:
        others = [number for number in range(1, len(names) + 1) if number not in where]
        caption = f', caption_column = "{others[0]}"' if len(others) == 1 else ", caption_column = its number"
        raise InputError(
            f"{path}: its first line is a row, not a header: column {where[0]} holds an address; set header ="
            f' false, url_column = "{where[0]}"{caption} in its source'
        )
    if not quote and len(names) > 1 and all(re.fullmatch('".*"', name) for name in names):
        raise InputError(f"{path}: its header is in quotes; set quote = '\"' in its source")
    if len(names) == 1:
        for other, shown in _SEPARATORS.items():
            if other != separator and other in names[0]:
                raise InputError(
                    f'{path}: its header {names[0][:80]!r} is a single column: set separator = "{shown}" in'
                    " its source, if that is what separates the columns"
                )
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(f"{path}: its header names {name[:80]!r} twice; rename one of the columns")


def _escapes_by_backslash(head: str, separator: str, quote: str) -> bool:
    """Return whether more lines are well formed if a backslash escapes the quote after it."""
    doubled, escaped = _Fields(separator, quote, ""), _Fields(separator, quote, "\\")
    lines = (line for line in head.split("\n") if f"\\{quote}" in line)
    seen = [line.rstrip("\r") for line in itertools.islice(lines, _LOOKED_AT)]
    return sum(map(escaped.is_strict, seen)) > sum(map(doubled.is_strict, seen))


class _Fields:
    """The fields of one row's text."""

    def __init__(self, separator: str, quote: str, escape: str) -> None:
        self.separator, self.quote, self.escape = separator, quote, escape
        sep, q, esc = re.escape(separator), re.escape(quote), re.escape(escape)
        # Blanks around a quoted field are not part of the value.
        blank = "[ ]*" if separator == "\t" else r"[ \t]*"
        if not quote:
            self.plain = self.any = rf"[^{sep}]*"
            self.tight = self.plain
            self.inside = self.quoted = None
        else:
            inner = rf"[^{q}{esc}]*(?:{esc}[\s\S][^{q}{esc}]*)*" if escape else rf"[^{q}]*(?:{q}{q}[^{q}]*)*"
            self.plain = rf"{blank}(?:[^{q}{sep} \t][^{sep}]*)?"
            self.quoted = rf"{blank}{q}{inner}{q}{blank}"
            self.tight = rf"(?:{q}{inner}{q}|{self.plain})"  # no blanks around quotes, as others want it
            self.any = rf"(?:{blank}{q}{inner}{q}(?:[^{q}{sep}][^{sep}]*)?|{self.plain})"
            self.inside = re.compile(rf"{inner}{q}" if escape else rf"{inner}{q}(?!{q})")
            self._quoted = re.compile(rf"{blank}{q}({inner}){q}{blank}")
        self.strict = rf"(?:{self.quoted}|{self.plain})" if quote else self.plain
        self._any = re.compile(f"{sep}{self.any}")
        self._strict = re.compile(f"{self.strict}(?:{sep}{self.strict})*")
        self._doubled = quote * 2
        self._escapes = re.compile(rf"{esc}([{q}{esc}])") if quote and escape else None

    def is_strict(self, text: str) -> bool:
        """Return whether each field is either quoted as a whole or does not begin with a quote."""
        return self._strict.fullmatch(text) is not None

    def split(self, text: str) -> tuple[list[str], bool]:
        """Return the values of a row and whether its text ends outside of quotes."""
        text = self.separator + text
        found, end = list[str](), 0
        while end < len(text) and (match := self._any.match(text, end)):
            found.append(match.group()[1:])
            end = match.end()
        return [self._value(field) for field in found], end == len(text)

    def _value(self, field: str) -> str:
        if not self.quote or not (match := self._quoted.fullmatch(field)):
            return field  # a quote that closes before the field's end is literal
        if self._escapes:
            return self._escapes.sub(r"\1", match[1])
        return match[1].replace(self._doubled, self.quote)


class _Reader:
    """Reads lines of one table; `address`: the column of web addresses, if the table has one."""

    def __init__(self, dialect: Dialect, columns: Sequence[str], address: int | None) -> None:
        self._dialect, self._columns, self._address = dialect, list(columns), address
        self._fields = _Fields(dialect.separator, dialect.quote, dialect.escape)
        self._num = len(dialect.names)
        self._wanted = [dialect.names.index(name) for name in columns]
        sep = re.escape(dialect.separator)
        strict = self._fields.tight
        self._one_row = None
        if dialect.quote and self._num <= _MOST_COMPILED_FIELDS:
            self._one_row = f"^{strict}(?:{sep}{strict}){{{self._num - 1}}}$"

    def read(self, lines: list[str], *, is_last: bool) -> tuple[RowBatch, list[str]]:
        """Return the rows of these lines, and the last lines if their row is still incomplete."""
        frame = pl.DataFrame({"line": lines}, schema={"line": pl.String}).with_row_index("at")
        line = pl.col("line").str.strip_suffix("\r")
        frame = frame.with_columns(line).filter(line != "")
        has_quote = pl.lit(False)
        if quote := self._dialect.quote:
            has_quote = pl.col("line").str.contains(quote, literal=True)
        plain = frame.filter(~has_quote)
        count = pl.col("line").str.count_matches(self._dialect.separator, literal=True) == self._num - 1
        quoted = frame.filter(has_quote)
        is_strict = pl.lit(False)
        if self._one_row is not None:
            is_strict = pl.col("line").str.contains(self._one_row) & ~pl.col("line").str.contains("[\r\n]")
            if self._dialect.escape:
                is_strict &= ~pl.col("line").str.contains(self._dialect.escape, literal=True)
        quoted = quoted.with_columns(_strict=is_strict)
        followed = self._follow(lines, quoted, is_last=is_last)
        taken = pl.Series("at", sorted(followed.taken), dtype=frame.schema["at"])
        end = followed.end
        outside = pl.col("at").is_in(taken.implode()).not_() & (pl.col("at") < end)
        parts = [
            self._split(plain.filter(count & outside)),
            self._parse(quoted.filter(pl.col("_strict") & outside).select("at", "line")),
            pl.DataFrame(
                followed.rows,
                schema={"at": frame.schema["at"], **dict.fromkeys(self._columns, pl.String)},
                orient="row",
            ),
        ]
        rows = pl.concat(parts).sort("at").drop("at")
        found = dict(followed.malformed)
        wrong = plain.filter(~count & outside)
        found |= {at: malformed(MALFORMED_COLUMNS, text) for at, text in wrong.iter_rows()}
        aside = [found[at] for at in sorted(found)]
        if self._dialect.has_header and len(self._columns) > 1:
            # Concatenated files repeat their header.
            repeated = pl.all_horizontal(
                pl.nth(n).str.strip_chars() == c for n, c in enumerate(self._columns)
            )
            again = rows.select(repeated.fill_null(False)).to_series()
            text = self._dialect.separator.join(self._dialect.names)
            aside += [malformed(MALFORMED_HEADER, text)] * int(again.sum())
            rows = rows.filter(~again)
        return RowBatch(rows.with_columns(pl.all().replace("", None)), aside), lines[end:]

    def _split(self, rows: pl.DataFrame) -> pl.DataFrame:
        fields = pl.col("line").str.split(self._dialect.separator)
        values = [fields.list.get(at).alias(f"_{number}") for number, at in enumerate(self._wanted)]
        return self._named(rows.select("at", *values))

    def _parse(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Read lines that are one well-formed row each."""
        if rows.is_empty():
            return self._split(rows)
        names = [str(number) for number in range(self._num)]
        data = rows["line"].str.join("\n").item()
        table = pa.csv.read_csv(
            io.BytesIO(data.encode("utf-8")),
            read_options=pa.csv.ReadOptions(
                use_threads=False, block_size=len(data) * 4 + 1024, column_names=names
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=self._dialect.separator,
                quote_char=self._dialect.quote,
                ignore_empty_lines=False,
            ),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=[names[at] for at in self._wanted],
                strings_can_be_null=False,
            ),
        )
        found: Any = pl.from_arrow(table)
        if found.height != rows.height:
            raise AssertionError(f"{rows.height} rows were read as {found.height}")
        return self._named(found.rename(lambda name: f"_{name}").select(rows["at"], pl.all()))

    def _named(self, rows: pl.DataFrame) -> pl.DataFrame:
        rows.columns = ["at", *self._columns]
        return rows

    def _follow(self, lines: list[str], quoted: pl.DataFrame, *, is_last: bool) -> "_Followed":
        """Read the lines with quotes that are not a well-formed row on their own."""
        found = _Followed(end=len(lines))
        with_quote = quoted["at"].to_list()
        resume = 0
        for at in quoted.filter(~pl.col("_strict"))["at"].to_list():
            if at < resume:
                continue
            line = lines[at].removesuffix("\r")
            values, is_whole = self._fields.split(line)
            last: int | None = at
            if not is_whole:
                last, values = self._to_the_close(lines, at, with_quote)
                if last is None and not is_last:
                    found.end = at
                    break
            if last is None or (last > at and self._has_swallowed(lines[at : last + 1], values)):
                found.malformed[at] = malformed(MALFORMED_QUOTE, line)
                found.taken.add(at)
                continue
            if len(values) == self._num:
                found.rows.append((at, *(values[number] for number in self._wanted)))
            else:
                found.malformed[at] = malformed(MALFORMED_COLUMNS, "\n".join(lines[at : last + 1]))
            found.taken.update(range(at, last + 1))
            resume = last + 1
        return found

    def _to_the_close(
        self, lines: list[str], first: int, with_quote: list[int]
    ) -> tuple[int | None, list[str]]:
        """Return the last line and the values of the row that begins at a line; None if no row begins there.

        Text after a closing quote means that it closed nothing: it belongs to another row or is literal.
        """
        inside: Any = self._fields.inside
        for place in range(bisect.bisect_right(with_quote, first), len(with_quote)):
            at = with_quote[place]
            line = lines[at].removesuffix("\r")
            match = inside.match(line)
            if match is None:
                continue
            rest = line[match.end() :].lstrip(" " if self._dialect.separator == "\t" else " \t")
            if rest and not rest.startswith(self._dialect.separator):
                return None, []
            if not rest or self._fields.split(rest[1:])[1]:
                text = "\n".join([*lines[first:at], line])
                values, is_whole = self._fields.split(text)
                return (at, values) if is_whole else (None, [])
        return None, []

    def _has_swallowed(self, lines: Sequence[str], values: list[str]) -> bool:
        """Return whether quotes that happen to close at a field's end enclose whole rows."""
        naive = [line.split(self._dialect.separator) for line in lines]
        if len(values) != self._num:
            return any(_ADDRESS.fullmatch(field) for fields in naive[1:] for field in fields)
        if self._address is None:
            return False
        are_rows = all(
            len(fields) >= self._num and any(_ADDRESS.fullmatch(field) for field in fields)
            for fields in naive
        )
        # A value's second line may well be an address with words; all of its lines are not.
        quoted = min(number for number, field in enumerate(naive[0]) if self._dialect.quote in field)
        return are_rows and not (len(lines) == 2 and self._address < quoted)


class _Followed:
    """The result of following lines one by one."""

    def __init__(self, end: int) -> None:
        self.rows = list[tuple[Any, ...]]()
        self.malformed = dict[int, Malformed]()
        self.taken = set[int]()
        self.end = end  # the line at which a row begins that ends in later lines


def column_names_of(path: str, layout: TextLayout) -> list[str]:
    """Return a table's columns."""
    return list(dialect_of(path, layout).names)
