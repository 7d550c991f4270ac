"""Columns of tables that others made, by their very names."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


def column(name: str) -> "pl.Expr":
    """Return the column of this name, also if it is `*` or `^…$`, which `pl.col` takes for a pattern."""
    import polars as pl
    import polars.selectors

    return polars.selectors.by_name(name).as_expr() if is_pattern(name) else pl.col(name)


def is_pattern(name: str) -> bool:
    """Return whether polars takes a name for a pattern of names."""
    return name == "*" or (name.startswith("^") and name.endswith("$"))
