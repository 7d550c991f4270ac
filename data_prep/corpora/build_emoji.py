"""Builds the emoji images and names from npm packages: `python -m data_prep.corpora.build_emoji OUT`.

Three houses' drawings of the same things meet the names and keywords of Unicode CLDR 47, Chinese and
English, by code points. OUT gets `twemoji.parquet`, `openmoji.parquet`, `fluent.parquet`, the packages'
licence texts in `licences/`, and last `README.md`, so that its existence means complete. Packages are
fetched by the npm client, checked against pinned digests, kept in `OUT/.cache` and only read, never unpacked.

Needs `npm` on the PATH and the extra `emoji` (an SVG renderer). About 100 MB to fetch.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.core.processes import dies_with_us
from pipeline.core.records import ConfigError, InputError
from pipeline.core.terminal import guarded_output, one_line

SIDE_PX = 64
MAX_MEMBER_BYTES = 64 << 20  # the largest file that is read has 2 MB
NPM_TIMEOUT_S = 900


@dataclass(frozen=True, slots=True)
class Package:
    """A pinned npm package.

    `integrity` is npm's own form: the algorithm and the digest in base64.
    """

    name: str
    version: str
    integrity: str
    licence: str  # SPDX, of what is used here
    licence_file: str
    credit: str  # whose work it is, and where


PACKAGES = {
    "twemoji": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "CC-BY-4.0",
        "LICENSE",
        "Twemoji graphics, copyright Twitter, Inc. and other contributors"
        " (https://creativecommons.org/licenses/by/4.0/); the package's own code and data are MIT",
    ),
    "openmoji": Package(
        "openmoji",
        "17.0.0",
        "sha512-EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
        "CC-BY-SA-4.0",
        "LICENSE.txt",
        "OpenMoji, the open-source emoji and icon project"
        " (https://creativecommons.org/licenses/by-sa/4.0/); rendered at 64 px",
    ),
    "fluent": Package(
        "fluentui-emoji",
        "1.3.0",
        "sha512-JTXXwqIie2rWTgOkIJDJxr0WtwTz2WU4kdOq8buLVThYwQ264aFR2jdTyuon2oEbLqqGMT64zI4btyn1saB2xw==",
        "MIT",
        "LICENSE",
        "Fluent Emoji, copyright Microsoft Corporation, packaged by Mohammad Abu Mattar; rendered at 64 px",
    ),
    "cldr": Package(
        "cldr-annotations-full",
        "47.0.0",
        "sha512-kN3w6S5lu07gVsHod0St7WmfAxSruGsqZssBwu7Jcj5VbqgS2L3PeSFlPE1LwVX7ycBuCipsAiLpuoOxFRrVBQ==",
        "Unicode-3.0",
        "LICENSE",
        "names and keywords, Unicode CLDR",
    ),
    "cldr_derived": Package(
        "cldr-annotations-derived-full",
        "47.0.0",
        "sha512-4DFjfdmPlZZTcVeOVTbWqe6bKTd3U+3q+KtpkzAR3awTexZ6nwNRRbadKCgNinT54XP1h4KV+Ws5Vm6R5Uvxgw==",
        "Unicode-3.0",
        "LICENSE",
        "names and keywords of composed emoji, Unicode CLDR",
    ),
}
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


@dataclass(frozen=True, slots=True)
class Name:
    """What CLDR calls an emoji in one language."""

    name: str
    keywords: tuple[str, ...]


def integrity_of(path: Path) -> str:
    """Return the sha512 of a file in npm's form."""
    with open(path, "rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def fetch(package: Package, cache: Path) -> Path:
    """Get a package's tarball into the cache with the npm client, unless it is there; check its digest.

    Raises:
        ConfigError: if there is no npm.
        InputError: if npm fails or the digest is another one.
    """
    cache = cache.resolve()  # npm runs in another folder
    target = cache / f"{package.name}-{package.version}.tgz"
    if target.is_file() and integrity_of(target) == package.integrity:
        return target
    if shutil.which("npm") is None:
        raise ConfigError("npm: not found on the PATH; install Node.js's npm (Debian: apt-get install npm)")
    cache.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [
            "npm",
            "pack",
            wanted,
            "--pack-destination",
            folder,
            "--ignore-scripts",
            "--loglevel",
            "error",
        ]
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=NPM_TIMEOUT_S,
                cwd=folder,
                preexec_fn=dies_with_us(),
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"npm pack {wanted}: not finished after {NPM_TIMEOUT_S} s; run again") from None
        tarballs = list(Path(folder).glob("*.tgz"))
        if result.returncode != 0 or len(tarballs) != 1:
            reason = (result.stderr.strip() or "no tarball").splitlines()[-1]
            raise InputError(f"npm pack {wanted}: exit status {result.returncode}: {reason}; run again")
        found = integrity_of(tarballs[0])
        if found != package.integrity:
            raise InputError(f"{wanted}: digest {found}, but {package.integrity} is pinned; not used")
        os.replace(tarballs[0], target)
    return target


