"""Entries: the words that concepts are found by, from files or counted from the corpus's own captions.

MetaCLIP (Xu et al. 2024, "Demystifying CLIP data") takes 500,000 entries from WordNet and Wikipedia: unigrams
by their count, bigrams by their pointwise mutual information, and titles. Chinese has no spaces, so n-grams
are of characters, and what separates a word from a chance neighbourhood is its cohesion: the mutual
information of its two parts, at the place where it falls apart most easily.
"""

import gzip
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.core import store
from pipeline.core.records import InputError

LONGEST_NGRAM = 4  # characters: four of 15 bits each fit into one integer
_BITS = 15
_FIRST, _LAST = 0x3400, 0x9FFF  # Chinese characters of the basic plane; rarer ones end a sequence
_TITLES_HEADER = "page_title"  # first line of Wikipedia's dump of titles, which has _ for a space
_LATIN = r"[\p{Latin}\p{Nd}]+"

Codes = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


def plain(text: pl.Expr) -> pl.Expr:
    """Return a caption or an entry as both are compared: NFKC, lower case, and spaces around Latin words.

    So `cat` is in "Cat和狗" but not in "category", and a Chinese entry is found anywhere.
    """
    folded = text.str.normalize("NFKC").str.to_lowercase()
    return folded.str.replace_all(_LATIN, " $0 ").str.replace_all(r"\s+", " ")


def read_entries(path: str) -> pl.Series:
    """Return the entries of a text file as they stand, one a line; a name that ends with .gz is unpacked.

    Raises:
        InputError: if the file cannot be read, is not UTF-8, or holds no entry.
    """
    try:
        data = store.read_bytes(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; correct [concepts] files") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); correct [concepts] files"
        ) from None
    try:
        text = (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error):
        raise InputError(f"{path}: cannot be unpacked; give a whole .gz file") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1 if not path.endswith(".gz") else None
        where = f"line {line} is" if line else "it is"
        raise InputError(f"{path}: {where} not UTF-8; save the entries as UTF-8") from None
    lines = pl.Series("entry", text.splitlines(), dtype=pl.String)
    if len(lines) and lines[0] == _TITLES_HEADER:
        lines = lines[1:]
    found = lines.str.replace_all("_", " ", literal=True).str.strip_chars()
    found = found.filter(found != "")
    if found.is_empty():
        raise InputError(f"{path}: no entries in it; give one a line")
    return found


def count_ngrams(captions: pl.Series, longest: int, min_count: int, min_cohesion: float) -> pl.DataFrame:
    """Return the n-grams of 2 to `longest` Chinese characters (entry, count, cohesion), most frequent first.

    Cohesion is in bits: the least over all cuts of log2 p(whole) / (p(left) · p(right)), where p is the share
    among all n-grams of that length.
    """
    text = captions.str.join("\n").item() or ""
    point_N = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    is_chinese_N = (point_N >= _FIRST) & (point_N <= _LAST)
    character_N = (point_N - np.uint32(_FIRST)).astype(np.uint64)
    by_length: list[tuple[Codes, Counts]] = []
    code_N, valid_N = character_N, is_chinese_N
    found = []
    for length in range(1, longest + 1):
        if length > 1:
            code_N = code_N[:-1] << np.uint64(_BITS) | character_N[length - 1 :]
            valid_N = valid_N[:-1] & is_chinese_N[length - 1 :]
        code_U, count_U = _counted(code_N[valid_N])
        by_length.append((code_U, count_U))
        if length > 1:
            often = count_U >= min_count
            code_M, count_M = code_U[often], count_U[often]
            cohesion_M = _cohesion(code_M, count_M, by_length)
            holds = cohesion_M >= min_cohesion
            found.append(
                pl.DataFrame(
                    {
                        "entry": pl.Series(_words(code_M[holds], length), dtype=pl.String),
                        "count": count_M[holds],
                        "cohesion": cohesion_M[holds],
                    }
                )
            )
    return pl.concat(found).sort("count", "entry", descending=[True, False])


def _counted(code_N: Codes) -> tuple[Codes, Counts]:
    """Return the different codes in order and how often each is there; np.unique takes far longer."""
    sorted_N = np.sort(code_N)
    first_U = np.flatnonzero(np.diff(sorted_N, prepend=~sorted_N[:1]))
    return sorted_N[first_U], np.diff(first_U, append=len(sorted_N))


def _cohesion(
    code_M: Codes, count_M: Counts, by_length: list[tuple[Codes, Counts]]
) -> npt.NDArray[np.float64]:
    length = len(by_length)
    totals = [count_U.sum() for _, count_U in by_length]
    whole_M = np.log2(count_M / max(totals[-1], 1))
    least_M = np.full(len(code_M), np.inf)
    for cut in range(1, length):
        right_bits = np.uint64(_BITS * (length - cut))
        left_M = _share(code_M >> right_bits, *by_length[cut - 1])
        right_M = _share(code_M & ((np.uint64(1) << right_bits) - np.uint64(1)), *by_length[length - cut - 1])
        least_M = np.minimum(least_M, whole_M - left_M - right_M)
    return least_M


def _share(code_M: Codes, code_U: Codes, count_U: Counts) -> npt.NDArray[np.float64]:
    """Return log2 of the share of each code; a part of an n-gram is always among those of its length."""
    share_M: npt.NDArray[np.float64] = np.log2(count_U[np.searchsorted(code_U, code_M)] / count_U.sum())
    return share_M


def _words(code_M: Codes, length: int) -> list[str]:
    shifts = np.arange(length - 1, -1, -1, dtype=np.uint64) * np.uint64(_BITS)
    point_ML = (code_M[:, None] >> shifts & np.uint64((1 << _BITS) - 1)).astype("<u4") + np.uint32(_FIRST)
    words: list[str] = np.ascontiguousarray(point_ML, "<u4").view(f"<U{length}")[:, 0].tolist()
    return words


def sampled(paths: list[str], limit: int) -> Iterator[pl.Series]:
    """Yield up to `limit` captions of some tables: rows are in random order, that of their keys."""
    for path in paths:
        if limit <= 0:
            return
        captions = pl.scan_parquet(path).select("caption").head(limit).collect()["caption"]
        limit -= len(captions)
        yield captions
