"""Converts traditional Chinese characters to simplified ones by OpenCC's `t2s` (characters and phrases)."""

import functools
from typing import Any

import polars as pl

from pipeline.core.records import ConfigError

# Separates captions, so that one call converts a whole column: OpenCC's dictionaries have no control
# characters, and `text_rules.visible` has removed them from the captions.
_SEPARATOR = "\x1e"


def simplified(captions: pl.Expr) -> pl.Expr:
    """Return captions in simplified characters; nulls and text without a simplified form stay."""
    return captions.map_batches(_convert, return_dtype=pl.String, is_elementwise=True)


@functools.cache
def _converter() -> Any:
    try:
        import opencc
    except ImportError:
        raise ConfigError(
            'filter_text.traditional: "drop" and "convert" need OpenCC:'
            ' pip install "cnclip-pretraining[opencc]"'
        ) from None
    return opencc.OpenCC("t2s")


def _convert(captions: pl.Series) -> pl.Series:
    text = captions.fill_null("").str.replace_all(_SEPARATOR, " ", literal=True)
    if not len(text):
        return captions
    parts = _converter().convert(_SEPARATOR.join(text)).split(_SEPARATOR)
    found = pl.Series(captions.name, parts, dtype=pl.String)
    return found.set(captions.is_null(), None)
