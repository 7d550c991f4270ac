"""Builds the emoji images and names from npm packages: `python -m data_prep.corpora.build_emoji OUT`.

Three houses' drawings of the same things meet the names and keywords of Unicode CLDR 47, Chinese and
English, by code points. OUT gets `twemoji.parquet`, `openmoji.parquet`, `fluent.parquet`, the packages'
licence texts in `licences/`, and last `README.md`, so that its existence means complete. Packages are
fetched by the npm client, checked against pinned digests, kept in `OUT/.cache` and only read, never unpacked.

Needs `npm` on the PATH and the extra `emoji` (an SVG renderer). About 100 MB to fetch.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpora.packages.archives import read_members, read_one
from data_prep.corpora.packages.cldr import normalise_code, read_names
from data_prep.corpora.packages.drawing import SIDE_PX, Source, draw
from data_prep.corpora.packages.fetch import fetch
from data_prep.corpora.packages.table import Package, read_packages
from pipeline.core.records import ConfigError, InputError
from pipeline.core.terminal import guarded_output, one_line

_ROLES = ("twemoji", "openmoji", "fluent", "cldr", "cldr_derived")
PACKAGES = {role: package for role, package in read_packages().items() if role in _ROLES}
VENDORS = ("twemoji", "openmoji", "fluent")

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),  # vendor/code points
        ("vendor", pa.string()),
        ("emoji", pa.string()),  # code points in lower-case hex, joined by "-", without fe0f
        ("name_zh", pa.string()),
        ("keywords_zh", pa.list_(pa.string())),
        ("name_en", pa.string()),
        ("keywords_en", pa.list_(pa.string())),
        ("category_en", pa.string()),
        ("subcategory_en", pa.string()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("png", pa.binary()),
    ]
)


def slug(name_en: str) -> str:
    """Return `woman’s hat` as `womans-hat`, Fluent's file name."""
    return re.sub(r"[^a-z0-9]+", "-", name_en.lower().replace("’", "")).strip("-")


# Where a vendor's package keeps the images; the group is code points, for Fluent the name's slug.
IMAGE_PATHS = {
    "twemoji": re.compile(r"img/twitter/64/([^/]+)\.png"),
    "openmoji": re.compile(r"color/svg/([^/]+)\.svg"),
    "fluent": re.compile(r"icons/modern/([^/]+)\.svg"),
}


def read_images(vendor: str, tarball: Path, codes: Mapping[str, str]) -> dict[str, bytes]:
    """Return PNG bytes (SIDE_PX square, RGB on white) by code points.

    `codes` maps what IMAGE_PATHS finds, code points normalised, to the code points of the wanted emoji.
    """
    images: dict[str, bytes] = {}

    def code_of(path: str) -> str | None:
        match = IMAGE_PATHS[vendor].fullmatch(path)
        return codes.get(match[1] if vendor == "fluent" else normalise_code(match[1])) if match else None

    for path, content in read_members(tarball, lambda path: code_of(path) is not None):
        code = code_of(path)
        assert code is not None
        try:
            images[code] = draw(Source("svg" if path.endswith(".svg") else "image", content))
        except (ValueError, OSError) as error:
            raise InputError(f"{tarball}: {path} cannot be drawn ({error})") from None
    return images


def _read_me(packages: Mapping[str, Package], counts: Mapping[str, int]) -> str:
    lines = [
        "# Emoji images with Chinese and English names",
        "",
        "Made by `python -m data_prep.corpora.build_emoji` from these npm packages."
        " Their licence texts are in `licences/`.",
        "",
        "| package | licence | whose |",
        "| --- | --- | --- |",
        *(f"| {item.name} {item.version} | {item.licence} | {item.credit} |" for item in packages.values()),
        "",
        *(f"- `{vendor}.parquet`: {count} images" for vendor, count in counts.items()),
    ]
    return "\n".join(lines) + "\n"


def build(out: Path, packages: Mapping[str, Package] = PACKAGES) -> dict[str, int]:
    """Write the folder described at the top; gives the number of images of each vendor.

    The list of emoji, without skin tones, and their categories are those of Twemoji's package; an emoji that
    CLDR does not name in both languages is left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    tarballs = {}
    for role, package in packages.items():
        print(f"{package.name} {package.version}", flush=True)
        tarballs[role] = fetch(package, out / ".cache")
    names_zh = read_names(tarballs["cldr"], tarballs["cldr_derived"], "zh")
    names_en = read_names(tarballs["cldr"], tarballs["cldr_derived"], "en")
    emojis = {
        code: entry
        for entry in json.loads(read_one(tarballs["twemoji"], "emoji.json"))
        if (code := normalise_code(entry["unified"])) in names_zh and code in names_en
    }

    (out / "licences").mkdir(exist_ok=True)
    for role, package in packages.items():
        licence = read_one(tarballs[role], package.licence_file)
        (out / "licences" / f"{package.name}.txt").write_bytes(licence)

    counts = {}
    for vendor in VENDORS:
        by_slug = {slug(names_en[code].name): code for code in emojis}
        codes = by_slug if vendor == "fluent" else {code: code for code in emojis}
        images = read_images(vendor, tarballs[vendor], codes)
        rows = [
            {
                "image_id": f"{vendor}/{code}",
                "vendor": vendor,
                "emoji": code,
                "name_zh": names_zh[code].name,
                "keywords_zh": names_zh[code].keywords,
                "name_en": names_en[code].name,
                "keywords_en": names_en[code].keywords,
                "category_en": emojis[code]["category"],
                "subcategory_en": emojis[code]["subcategory"],
                "width_px": SIDE_PX,
                "height_px": SIDE_PX,
                "png": images[code],
            }
            for code in sorted(images)
        ]
        partial = out / f".{vendor}.partial"
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
        os.replace(partial, out / f"{vendor}.parquet")
        counts[vendor] = len(rows)
        print(f"{vendor}: {len(rows)} images", flush=True)
    (out / "README.md").write_text(_read_me(packages, counts), encoding="utf-8")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.corpora.build_emoji", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    with guarded_output():
        try:
            build(parser.parse_args().out)
        except (InputError, ConfigError) as error:
            print(f"build_emoji: {one_line(str(error))}", file=sys.stderr)
            return error.exit_status
        return 0


if __name__ == "__main__":
    sys.exit(main())
