"""Rules on captions: pure, vectorised, each giving the reason a row is dropped for, or null.

A rule is a polars expression over the canonical table (`data_prep.sources.table.CANONICAL_COLUMNS`), so a
file is judged in one pass by one engine. What a character is: a Unicode code point of the caption after
white space at both ends is cut off; a full-width letter, an emoji's base and each combining mark count one
each, and so does every letter of a Latin word. Source of the thresholds: the paper, section 2.2; rules that
the paper does not have are off unless a run asks for them. Traditional characters stay like simplified ones.
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
CHINESE_SHARE = DropReason("chinese_share")
NSFW = DropReason("nsfw")
WATERMARK = DropReason("watermark")

CHARACTERS_RULE = "characters"
SCORE_RULE = "score"
LANGUAGE_RULE = "language"
BLACKLIST_RULE = "blacklist"
CHINESE_SHARE_RULE = "chinese_share"
NSFW_RULE = "nsfw"
WATERMARK_RULE = "watermark"
SWITCHABLE_RULES = (
    LANGUAGE_RULE, SCORE_RULE, CHARACTERS_RULE, CHINESE_SHARE_RULE, NSFW_RULE, WATERMARK_RULE, BLACKLIST_RULE,
)  # fmt: skip

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


def chinese_share_at_least(share: float) -> TextRule:
    """At least this share of the characters that are no white space is Chinese (Unicode script Han)."""
    text = _CAPTION.str.replace_all(r"\s", "")
    length = text.str.len_chars()
    too_few = (length > 0) & (text.str.count_matches(r"\p{Han}") < share * length)
    return TextRule(CHINESE_SHARE_RULE, 1, _drop(too_few, CHINESE_SHARE))


def not_nsfw(marks: Sequence[str], max_unsafe: float | None) -> TextRule:
    """LAION-5B's NSFW mark is none of these, and its `punsafe` at most `max_unsafe`; unknown passes."""
    hit = pl.col("nsfw").is_in(list(marks)).fill_null(False)
    if max_unsafe is not None:
        hit |= (pl.col("unsafe") > max_unsafe).fill_null(False)
    return TextRule(NSFW_RULE, 1, _drop(hit, NSFW))


def no_watermark(max_watermark: float) -> TextRule:
    """LAION-5B's `pwatermark` is at most this; unknown passes."""
    hit = (pl.col("watermark") > max_watermark).fill_null(False)
    return TextRule(WATERMARK_RULE, 1, _drop(hit, WATERMARK))


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
    folded = _ascii_lower(caption)
    for theme, words in themes.items():
        for word in words:
            if _ascii_lower(word) in folded:
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


def _ascii_lower(text: str) -> str:
    return "".join(character.lower() if character.isascii() else character for character in text)


def _drop(condition: pl.Expr, reason: str) -> pl.Expr:
    return pl.when(condition).then(pl.lit(str(reason)))
