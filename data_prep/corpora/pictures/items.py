"""What a reader of packages gives: images as the packages hold them, with their names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.corpora.packages.drawing import Source

_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image in one style."""

    item: str  # id within the family; the same thing has the same id in every style
    name_zh: str
    keywords_zh: Sequence[str]
    name_en: str
    keywords_en: Sequence[str] = ()
    category_zh: str
    category_en: str
    source: Source


def is_chinese(text: str) -> bool:
    """Return whether a text has a Chinese character."""
    return _CHINESE.search(text) is not None


def distinct(words: Sequence[str], but: str = "") -> tuple[str, ...]:
    """Return the words without blanks, empty ones, repetitions and `but`, in order."""
    return tuple(dict.fromkeys(word.strip() for word in words if word.strip() not in ("", but)))
