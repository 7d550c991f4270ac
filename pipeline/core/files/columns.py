"""Selects columns of foreign tables by their exact names."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


def column(name: str) -> "pl.Expr":
    """Return the column with this name, even `*` or `^…$`, which `pl.col` would treat as a pattern."""
    import polars as pl
    import polars.selectors

    return polars.selectors.by_name(name).as_expr() if is_pattern(name) else pl.col(name)


def is_pattern(name: str) -> bool:
    """Return whether polars treats a name as a pattern."""
    return name == "*" or (name.startswith("^") and name.endswith("$"))
