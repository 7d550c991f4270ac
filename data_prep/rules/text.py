"""Rules on captions: pure and vectorised; each gives the drop reason of a row, or null.

A rule is a polars expression over the canonical table (`data_prep.sources.table.scan`), so one engine judges
a file in one pass. The thresholds come from the paper, section 2.2; rules that the paper does not have are
off by default.

A character is a Unicode code point of the visible caption (`visible`) without white space at both ends. A
full-width letter counts one, like a Chinese character; an emoji counts one for its base and one for each skin
tone, variation selector and joiner; each combining mark and each letter of a Latin word counts one.

Before a caption is judged, counted and kept, it loses control characters (tab and line ends stay, as white
space) and marks that change the direction of writing or have no width (U+200B, U+200E, U+200F, U+061C, U+202A
to U+202E, U+2066 to U+2069, U+FEFF): they can hide words from a list and reverse lines in a terminal. Joiners
(U+200C, U+200D) stay, since emoji and some scripts need them. A row's key comes from the original caption.

By default traditional characters stay, like simplified ones.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import polars as pl

from data_prep.rules import chinese_script, word_match
from pipeline.core.records import ConfigError, DropReason

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
TRADITIONAL = DropReason("traditional")

URL_RULE = "url_valid"
CHARACTERS_RULE = "characters"
SCORE_RULE = "score"
LANGUAGE_RULE = "language"
BLACKLIST_RULE = "blacklist"
CHINESE_SHARE_RULE = "chinese_share"
NSFW_RULE = "nsfw"
WATERMARK_RULE = "watermark"
TRADITIONAL_RULE = "traditional"
NORMALISED_DUPLICATES_RULE = "normalised_duplicates"
# Names for a source's `exempt_from`; `blacklist:<theme>` is one list. Names of image rules are in image.py.
SWITCHABLE_RULES = (
    LANGUAGE_RULE, SCORE_RULE, CHARACTERS_RULE, CHINESE_SHARE_RULE, NSFW_RULE, WATERMARK_RULE, BLACKLIST_RULE,
    TRADITIONAL_RULE, NORMALISED_DUPLICATES_RULE,
)  # fmt: skip

_CAPTION = pl.col("caption").str.strip_chars()
_UNSEEN = (
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x{9f}\x{61c}\x{200b}\x{200e}\x{200f}"
    r"\x{202a}-\x{202e}\x{2066}-\x{2069}\x{feff}]"
)


@dataclass(frozen=True, slots=True)
class TextRule:
    """`reason` is an expression: the DropReason of each row, or null if the row stays."""

    name: str
    version: int
    reason: pl.Expr


def visible(caption: pl.Expr) -> pl.Expr:
    """Return the caption without control characters and without marks that have no width (see the top)."""
    return caption.str.replace_all(_UNSEEN, "")


def caption_present() -> TextRule:
    """Keep captions that are neither null nor only white space."""
    missing = _CAPTION.is_null() | (_CAPTION.str.len_chars() == 0)
    return TextRule("caption_present", 1, _drop(missing, CAPTION_MISSING))


def url_valid() -> TextRule:
    """Keep http and https addresses with a host: only these can be downloaded."""
    # Browsers read a backslash as a slash, and so does the download.
    valid = pl.col("url").str.contains(r"^(?i)https?:[/\\]{2}[^/\\\s?#]+")
    return TextRule(URL_RULE, 2, _drop(~valid.fill_null(False), URL_INVALID))


def not_an_evaluation_url(urls: Sequence[str]) -> TextRule:
    """Keep images of the evaluation sets out of training (section 2.2: test sets are removed)."""
    return TextRule("evaluation_url", 1, _drop(pl.col("url").is_in(list(urls)), EVALUATION_URL))


def language_is(language: str) -> TextRule:
    """Keep rows with LAION-5B's language tag, `zh` in the paper; a source without the column passes."""
    wrong = pl.col("language").is_not_null() & (pl.col("language") != language)
    return TextRule(LANGUAGE_RULE, 1, _drop(wrong, LANGUAGE))


