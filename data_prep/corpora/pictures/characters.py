"""Draws the most frequent Chinese characters in a font; keywords are frequent words with the character."""

import io
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_prep.corpora.packages.archives import read_members, read_one
from data_prep.corpora.packages.drawing import Source
from data_prep.corpora.pictures.items import Item, is_chinese
from pipeline.core.records import InputError

NUM_CHARACTERS = 1500
_NUM_WORDS = 5
_FONT_ENDINGS = (".ttf", ".ttc", ".otf")
_FONT_PX, _SIDE_PX = 104, 128
_DICTIONARY = "usr/lib/python3/dist-packages/jieba/dict.txt"


@cache
def _frequent(dictionary: Path) -> dict[str, tuple[str, ...]]:
    """Return the most frequent characters with the most frequent words of two or three that have them."""
    counts = {}
    for line in read_one(dictionary, _DICTIONARY).decode("utf-8").splitlines():
        word, count, *_ = line.split(" ")
        if len(word) <= 3 and all(map(is_chinese, word)):
            counts[word] = int(count)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    characters = [word for word in ordered if len(word) == 1][:NUM_CHARACTERS]
    words: dict[str, list[str]] = {character: [] for character in characters}
    for word in ordered:
        for character in dict.fromkeys(word) if len(word) > 1 else ():
            if character in words and len(words[character]) < _NUM_WORDS:
                words[character].append(word)
    return {character: tuple(found) for character, found in words.items()}


def read_characters(files: Mapping[str, Path], images: str) -> Iterator[Item]:
    """Read one font's package; a character that the font lacks is left out."""
    fonts = sorted(read_members(files[images], lambda path: path.endswith(_FONT_ENDINGS)))
    if not fonts:
        raise InputError(f"{files[images]}: no font in it; delete it and build again")
    try:
        font = ImageFont.truetype(io.BytesIO(fonts[0][1]), _FONT_PX)
    except OSError as error:
        raise InputError(f"{files[images]}: {fonts[0][0]} is no font ({error})") from None
    missing = _glyph(font, "\U0010fffd")
    for character, words in _frequent(files["words"]).items():
        if (image := _glyph(font, character)) != missing:
            yield Item(
                item=character,
                name_zh=f"“{character}”字",
                keywords_zh=words,
                name_en=f"the Chinese character {character}",
                category_zh=character,
                category_en="characters",
                source=Source("image", image),
            )


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    image = Image.new("RGB", (_SIDE_PX, _SIDE_PX), "white")
    middle = _SIDE_PX / 2
    ImageDraw.Draw(image).text((middle, middle), character, font=font, fill="black", anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
