"""The texts of the pages in English and Chinese: a page contains both, and its style sheet shows one."""

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

LANGUAGES = {"en": "en", "zh": "zh-CN"}  # file and class name → the attribute `lang`


@functools.cache
def words(language: str) -> Mapping[str, Mapping[str, str]]:
    """Return section → key → text of one language."""
    path = Path(__file__).parent / "templates" / f"words_{language}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def say(name: str, **values: object) -> "Markup":
    """Return the text `section.key` in both languages, with escaped values filled in.

    Raises:
        KeyError: if there is no such text, or if it names a value that is not given.
    """
    section, _, key = name.partition(".")
    texts = {language: words(language)[section][key].format(**values) for language in LANGUAGES}
    return both(texts)


def plain(name: str, language: str, **values: object) -> str:
    """Return the text `section.key` in one language, unescaped: for attributes."""
    section, _, key = name.partition(".")
    return words(language)[section][key].format(**values)


def gloss(section: str, key: str) -> "Markup":
    """Return what a code means, in both languages; empty for an unknown code.

    `blacklist:advertising` is explained as `blacklist`.
    """
    from markupsafe import Markup

    name = key.partition(":")[0]
    if name not in words("en")[section]:
        return Markup("")
    return both({language: words(language)[section][name] for language in LANGUAGES})


def both(texts: Mapping[str, str]) -> "Markup":
    """Return texts by language as one element each, escaped; the style sheet shows one of them."""
    from markupsafe import Markup

    spans = (
        Markup('<span class="{}" lang="{}">{}</span>').format(language, LANGUAGES[language], text)
        for language, text in texts.items()
    )
    return Markup("").join(spans)