def score_at_least(threshold: float) -> TextRule:
    """Keep rows with an mCLIP score of at least 0.26 (section 2.2, for LAION); a missing score is dropped."""
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
    """Keep captions of 5 to 50 characters, both ends included (section 2.2)."""
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
    """Keep captions with at least this share of Chinese characters (script Han), not counting white space."""
    text = _CAPTION.str.replace_all(r"\s", "")
    length = text.str.len_chars()
    too_few = (length > 0) & (text.str.count_matches(r"\p{Han}") < share * length)
    return TextRule(CHINESE_SHARE_RULE, 1, _drop(too_few, CHINESE_SHARE))


def not_nsfw(marks: Sequence[str], max_unsafe: float | None) -> TextRule:
    """Keep rows whose NSFW mark is none of these and whose `punsafe` is at most `max_unsafe`.

    Both columns are LAION-5B's; unknown values pass.
    """
    hit = pl.col("nsfw").is_in(list(marks)).fill_null(False)
    if max_unsafe is not None:
        hit |= _above("unsafe", max_unsafe)
    return TextRule(NSFW_RULE, 2, _drop(hit, NSFW))


def no_watermark(max_watermark: float) -> TextRule:
    """Keep rows whose LAION-5B `pwatermark` is at most this; unknown values pass."""
    return TextRule(WATERMARK_RULE, 2, _drop(_above("watermark", max_watermark), WATERMARK))


def _above(column: str, limit: float) -> pl.Expr:
    """Return whether a known value is above a limit; null and NaN (polars' largest number) are unknown."""
    return (pl.col(column).fill_nan(None) > limit).fill_null(False)


def no_traditional_characters() -> TextRule:
    """Keep captions whose characters are their own simplified forms (OpenCC's t2s), phrases considered."""
    return TextRule(TRADITIONAL_RULE, 1, _drop(chinese_script.simplified(_CAPTION) != _CAPTION, TRADITIONAL))


def not_blacklisted(themes: Mapping[str, Sequence[str]]) -> TextRule:
    """Keep captions without a word of a blacklist (section 2.2), ignoring case.

    The reason is `blacklist:<theme>` with the first matching theme in the given order.
    """
    if not any(themes.values()):
        return TextRule(BLACKLIST_RULE, 1, pl.lit(None, dtype=pl.String))
    # Not stripped first: no word begins or ends with white space, and stripping costs a third.
    hit = word_match.first_list(pl.col("caption"), list(themes.values()))
    names = [f"{BLACKLIST_RULE}:{theme}" for theme in themes]
    reason = hit.replace_strict(list(range(len(names))), names, default=None, return_dtype=pl.String)
    return TextRule(BLACKLIST_RULE, 1, reason)


def blacklist_words(rows: pl.DataFrame, themes: Mapping[str, Sequence[str]]) -> pl.Series:
    """Return the list's first word in each row's caption for reasons `blacklist:<theme>`, otherwise null."""
    words = pl.repeat(None, rows.height, dtype=pl.String, eager=True)
    for theme, listed in themes.items():
        at = rows.select(
            (pl.col("reason") == f"{BLACKLIST_RULE}:{theme}").fill_null(False).arg_true()
        ).to_series()
        if len(at):
            words = words.scatter(at, word_match.first_word(rows["caption"].gather(at), listed))
    return words.alias("detail")


def first_reason(rules: Sequence[TextRule]) -> pl.Expr:
    """Return the reason of the first rule that drops a row, or null."""
    return pl.coalesce(rule.reason for rule in rules)


def themes() -> list[str]:
    """Return the names of the lists that exist, sorted."""
    folder = resources.files("data_prep") / "blacklists"
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(".txt") for name in names if name.endswith(".txt"))


@functools.cache
def blacklist(theme: str) -> tuple[str, ...]:
    """Return the words of `data_prep/blacklists/<theme>.txt`: one per line, `#` starts a comment."""
    file = resources.files("data_prep") / "blacklists" / f"{theme}.txt"
    if not file.is_file():
        raise ConfigError(f"filter_text.blacklists: no list {theme!r}; known lists: {', '.join(themes())}")
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line)


def _drop(condition: pl.Expr, reason: str) -> pl.Expr:
    return pl.when(condition).then(pl.lit(str(reason)))
