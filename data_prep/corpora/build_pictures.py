"""Builds the pictures corpus from packages: `python -m data_prep.corpora.build_pictures OUT`.

OUT gets one table a style (`emoji-noto.parquet`, …: an image a row with its Chinese name, and the packages
and licences of both), classification sets in `classification/`, licence texts in `licences/`, and last
`README.md`, so that its existence means complete. `packages/packages.toml` pins the packages; their
registries' clients fetch them into `OUT/.cache`, where they are only read, never unpacked. A package that is
gone, or has another digest than the pinned one, is skipped with the styles that need it.

Needs `npm`, Debian's `apt-get` and `dpkg-deb` for half of the styles, and the extra `emoji` (SVG renderer).
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpora.packages.archives import read_one
from data_prep.corpora.packages.drawing import SIDE_PX, Drawn, Source, drawing
from data_prep.corpora.packages.fetch import fetch_all
from data_prep.corpora.packages.table import Package, read_packages
from data_prep.corpora.pictures.items import Item
from data_prep.corpora.pictures.styles import STYLES, Style
from pipeline.core.records import ConfigError, InputError
from pipeline.core.terminal import guarded_output, one_line

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),  # style/item
        ("vendor", pa.string()),  # the style
        ("item", pa.string()),  # the same thing has the same id in every style of a family
        ("name_zh", pa.string()),
        ("keywords_zh", pa.list_(pa.string())),
        ("name_en", pa.string()),
        ("keywords_en", pa.list_(pa.string())),
        ("category_zh", pa.string()),
        ("category_en", pa.string()),
        ("licence", pa.string()),  # of the image, SPDX
        ("source", pa.string()),  # package of the image: registry, name, version
        ("caption_licence", pa.string()),
        ("caption_source", pa.string()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("png", pa.binary()),
    ]
)
# Sets by categories, from one style each: one of those that the recipe keeps out of training.
CLASSIFICATION = {
    "emoji_groups": "emoji-fluent",
    "icon_groups": "icons-colour",
    "flags": "flags-circle",
    "characters": "characters-kai",
}
NUM_SHOWN = 3  # of images that were left out


def build(
    out: Path, packages: Mapping[str, Package] | None = None, styles: Mapping[str, Style] = STYLES
) -> dict[str, int]:
    """Write the folder described at the top; gives the number of images of each style.

    Raises:
        InputError: if no style could be built, or a package is damaged inside.
    """
    packages = read_packages() if packages is None else packages
    needed = {role for style in styles.values() for role in style.packages}
    out.mkdir(parents=True, exist_ok=True)
    for name in ("README.md", *(f"{name}.parquet" for name in styles)):
        (out / name).unlink(missing_ok=True)  # of an earlier build, which may have had other packages
    print(f"fetching {len(needed)} packages", flush=True)
    files, gone = fetch_all({role: packages[role] for role in sorted(needed)}, out / ".cache")
    notes = [f"{packages[role].source}: skipped: {one_line(str(error))}" for role, error in gone.items()]
    num_bytes = sum(path.stat().st_size for path in files.values())
    print("\n".join([*notes, f"{len(files)} packages, {num_bytes / 1e6:.0f} MB"]), flush=True)
    _copy_licences(out, packages, files)
    counts: dict[str, int] = {}
    with drawing() as draw_all:
        for name, style in styles.items():
            missing = [role for role in style.packages if role not in files]
            if missing:
                said = [f"{name}: skipped: no package {', '.join(packages[role].name for role in missing)}"]
            else:
                number, said = _build_style(out, name, style, packages, files, draw_all)
                if number:
                    counts[name] = number
            notes += said
            print("\n".join(said or [f"{name}: {counts[name]} images"]), flush=True)
    if not counts:
        raise InputError(f"{out}: no style could be built; the lines above say why")
    _write_classification(out, counts)
    text = _read_me({role: packages[role] for role in files}, counts, notes)
    (out / "README.md").write_text(text, encoding="utf-8")
    return counts


def _build_style(
    out: Path,
    name: str,
    style: Style,
    packages: Mapping[str, Package],
    files: Mapping[str, Path],
    draw_all: Callable[[Sequence[Source]], list[Drawn]],
) -> tuple[int, list[str]]:
    """Write the table of one style; return the number of its images and what there is to say."""
    items = list(style.read(files, style.images))
    drawn = draw_all([item.source for item in items])
    rows = [
        _row(name, item, result.png, style, packages)
        for item, result in zip(items, drawn, strict=True)
        if not result.refused
    ]
    if not rows:
        return 0, [f"{name}: skipped: {packages[style.images].name} has no image with a name"]
    refused = [
        f"{item.item}: {result.refused}" for item, result in zip(items, drawn, strict=True) if result.refused
    ]
    partial = out / f".{name}.partial"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
    os.replace(partial, out / f"{name}.parquet")
    if not refused:
        return len(rows), []
    shown = "; ".join(refused[:NUM_SHOWN])
    more = f"; and {len(refused) - NUM_SHOWN} more" if len(refused) > NUM_SHOWN else ""
    return len(rows), [f"{name}: {len(rows)} images, {len(refused)} left out: {one_line(shown)}{more}"]


def _row(
    name: str, item: Item, png: bytes, style: Style, packages: Mapping[str, Package]
) -> dict[str, object]:
    image, captions = packages[style.images], [packages[role] for role in style.captions]
    return {
        "image_id": f"{name}/{item.item}",
        "vendor": name,
        "item": item.item,
        "name_zh": item.name_zh,
        "keywords_zh": item.keywords_zh,
        "name_en": item.name_en,
        "keywords_en": item.keywords_en,
        "category_zh": item.category_zh,
        "category_en": item.category_en,
        "licence": image.licence,
        "source": image.source,
        "caption_licence": "; ".join(dict.fromkeys(package.licence for package in captions)),
        "caption_source": "; ".join(package.source for package in captions),
        "width_px": SIDE_PX,
        "height_px": SIDE_PX,
        "png": png,
    }


def _copy_licences(out: Path, packages: Mapping[str, Package], files: Mapping[str, Path]) -> None:
    folder = out / "licences"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for role, path in files.items():
        target = folder / f"{packages[role].name.replace('/', '_')}.txt"
        target.write_bytes(read_one(path, packages[role].licence_file))


def _write_classification(out: Path, counts: Mapping[str, int]) -> None:
    """Write the sets in Chinese-CLIP's layout: a folder a class, and their names in `label_cn.txt`."""
    shutil.rmtree(out / "classification", ignore_errors=True)
    for name, style in CLASSIFICATION.items():
        if not counts.get(style):
            continue
        folder = out / "classification" / name
        table = pq.read_table(out / f"{style}.parquet", columns=["category_zh", "png"])
        rows = list(zip(table["category_zh"].to_pylist(), table["png"].to_pylist(), strict=True))
        classes = list(dict.fromkeys(category for category, _ in rows))
        number = {category: row for row, category in enumerate(classes)}
        for row in number.values():
            (folder / "test" / f"{row:04d}").mkdir(parents=True)
        for row, (category, png) in enumerate(rows):
            (folder / "test" / f"{number[category]:04d}" / f"{row:05d}.png").write_bytes(png)
        (folder / "label_cn.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def _read_me(packages: Mapping[str, Package], counts: Mapping[str, int], notes: list[str]) -> str:
    lines = [
        "# Images with Chinese and English names",
        "",
        "Made by `python -m data_prep.corpora.build_pictures` from these packages. Their licence texts are in"
        " `licences/`; each row has the licences and packages of its image and its caption.",
        "",
        "| package | licence | whose |",
        "| --- | --- | --- |",
        *(f"| {item.source} | {item.licence} | {item.credit} |" for item in packages.values()),
        "",
        *(f"- `{style}.parquet`: {count} images" for style, count in counts.items()),
        f"- together: {sum(counts.values())} images",
        *(["", "Left out:", "", *(f"- {note}" for note in notes)] if notes else []),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.corpora.build_pictures", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    with guarded_output():
        started = monotonic()
        try:
            counts = build(parser.parse_args().out)
        except (InputError, ConfigError) as error:
            print(f"build_pictures: {one_line(str(error))}", file=sys.stderr)
            return error.exit_status
        print(f"{sum(counts.values())} images of {len(counts)} styles in {monotonic() - started:.0f} s")
        return 0


if __name__ == "__main__":
    sys.exit(main())
