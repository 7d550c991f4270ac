"""Reads LibreOffice's toolbar icons, one package a style, with the Chinese labels of its commands."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from data_prep.corpora.packages.archives import read_members, read_one, read_zip
from data_prep.corpora.packages.drawing import Source
from data_prep.corpora.pictures.items import Item, distinct, is_chinese
from pipeline.core.records import InputError

_LABELS = "usr/lib/libreoffice/share/.registry/res/registry_zh-CN.xcd"
_OOR = "{http://openoffice.org/2001/registry}"
_ZIP = re.compile(r"usr/share/libreoffice/share/config/images_([a-z_]+)\.zip")
_SIZES = ("cmd/32/", "cmd/lc_", "cmd/sc_")  # 32, 24 and 16 px, the largest that a command has
# "文件(~F)...", "~表格": the key of a menu entry, and that a dialog follows.
_MENU_KEY = re.compile(r"[(（]~.[)）]|~|\.\.\.$|…$|[:：]$")


@cache
def _labels(package: Path) -> dict[str, tuple[str, ...]]:
    """Return the Chinese labels of each command (`InsertTable`), the one of the toolbar first."""
    labels: dict[str, list[str]] = {}
    for node in ElementTree.fromstring(read_one(package, _LABELS)).iter("node"):
        name = node.get(f"{_OOR}name", "")
        if not name.startswith(".uno:"):
            continue
        found = {prop.get(f"{_OOR}name"): prop.findtext("value") or "" for prop in node.findall("prop")}
        labels.setdefault(name.removeprefix(".uno:"), []).extend(
            _MENU_KEY.sub("", found.get(key, "").replace("%PRODUCTNAME", "LibreOffice"))
            for key in ("Label", "TooltipLabel", "ContextLabel")
        )
    cleaned = {command: distinct(texts) for command, texts in labels.items()}
    return {command: texts for command, texts in cleaned.items() if texts and is_chinese(texts[0])}


def _words(command: str) -> str:
    """Return `InsertPageField` as `insert page field`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[.\-_:?=]+", " ", command).lower().strip()


def read_office(files: Mapping[str, Path], images: str) -> Iterator[Item]:
    """Read one style: the SVG icons where the package has them, else the PNG ones."""
    zips = {
        match[1]: content
        for path, content in read_members(files[images], lambda path: _ZIP.fullmatch(path) is not None)
        if (match := _ZIP.fullmatch(path)) and "dark" not in match[1]
    }
    if not zips:
        raise InputError(f"{files[images]}: no images_*.zip in it; delete it and build again")
    name = max(zips, key=lambda name: name.endswith("_svg"))
    where = f"{files[images]}: images_{name}.zip"
    members = dict(read_zip(zips[name], where, lambda path: path.startswith("cmd/") or path == "links.txt"))
    links = dict(
        line.split() for line in members.get("links.txt", b"").decode().splitlines() if len(line.split()) == 2
    )
    ending = ".svg" if name.endswith("_svg") else ".png"
    for command, (label, *others) in _labels(files["office_labels"]).items():
        paths = [f"{size}{command.lower()}{ending}" for size in _SIZES]
        found = next((path for path in (links.get(path, path) for path in paths) if path in members), None)
        if found is not None:
            yield Item(
                item=command,
                name_zh=label,
                keywords_zh=others,
                name_en=_words(command),
                category_zh="办公软件图标",
                category_en="office",
                source=Source("svg" if ending == ".svg" else "image", members[found]),
            )
