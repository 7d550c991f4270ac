"""The styles of the pictures corpus: which packages each needs, and who reads it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep.corpora.pictures.characters import read_characters
from data_prep.corpora.pictures.icon_sets import (
    read_emoji,
    read_flags,
    read_icon_park,
    read_map_icons,
    read_openmoji_lines,
)
from data_prep.corpora.pictures.items import Item
from data_prep.corpora.pictures.office import read_office
from data_prep.corpora.pictures.stamps import read_stamps

Reader = Callable[[Mapping[str, Path], str], Iterator[Item]]


@dataclass(frozen=True, slots=True)
class Style:
    """Images in one hand; `images` and `captions` are roles of packages."""

    images: str
    captions: tuple[str, ...]
    read: Reader

    @property
    def packages(self) -> tuple[str, ...]:
        """The roles of all packages without which there is no such style."""
        return tuple(dict.fromkeys((self.images, *self.captions)))


_EMOJI = ("cldr", "cldr_derived", "openmoji")
_FLAGS = ("cldr_territories",)

STYLES: Mapping[str, Style] = {
    "emoji-twemoji": Style("emoji_twemoji", _EMOJI, read_emoji),
    "emoji-noto": Style("emoji_noto", _EMOJI, read_emoji),
    "emoji-openmoji": Style("emoji_openmoji", _EMOJI, read_emoji),
    "emoji-openmoji-lines": Style("openmoji", _EMOJI, read_openmoji_lines),
    "emoji-two": Style("emoji_two", _EMOJI, read_emoji),
    "emoji-one": Style("emoji_one", _EMOJI, read_emoji),
    "emoji-firefox": Style("emoji_firefox", _EMOJI, read_emoji),
    "emoji-fluent": Style("emoji_fluent", _EMOJI, read_emoji),
    "emoji-fluent-flat": Style("emoji_fluent_flat", _EMOJI, read_emoji),
    "emoji-fluent-contrast": Style("emoji_fluent_contrast", _EMOJI, read_emoji),
    "icons-colour": Style("icon_park_colour", ("icon_park_titles",), read_icon_park),
    "icons-outline": Style("icon_park_outline", ("icon_park_titles",), read_icon_park),
    "icons-solid": Style("icon_park_solid", ("icon_park_titles",), read_icon_park),
    "icons-two-tone": Style("icon_park_two_tone", ("icon_park_titles",), read_icon_park),
    "flags-rectangle": Style("flags_rectangle", _FLAGS, partial(read_flags, ending="-4x3")),
    "flags-square": Style("flags_rectangle", _FLAGS, partial(read_flags, ending="-1x1")),
    "flags-circle": Style("flags_circle", _FLAGS, read_flags),
    "flags-pack": Style("flags_pack", _FLAGS, read_flags),
    "flags-core": Style("flags_core", _FLAGS, read_flags),
    "map-maki": Style("maki", ("map_names",), read_map_icons),
    "map-temaki": Style("temaki", ("map_names",), read_map_icons),
    "map-font-awesome": Style("font_awesome", ("map_names",), read_map_icons),
    "office-colibre": Style("office_colibre", ("office_labels",), read_office),
    "office-breeze": Style("office_breeze", ("office_labels",), read_office),
    "office-elementary": Style("office_elementary", ("office_labels",), read_office),
    "office-karasa-jaga": Style("office_karasa_jaga", ("office_labels",), read_office),
    "office-sifr": Style("office_sifr", ("office_labels",), read_office),
    "office-sukapura": Style("office_sukapura", ("office_labels",), read_office),
    "stamps": Style("stamps", ("stamps",), read_stamps),
    "characters-kai": Style("font_kai", ("words",), read_characters),
    "characters-ming": Style("font_ming", ("words",), read_characters),
    "characters-zenhei": Style("font_zenhei", ("words",), read_characters),
    "characters-microhei": Style("font_microhei", ("words",), read_characters),
}