def read_members(tarball: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Read the wanted regular files of an npm tarball (paths below `package/`), writing nothing to disk."""
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if member.isreg() and member.size <= MAX_MEMBER_BYTES and wanted(path):
                file = archive.extractfile(member)
                assert file is not None  # a regular file has content
                yield path, file.read()


def _read_one(tarball: Path, path: str) -> bytes:
    for _, content in read_members(tarball, lambda name: name == path):
        return content
    raise InputError(f"{tarball}: no file {path} in it; delete {tarball.parent} and build again")


def code_points(text: str) -> str:
    """Return `☺️` as `263a`: lower-case hex joined by "-", without the variation selector fe0f."""
    return "-".join(f"{ord(character):04x}" for character in text if character != "\ufe0f")


def normalise_code(code: str) -> str:
    """Return `263A-FE0F`, as file names and emoji.json write it, as `263a`."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def slug(name_en: str) -> str:
    """Return `woman’s hat` as `womans-hat`, Fluent's file name."""
    return re.sub(r"[^a-z0-9]+", "-", name_en.lower().replace("’", "")).strip("-")


def read_names(cldr: Path, cldr_derived: Path, language: str) -> dict[str, Name]:
    """Return names by code points, without keywords of the Chinese list that repeat the name.

    Basic annotations win over derived ones (those of composed emoji).
    """
    names: dict[str, Name] = {}
    for tarball, folder in ((cldr_derived, "annotationsDerived"), (cldr, "annotations")):
        content = json.loads(_read_one(tarball, f"{folder}/{language}/annotations.json"))
        for text, entry in content[folder]["annotations"].items():
            name = entry["tts"][0] if "tts" in entry else ""
            keywords = tuple(word for word in entry.get("default", ()) if language != "zh" or word != name)
            if name:
                names[code_points(text)] = Name(name, keywords)
    return names


def on_white(image: Image.Image) -> Image.Image:
    """Return an image in the middle of a white square of SIDE_PX, RGB."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image.convert("RGBA"), ((side - image.width) // 2, (side - image.height) // 2))
    rgb = square.convert("RGB")
    return rgb if side == SIDE_PX else rgb.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)


def render_svg(svg: bytes) -> Image.Image:
    """Render at SIDE_PX.

    Raises:
        ConfigError: if the renderer is not installed.
        ValueError: if the SVG is broken.
    """
    try:
        import resvg_py
    except ImportError:
        raise ConfigError("resvg-py: not installed; pip install 'cnclip-pretraining[emoji]'") from None
    # System fonts would make the images differ between machines.
    png = resvg_py.svg_to_bytes(
        svg_string=svg.decode(), width=SIDE_PX, height=SIDE_PX, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png)))


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
            image = render_svg(content) if path.endswith(".svg") else Image.open(io.BytesIO(content))
            buffer = io.BytesIO()
            on_white(image).save(buffer, "PNG")
        except (ValueError, OSError) as error:
            raise InputError(f"{tarball}: {path} cannot be drawn ({error})") from None
        images[code] = buffer.getvalue()
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
        for entry in json.loads(_read_one(tarballs["twemoji"], "emoji.json"))
        if (code := normalise_code(entry["unified"])) in names_zh and code in names_en
    }

    (out / "licences").mkdir(exist_ok=True)
    for role, package in packages.items():
        licence = _read_one(tarballs[role], package.licence_file)
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
