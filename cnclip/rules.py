"""The paper's caption rules (section 2.2) and further ones as polars expressions with drop reasons.

`CaptionRules` holds the settings of a run's `[filter_text]`; the functions make single rules for your own
list. `cnclip.filter_captions` takes either.
"""

from data_prep.filters.text import FilterTextConfig as CaptionRules
from data_prep.rules.text import (
    TextRule,
    blacklist,
    caption_present,
    characters_between,
    chinese_share_at_least,
    language_is,
    no_traditional_characters,
    no_watermark,
    not_an_evaluation_url,
    not_blacklisted,
    not_nsfw,
    score_at_least,
    themes,
    url_valid,
)

__all__ = [
    "CaptionRules",
    "TextRule",
    "blacklist",
    "caption_present",
    "characters_between",
    "chinese_share_at_least",
    "language_is",
    "no_traditional_characters",
    "no_watermark",
    "not_an_evaluation_url",
    "not_blacklisted",
    "not_nsfw",
    "score_at_least",
    "themes",
    "url_valid",
]
