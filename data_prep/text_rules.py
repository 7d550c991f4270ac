"""Rules on captions: pure, vectorised, each giving the reason a row is dropped for, or null.

A rule is a polars expression over the canonical table (`data_prep.sources.table.CANONICAL_COLUMNS`), so a
file is judged in one pass by one engine. What a character is: a Unicode code point of the caption after
white space at both ends is cut off; a full-width letter, an emoji's base and each combining mark count one
each. Source of the thresholds: the paper, section 2.2.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import polars as pl

from pipeline.records import ConfigError, DropReason

CAPTION_MISSING = DropReason("caption_missing")
URL_INVALID = DropReason("url_invalid")
EVALUATION_URL = DropReason("evaluation_url")
LANGUAGE = DropReason("language")
SCORE_MISSING = DropReason("score_missing")
SCORE_BELOW_THRESHOLD = DropReason("score_below_threshold")
TOO_SHORT = DropReason("too_short")
TOO_LONG = DropReason("too_long")

CHARACTERS_RULE = "characters"
SCORE_RULE = "score"
LANGUAGE_RULE = "language"
BLACKLIST_RULE = "blacklist"
SWITCHABLE_RULES = (LANGUAGE_RULE, SCORE_RULE, CHARACTERS_RULE, BLACKLIST_RULE)

_CAPTION = pl.col("caption").str.strip_chars()


@dataclass(frozen=True, slots=True)
class TextRule:
    """`reason` is an expression: the DropReason of each row, or null where the row stays."""

    name: str
    version: int
    reason: pl.Expr


def caption_present() -> TextRule:
    """A caption that is null or only white space says nothing."""
    missing = _CAPTION.is_null() | (_CAPTION.str.len_chars() == 0)
    return TextRule("caption_present", 1, _drop(missing, CAPTION_MISSING))


def url_valid() -> TextRule:
    """Only http and https addresses with a host can be downloaded."""
    valid = pl.col("url").str.contains(r"^(?i)https?://[^/\s?#]+")
    return TextRule("url_valid", 1, _drop(~valid.fill_null(False), URL_INVALID))


def not_an_evaluation_url(urls: Sequence[str]) -> TextRule:
    """Pictures of the evaluation sets stay out of training (section 2.2: test sets are removed)."""
    return TextRule("evaluation_url", 1, _drop(pl.col("url").is_in(list(urls)), EVALUATION_URL))


def language_is(language: str) -> TextRule:
    """LAION-5B's language mark, `zh` in the paper; a source without the column passes."""
    wrong = pl.col("language").is_not_null() & (pl.col("language") != language)
    return TextRule(LANGUAGE_RULE, 1, _drop(wrong, LANGUAGE))


def score_at_least(threshold: float) -> TextRule:
    """mCLIP score at least 0.26 for LAION (section 2.2). A missing score is dropped too."""
    score = pl.col("score")
    missing = score.is_null() | score.is_nan()
    return TextRule(
        SCORE_RULE,
        1,
        pl.when(missing)
        .then(pl.lit(str(SCORE_MISSING)))
        .when(score < threshold)
        .then(pl.lit(str(SCORE_BELOW_THRESHOLD))),
    )


def characters_between(at_least: int, at_most: int) -> TextRule:
    """5 to 50 characters, both ends included (section 2.2)."""
    length = _CAPTION.str.len_chars()
    return TextRule(
        CHARACTERS_RULE,
        1,
        pl.when(length < at_least)
        .then(pl.lit(str(TOO_SHORT)))
        .when(length > at_most)
        .then(pl.lit(str(TOO_LONG))),
    )


def not_blacklisted(themes: Mapping[str, Sequence[str]]) -> TextRule:
    """No word of a blacklist inside the caption (section 2.2), upper and lower case alike.

    The reason is `blacklist:<theme>`; the first theme that hits, in the given order, names it.
    """
    reasons = [
        _drop(_CAPTION.str.contains_any(list(words), ascii_case_insensitive=True), f"blacklist:{theme}")
        for theme, words in themes.items()
        if words
    ]
    return TextRule(BLACKLIST_RULE, 1, pl.coalesce(reasons) if reasons else pl.lit(None, dtype=pl.String))


def blacklist_hit(themes: Mapping[str, Sequence[str]], caption: str) -> tuple[str, str] | None:
    """(theme, word) of the first blacklist word in one caption, or None; for `cnclip why`."""
    folded = caption.lower()
    for theme, words in themes.items():
        for word in words:
            if word.lower() in folded:
                return theme, word
    return None


def first_reason(rules: Sequence[TextRule]) -> pl.Expr:
    """The reason of the first rule, in order, that drops a row; null where every rule lets it pass."""
    return pl.coalesce(rule.reason for rule in rules)


@functools.cache
def blacklist(theme: str) -> tuple[str, ...]:
    """Words of `data_prep/blacklists/<theme>.txt`: one a line, `#` starts a comment."""
    file = resources.files("data_prep") / "blacklists" / f"{theme}.txt"
    if not file.is_file():
        known = sorted(
            entry.name.removesuffix(".txt")
            for entry in (resources.files("data_prep") / "blacklists").iterdir()
            if entry.name.endswith(".txt")
        )
        raise ConfigError(f"filter_text.blacklists: no list {theme!r}; known lists: {', '.join(known)}")
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line)


def _drop(condition: pl.Expr, reason: str) -> pl.Expr:
    return pl.when(condition).then(pl.lit(str(reason)))
