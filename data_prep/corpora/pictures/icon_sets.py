"""Reads icon sets in Iconify's JSON: emoji by code point, IconPark by name, flags by territory, map icons.

The format: `icons.json` has a `body` of SVG elements for each icon, with the sizes of the set if the icon has
none of its own; `chars.json` maps code points to icons.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from data_prep.corpora.packages.archives import read_members, read_one
from data_prep.corpora.packages.cldr import Name, normalise_code, read_names, read_territories
from data_prep.corpora.packages.drawing import Source
from data_prep.corpora.pictures.items import Item, distinct, is_chinese

EMOJI_GROUPS = {
    "smileys-emotion": "表情与情感",
    "people-body": "人物与身体",
    "animals-nature": "动物与自然",
    "food-drink": "食物与饮料",
    "travel-places": "旅行与地点",
    "activities": "活动",
    "objects": "物品",
    "symbols": "符号",
}
# The prefixes of icons in OpenStreetMap's tagging schema, and the roles of the sets they name.
MAP_SETS = {"maki": "maki", "temaki": "temaki", "fas": "font_awesome"}


def read_icons(tarball: Path) -> dict[str, bytes]:
    """Return the icons of a set as SVG files, by name; aliases that turn or mirror an icon are left out."""
    table = json.loads(read_one(tarball, "icons.json"))
    icons = table["icons"]
    plain = {
        name: alias["parent"] for name, alias in table.get("aliases", {}).items() if set(alias) == {"parent"}
    }
    bodies = icons | {name: icons[parent] for name, parent in plain.items() if parent in icons}
    return {name: _svg(icon, table) for name, icon in bodies.items()}


def _svg(icon: Mapping[str, object], table: Mapping[str, object]) -> bytes:
    left, top, width, height = (
        icon.get(key, table.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {head} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'.encode()


@cache
def _emoji(openmoji: Path, cldr: Path, derived: Path) -> dict[str, tuple[Name, Name, str]]:
    """Return Chinese name, English name and group by code points: no skin tones, no flags."""
    chinese, english = (read_names(cldr, derived, language) for language in ("zh", "en"))
    found = {}
    for entry in json.loads(read_one(openmoji, "data/openmoji.json")):
        code = normalise_code(entry["hexcode"])
        if entry["group"] in EMOJI_GROUPS and not entry["skintone"] and code in chinese and code in english:
            found[code] = chinese[code], english[code], entry["group"]
    return found


def _emoji_items(sources: Mapping[str, bytes], files: Mapping[str, Path]) -> Iterator[Item]:
    names = _emoji(files["openmoji"], files["cldr"], files["cldr_derived"])
    for code, (chinese, english, group) in names.items():
        if code in sources:
            yield Item(
                item=code,
                name_zh=chinese.name,
                keywords_zh=chinese.keywords,
                name_en=english.name,
                keywords_en=distinct(english.keywords, english.name),
                category_zh=EMOJI_GROUPS[group],
                category_en=group,
                source=Source("svg", sources[code]),
            )


def read_emoji(files: Mapping[str, Path], images: str) -> Iterator[Item]:
    """Read an emoji set in Iconify's JSON; names are those of CLDR, groups those of OpenMoji's list.

    Sets without code points name their icons after the emoji's English names, in full or without what stands
    in brackets, and with or without hyphens.
    """
    icons = read_icons(files[images])
    chars: dict[str, str] = json.loads(read_one(files[images], "chars.json"))
    if chars:
        codes = {normalise_code(code): icons[name] for code, name in chars.items() if name in icons}
    else:
        by_name = {_letters(name): svg for name, svg in icons.items()}
        emoji = _emoji(files["openmoji"], files["cldr"], files["cldr_derived"])
        spelled = {code: english.name for code, (_, english, _) in emoji.items()}
        codes = {
            code: svg
            for code, name in spelled.items()
            if (svg := by_name.get(_letters(name)) or by_name.get(_letters(re.sub(r"\(.*?\)", "", name))))
        }
    yield from _emoji_items(codes, files)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_openmoji_lines(files: Mapping[str, Path], images: str) -> Iterator[Item]:
    """Read OpenMoji's black line drawings, which its own package has as files."""
    drawn = read_members(files[images], lambda path: path.startswith("black/svg/") and path.endswith(".svg"))
    yield from _emoji_items({normalise_code(Path(path).stem): content for path, content in drawn}, files)


def read_icon_park(files: Mapping[str, Path], images: str) -> Iterator[Item]:
    """Read one of IconPark's themes, with titles, tags and categories of IconPark's own list."""
    icons = read_icons(files[images])
    for entry in json.loads(read_one(files["icon_park_titles"], "icons.json")):
        name, title = entry["name"], entry["title"].strip()
        if name in icons and is_chinese(title):
            yield Item(
                item=name,
                name_zh=title,
                keywords_zh=distinct(entry["tag"], title),
                name_en=name.replace("-", " "),
                category_zh=entry["categoryCN"],
                category_en=entry["category"],
                source=Source("svg", icons[name]),
            )


def read_flags(files: Mapping[str, Path], images: str, ending: str = "") -> Iterator[Item]:
    """Read flags by territory; a set that has each flag in two shapes tells them apart by `ending`."""
    icons = read_icons(files[images])
    chinese, english = (read_territories(files["cldr_territories"], language) for language in ("zh", "en"))
    for code in sorted(chinese.keys() & english.keys()):
        if svg := icons.get(code.lower() + ending):
            yield Item(
                item=code,
                name_zh=f"{chinese[code]}的旗帜",
                keywords_zh=(chinese[code], "国旗", "旗帜"),
                name_en=f"flag of {english[code]}",
                keywords_en=(english[code],),
                category_zh=chinese[code],
                category_en=english[code],
                source=Source("svg", svg),
            )


def read_map_icons(files: Mapping[str, Path], images: str) -> Iterator[Item]:
    """Read what OpenStreetMap's tagging schema draws with the icons of one set: an icon has several names."""
    prefix = next(prefix for prefix, role in MAP_SETS.items() if role == images)
    icons = read_icons(files[images])
    schema = files["map_names"]
    presets = json.loads(read_one(schema, "dist/presets.min.json"))
    chinese, english = (
        json.loads(read_one(schema, f"dist/translations/{language}.min.json"))[language]["presets"]["presets"]
        for language in ("zh-CN", "en")
    )
    for key, preset in presets.items():
        found, _, icon = preset.get("icon", "").partition("-")
        name = chinese.get(key, {}).get("name", "").strip()
        if found != prefix or icon not in icons or not is_chinese(name) or key not in english:
            continue
        yield Item(
            item=key,
            name_zh=name,
            keywords_zh=distinct(chinese[key].get("terms", "").replace("，", ",").split(","), name),
            name_en=english[key]["name"],
            keywords_en=distinct(english[key].get("terms", "").split(","), english[key]["name"]),
            category_zh="地图图标",
            category_en=key.partition("/")[0],
            source=Source("svg", icons[icon]),
        )
