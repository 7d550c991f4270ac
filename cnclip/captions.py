"""`cnclip.filter_captions`: applies the caption rules of a run to a table in memory."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import polars as pl

from data_prep.filters.text import FilterTextConfig, judged_caption, rules_for
from data_prep.rules import text as text_rules
from data_prep.rules.text import TextRule
from data_prep.sources.table import KNOWN_COLUMNS, first_column

if TYPE_CHECKING:
    import pandas as pd

Frame = TypeVar("Frame", pl.DataFrame, "pd.DataFrame")
REASON = "drop_reason"
_ROLES: Mapping[str, Any] = {
    "url": pl.String, "caption": pl.String, "language": pl.String, "score": pl.Float32, "nsfw": pl.String,
    "unsafe": pl.Float32, "watermark": pl.Float32,
}  # fmt: skip


class Filtered(NamedTuple, Generic[Frame]):
    """The kept rows, and the dropped rows with their `drop_reason`; both have the input's columns.

    Captions of `kept` are as in shards: without control characters and outer white space.
    """

    kept: Frame
    dropped: Frame

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of rows for each drop reason, most frequent first."""
        reasons = pl.Series(REASON, list(self.dropped[REASON]), dtype=pl.String)
        return dict(reasons.value_counts(sort=True).iter_rows())


def filter_captions(
    frame: Frame,
    rules: FilterTextConfig | Sequence[TextRule] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
) -> Filtered[Frame]:
    """Judge every row by the caption rules; the first rule that drops it gives the reason.

    Args:
        frame: a polars or pandas table; the result has the same kind.
        rules: settings (`cnclip.rules.CaptionRules`; unset, the paper's) or a list of single rules.
        columns: role to column for the roles caption, url, language, score, nsfw, unsafe, watermark, if
            names differ from those of LAION, Wukong and img2dataset (caption or text, url, similarity …).

    Rules on roles that the table lacks do not apply. With settings, as in a run, a row needs a valid address
    if the table has addresses, and scores are judged if the table has any.

    Raises:
        ValueError: if the table has no captions, or if a named column or role does not exist.
    """
    if isinstance(frame, pl.DataFrame):
        return _of_polars(frame, rules, columns or {})
    return _of_pandas(frame, rules, columns or {})


def _of_polars(
    frame: pl.DataFrame,
    rules: FilterTextConfig | Sequence[TextRule] | None,
    columns: Mapping[str, str],
) -> Filtered[pl.DataFrame]:
    if REASON in frame.columns:
        raise ValueError(f"the table already has a column {REASON!r}; rename it")
    found = _columns(frame, columns)
    config = rules if isinstance(rules, FilterTextConfig) else FilterTextConfig()
    canonical = frame.lazy().select(_role(role, found[role]) for role in _ROLES)
    canonical = canonical.with_columns(caption=judged_caption(pl.col("caption"), config))
    if rules is None or isinstance(rules, FilterTextConfig):
        has_scores = found["score"] is not None and frame[found["score"]].null_count() < frame.height
        chosen = rules_for(config, (), (), has_scores)
        if found["url"] is None:
            chosen = [rule for rule in chosen if rule.name != text_rules.URL_RULE]
    elif not rules:
        raise ValueError("rules: an empty list judges nothing; leave it out for the paper's rules")
    else:
        chosen = list(rules)
    judged = canonical.select("caption", reason=text_rules.first_reason(chosen)).collect(engine="streaming")
    is_kept = judged["reason"].is_null()
    caption = judged["caption"].str.strip_chars().alias(str(found["caption"]))
    reason = judged["reason"].cast(pl.String).alias(REASON)
    return Filtered(frame.with_columns(caption).filter(is_kept), frame.with_columns(reason).filter(~is_kept))


def _role(role: str, column: str | None) -> pl.Expr:
    value = pl.lit(None, _ROLES[role]) if column is None else pl.col(column).cast(_ROLES[role], strict=False)
    return value.alias(role)


def _columns(frame: pl.DataFrame, given: Mapping[str, str]) -> dict[str, str | None]:
    if unknown := sorted(set(given) - set(_ROLES)):
        raise ValueError(f"columns: no role {unknown[0]!r}; roles are {', '.join(_ROLES)}")
    if missing := sorted(set(given.values()) - set(frame.columns)):
        raise ValueError(f"columns: no column {missing[0]!r}; the table has {', '.join(frame.columns)}")
    found = {
        role: given.get(role) or first_column(frame.columns, KNOWN_COLUMNS[f"{role}_column"])
        for role in _ROLES
    }
    if found["caption"] is None:
        raise ValueError(
            f"no column of captions (caption or text); the table has {', '.join(frame.columns)}; give"
            ' columns={"caption": "…"}'
        )
    return found


def _of_pandas(
    frame: "pd.DataFrame",
    rules: FilterTextConfig | Sequence[TextRule] | None,
    columns: Mapping[str, str],
) -> Filtered["pd.DataFrame"]:
    """Judge a pandas table and select its rows, so that index and column types stay."""
    place = "__row__"
    done = _of_polars(pl.from_pandas(frame).with_row_index(place), rules, columns)
    caption = str(_columns(done.kept, columns)["caption"])
    kept = frame.iloc[done.kept[place].to_numpy()].copy()
    kept[caption] = done.kept[caption].to_list()
    dropped = frame.iloc[done.dropped[place].to_numpy()].copy()
    dropped[REASON] = done.dropped[REASON].to_list()
    return Filtered(kept, dropped)
