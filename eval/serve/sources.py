"""Maps rows of an index to sources, and finds the nearest rows of one source."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.core.arrays import Float32Array, Int64Array

if TYPE_CHECKING:
    import polars as pl

MAX_LOOKED_AT = 16_384  # nearest rows that are examined for one source

Found = tuple[npt.NDArray[Any], Int64Array]  # scores and rows [1, k], best first; rows not found are -1
Search = Callable[[Float32Array, int], Found]  # one query [1, dim] and k


@dataclass(frozen=True, slots=True)
class Near:
    """(row, cosine similarity) of the best rows in descending order."""

    pairs: list[tuple[int, float]]
    is_cut: bool = False  # the source may have more rows beyond MAX_LOOKED_AT


@dataclass(frozen=True, slots=True)
class Sources:
    """The source of each row: 1 to 4 bytes per row."""

    counts: dict[str, int]  # source → rows; a key's position is its code
    codes: npt.NDArray[np.unsignedinteger[Any]]  # [num_rows]

    @classmethod
    def of(cls, names: "pl.Series") -> "Sources | None":
        """Build it from a column with a name for each row; None if there are fewer than two names.

        A row without a name gets the empty name.
        """
        import polars as pl

        # Use the categories' codes, because names as text would take 16 bytes per row.
        named = names if names.dtype == pl.Categorical else names.cast(pl.String).cast(pl.Categorical)
        number = named.to_physical()
        table = pl.DataFrame({"name": named, "number": number})
        found = table.group_by("number").agg(pl.col("name").first().cast(pl.String), rows=pl.len())
        counts: dict[str, int] = {}
        for name, rows in found.select(pl.col("name").fill_null(""), "rows").iter_rows():
            counts[name] = counts.get(name, 0) + rows
        if len(counts) < 2:
            return None
        counts = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        code_of = {name: code for code, name in enumerate(counts)}
        none = int(number.fill_null(0).to_numpy().max()) + 1
        code_by_number = np.zeros(none + 1, np.min_scalar_type(len(counts)))
        for each, name in found.select("number", pl.col("name").fill_null("")).iter_rows():
            code_by_number[none if each is None else each] = code_of[name]
        return cls(counts, code_by_number[number.fill_null(none).to_numpy()])

    def largest(self, count: int) -> list[dict[str, Any]]:
        """Return name and rows of the largest sources."""
        named = ((name, rows) for name, rows in self.counts.items() if name)
        return [{"name": name, "rows": rows} for name, rows in list(named)[:count]]

    def nearest(self, search: Search, feature_D: Float32Array, k: int, source: str) -> Near:
        """Return the k best rows of one source; fewer if the nearest MAX_LOOKED_AT rows have fewer.

        Raises:
            KeyError: if no row is of this source.
        """
        wanted = min(k, self.counts[source])
        code = [*self.counts].index(source)
        most = min(len(self.codes), MAX_LOOKED_AT)
        asked = min(most, 4 * k)
        while True:
            scores_1K, rows_1K = search(feature_D[None], asked)
            pairs = [
                (row, score)
                for row, score in zip(rows_1K[0].tolist(), scores_1K[0].tolist(), strict=True)
                if row >= 0 and self.codes[row] == code
            ]
            is_all = bool((rows_1K < 0).any())  # the index finds no more rows for any k
            if len(pairs) >= wanted or asked == most or is_all:
                return Near(pairs[:wanted], is_cut=len(pairs) < wanted and most < len(self.codes))
            asked = min(most, 4 * asked)
