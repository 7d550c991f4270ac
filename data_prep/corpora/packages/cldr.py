"""Names of emoji and territories from Unicode CLDR's packages."""

import json
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpora.packages.archives import read_one


@dataclass(frozen=True, slots=True)
class Name:
    """What CLDR calls an emoji in one language."""

    name: str
    keywords: tuple[str, ...]


def code_points(text: str) -> str:
    """Return `☺️` as `263a`: lower-case hex joined by "-", without the variation selector fe0f."""
    return "-".join(f"{ord(character):04x}" for character in text if character != "\ufe0f")


def normalise_code(code: str) -> str:
    """Return `263A-FE0F`, as file names and lists of emoji write it, as `263a`."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_names(cldr: Path, cldr_derived: Path, language: str) -> dict[str, Name]:
    """Return names by code points, without keywords of the Chinese list that repeat the name.

    Basic annotations win over derived ones (those of composed emoji).
    """
    names: dict[str, Name] = {}
    for tarball, folder in ((cldr_derived, "annotationsDerived"), (cldr, "annotations")):
        content = json.loads(read_one(tarball, f"{folder}/{language}/annotations.json"))
        for text, entry in content[folder]["annotations"].items():
            name = entry["tts"][0] if "tts" in entry else ""
            keywords = tuple(word for word in entry.get("default", ()) if language != "zh" or word != name)
            if name:
                names[code_points(text)] = Name(name, keywords)
    return names


def read_territories(localenames: Path, language: str) -> dict[str, str]:
    """Return names by ISO 3166 code (two capital letters); variants such as `HK-alt-short` are left out."""
    content = json.loads(read_one(localenames, f"main/{language}/territories.json"))
    territories: dict[str, str] = content["main"][language]["localeDisplayNames"]["territories"]
    return {code: name for code, name in territories.items() if len(code) == 2 and code.isalpha()}
