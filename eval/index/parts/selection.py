"""Which rows may answer: given as numbers, as a mask, or as an expression over the metadata's columns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.index.files import faiss_reason
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.files.foreign import first_line, foreign
from pipeline.core.records import ConfigError, InputError

_MOST_EFFORT = 1 << 30
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Allowed:
    """The rows of an index that may answer."""

    mask_N: Mask
    share: float  # of all rows
    selectors: dict[int, Any] = field(default_factory=dict)  # by the first row of a part

    @classmethod
    def of(cls, mask_N: Mask) -> "Allowed":
        return cls(mask_N, float(mask_N.mean()))

    def part(self, first_row: int, num_rows: int) -> Any:
        """Return FAISS's selector of a part's rows; None if it has none of them."""
        if first_row not in self.selectors:
            self.selectors[first_row] = self._selector(first_row, num_rows)
        return self.selectors[first_row]

    def _selector(self, first_row: int, num_rows: int) -> Any:
        import faiss

        kinds: Any = faiss  # its stubs lack the arguments
        inside = self.mask_N[first_row : first_row + num_rows]
        if not inside.any():
            return None
        bits = np.packbits(inside, bitorder="little")
        selector = kinds.IDSelectorBitmap(bits)
        selector.kept_alive = bits  # FAISS has only a pointer
        return selector


def mask_of(rows: "Sequence[int] | Int64Array | Mask", num_rows: int) -> Mask:
    """Return a mask of row numbers, or check one.

    Raises:
        InputError: for rows outside of the index.
    """
    array = np.asarray(rows)
    if array.dtype == np.bool_:
        if array.shape != (num_rows,):
            raise InputError(f"a mask of shape {list(array.shape)} for an index of {num_rows} rows")
        return array
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"rows are whole numbers [N] or a mask, not {array.dtype} {list(array.shape)}")
    outside = np.flatnonzero((array < 0) | (array >= num_rows))
    if len(outside):
        raise InputError(f"row {array[outside[0]]} is asked for, but the index has {num_rows} rows")
    mask_N = np.zeros(num_rows, dtype=np.bool_)
    mask_N[array.astype(np.int64)] = True
    return mask_N


def rows_where(features: str, expression: str, num_rows: int) -> Mask:
    """Return which rows of `metadata/` next to the features fulfil an SQL expression.

    Args:
        features: the folder that was indexed.
        expression: of polars' SQL over the columns, such as `source = 'laion' AND width > 300`. Rows for
            which it is null are out.
        num_rows: rows of the index.

    Raises:
        ConfigError: for an expression that is no condition over these columns.
        InputError: if there is no metadata, or of other rows.
    """
    import polars as pl

    folder = store.join(features, "metadata")
    names = [name for name in store.list_files(folder) if re.fullmatch(r"metadata_\d+\.parquet", name)]
    if not names:
        raise InputError(f"{folder}: holds no metadata_0.parquet, which a condition needs; embed again")
    paths = [store.join(folder, name) for name in sorted(names, key=lambda name: int(name[9:-8]))]
    with foreign(paths[0], "table", "embed again"):
        table = pl.scan_parquet(paths)
        columns = table.collect_schema().names()
    try:
        found = table.select(pl.sql_expr(expression).alias("is_in")).collect()["is_in"]
    except Exception as error:
        raise ConfigError(
            f"--where {expression!r}: {first_line(error)}; the columns are {', '.join(columns)}"
        ) from None
    if found.dtype != pl.Boolean:
        raise ConfigError(f"--where {expression!r}: gives {found.dtype}, not true or false for each row")
    if len(found) < num_rows:
        raise InputError(
            f"{folder}: holds {len(found)} rows, the index {num_rows}: it belongs to other features"
        )
    # Rows beyond are of the other side, which may be longer.
    return np.asarray(found.fill_null(value=False).to_numpy()[:num_rows], dtype=np.bool_)


def search_parameters(index: Any, selector: Any, share: float) -> Any:
    """Return FAISS's search parameters that let only selected rows answer.

    The nearest of few rows lie further away, so the effort grows by 1 / share: as many distances are computed
    as without a filter.

    Raises:
        InputError: for a kind of index that FAISS cannot filter.
    """
    import faiss

    kinds: Any = faiss  # its stubs lack the arguments
    index = faiss.downcast_index(index)

    def more(effort: int, most: int) -> int:
        return int(max(1, min(effort / share, most, _MOST_EFFORT)))

    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(index.index, selector, share)
        return kinds.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = search_parameters(index.base_index, selector, share)
        return kinds.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        options = {"sel": selector, "nprobe": more(index.nprobe, index.nlist)}
        options["max_codes"] = more(index.max_codes, _MOST_EFFORT) if index.max_codes else 0
        if isinstance(index, faiss.IndexIVFRaBitQ):
            return kinds.IVFRaBitQSearchParameters(**options, qb=index.qb)
        return kinds.SearchParametersIVF(**options)
    if isinstance(index, faiss.IndexHNSW):
        effort = more(index.hnsw.efSearch, max(1, index.ntotal))
        return kinds.SearchParametersHNSW(sel=selector, efSearch=effort)
    if isinstance(index, faiss.IndexFlatCodes) and not isinstance(index, faiss.IndexPQ | faiss.IndexLSH):
        return kinds.SearchParameters(sel=selector)
    raise InputError(
        f"FAISS cannot filter a search of {type(index).__name__}; use an index with IVF, HNSW, Flat or SQ"
    )


def reason_of(path: str, error: Exception) -> InputError:
    """Return the error of a search as a line that names the part."""
    return InputError(f"{path}: FAISS cannot search it so ({faiss_reason(error)})")
