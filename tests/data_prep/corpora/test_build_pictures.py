"""Building the pictures folder from packages of every kind, each small, handed out by clients on the PATH."""

import dataclasses
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.corpora import build_pictures
from data_prep.corpora.build_pictures import CLASSIFICATION, SCHEMA, build
from data_prep.corpora.packages.archives import content_of, read_one, read_zip
from data_prep.corpora.packages.drawing import Source, draw
from data_prep.corpora.packages.fetch import fetch, integrity_of
from data_prep.corpora.packages.table import Package, read_packages
from data_prep.corpora.pictures import characters
from data_prep.corpora.pictures.corpus import UNSEEN_STYLES
from data_prep.corpora.pictures.stamps import captions_of
from data_prep.corpora.pictures.styles import STYLES
from pipeline.core.records import ConfigError, InputError
from tests.helpers.registries import deb, serve_packages

pytest.importorskip("resvg_py", reason="the SVG renderer is in the extra `emoji`")

BODY = '<rect width="8" height="16" fill="#ff0000"/>'
SVG = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{BODY}</svg>'.encode()
_SHOWN = {
    "emoji-twemoji",
    "emoji-two",
    "emoji-openmoji-lines",
    "icons-colour",
    "flags-square",
    "flags-circle",
    "map-maki",
}
_OF_DEBIAN = {"office-colibre", "stamps"}


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()


def _icons(*names: str, chars: dict[str, str] | None = None, **more: Any) -> dict[str, bytes]:
    table = {"icons": {name: {"body": BODY} for name in names}, "width": 16, "height": 16, **more}
    return {"icons.json": _json(table), "chars.json": _json(chars or {}), "info.json": b"licence"}


def _annotations(folder: str, language: str, entries: dict[str, list[str]]) -> dict[str, bytes]:
    named = {text: {"tts": [words[0]], "default": words} for text, words in entries.items()}
    path = f"{folder}/{language}/annotations.json"
    return {path: _json({folder: {"annotations": named}}), "LICENSE": b"licence"}


def _territories(language: str, names: dict[str, str]) -> dict[str, bytes]:
    place = {"localeDisplayNames": {"territories": names}}
    return {f"main/{language}/territories.json": _json({"main": {language: place}})}


def _translations(language: str, presets: dict[str, dict[str, str]]) -> dict[str, bytes]:
    return {f"dist/translations/{language}.min.json": _json({language: {"presets": {"presets": presets}}})}


def _emoji(code: str, group: str, skintone: str = "") -> dict[str, str]:
    return {"hexcode": code, "group": group, "skintone": skintone}


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _png() -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 10, 10))
    image.save(buffer, "PNG")
    return buffer.getvalue()


LABELS = """<oor:data xmlns:oor="http://openoffice.org/2001/registry"><node oor:name="Commands">
<node oor:name=".uno:InsertTable"><prop oor:name="Label"><value>表格(~T)...</value></prop>
<prop oor:name="TooltipLabel"><value>插入表格</value></prop></node>
<node oor:name=".uno:Bold"><prop oor:name="Label"><value>%PRODUCTNAME 粗体</value></prop></node>
<node oor:name=".uno:Other"><prop oor:name="Label"><value>没有图标</value></prop></node></node></oor:data>"""
_OFFICE = {"cmd/lc_inserttable.svg": SVG, "cmd/sc_inserttable.svg": b"smaller", "cmd/32/b.svg": SVG}
_STAMPS = "usr/share/tuxpaint/stamps/"
_COPYRIGHT = "usr/share/doc/{}/copyright"

FILES: dict[str, dict[str, bytes]] = {
    "cldr": {
        **_annotations(
            "annotations", "zh", {"🍎": ["红苹果", "水果"], "☺": ["微笑", "脸"], "🏁": ["旗", "终点"]}
        ),
        **_annotations(
            "annotations", "en", {"🍎": ["red apple"], "☺": ["smiling face (old)"], "🏁": ["flag"]}
        ),
    },
    "cldr_derived": {
        **_annotations("annotationsDerived", "zh", {}),
        **_annotations("annotationsDerived", "en", {}),
    },
    "openmoji": {
        "LICENSE.txt": b"licence",
        "data/openmoji.json": _json(
            [
                _emoji("1F34E", "food-drink"),
                _emoji("263A-FE0F", "smileys-emotion"),
                _emoji("1F3C1", "flags"),
                _emoji("1F44D-1F3FB", "people-body", "1"),
            ]
        ),
        "black/svg/1F34E.svg": SVG,
        "color/svg/1F34E.svg": b"not asked for",
    },
    "emoji_twemoji": _icons(
        "red-apple",
        "smile",
        "flag",
        chars={"1f34e": "red-apple", "263a": "old-smile", "1f3c1": "flag"},
        aliases={"old-smile": {"parent": "smile"}},
    ),
    "emoji_two": _icons("redapple", "smiling-face"),
    "icon_park_colour": _icons("a-cane", "no-title"),
    "icon_park_titles": {
        "LICENSE": b"licence",
        "icons.json": _json(
            [
                {
                    "name": "a-cane",
                    "title": "拐杖",
                    "category": "Clothes",
                    "categoryCN": "服饰",
                    "tag": ["木棍", "拐杖"],
                },
                {"name": "gone", "title": "没有", "category": "Clothes", "categoryCN": "服饰", "tag": []},
            ]
        ),
    },
    "flags_rectangle": _icons("cn-1x1", "cn-4x3"),
    "flags_circle": _icons("cn"),
    "cldr_territories": {
        "LICENSE": b"licence",
        **_territories("zh", {"CN": "中国", "001": "世界", "HK-alt-short": "香港"}),
        **_territories("en", {"CN": "China", "001": "world"}),
    },
    "maki": _icons("cafe"),
    "map_names": {
        "LICENSE.md": b"licence",
        "dist/presets.min.json": _json(
            {
                "amenity/cafe": {"icon": "maki-cafe"},
                "shop/tea": {"icon": "maki-cafe"},
                "x": {"icon": "temaki-x"},
                "y": {},
            }
        ),
        **_translations(
            "zh-CN",
            {"amenity/cafe": {"name": "咖啡馆", "terms": "咖啡,茶，咖啡馆"}, "shop/tea": {"name": "茶叶店"}},
        ),
        **_translations(
            "en", {"amenity/cafe": {"name": "Cafe", "terms": "coffee"}, "shop/tea": {"name": "Tea"}}
        ),
    },
    "office_colibre": {
        _COPYRIGHT.format("libreoffice-style-colibre"): b"licence",
        "usr/share/libreoffice/share/config/images_colibre_svg.zip": _zip(
            {**_OFFICE, "links.txt": b"cmd/sc_bold.svg cmd/32/b.svg\n"}
        ),
        "usr/share/libreoffice/share/config/images_colibre.zip": _zip({}),
        "usr/share/libreoffice/share/config/images_colibre_dark_svg.zip": _zip({}),
    },
    "office_labels": {
        _COPYRIGHT.format("libreoffice-l10n-zh-cn"): b"licence",
        "usr/lib/libreoffice/share/.registry/res/registry_zh-CN.xcd": LABELS.encode(),
    },
    "stamps": {
        _COPYRIGHT.format("tuxpaint-stamps-default"): b"licence",
        f"{_STAMPS}animals/birds/owl.png": _png(),
        f"{_STAMPS}animals/birds/owl.svg": b"the PNG comes first",
        f"{_STAMPS}animals/birds/owl.txt": "An owl.\nzh_cn.utf8=猫头鹰。\n".encode(),
        f"{_STAMPS}food/bread.svg": SVG,
        f"{_STAMPS}food/bread.txt": "Bread\nde.utf8=Brot\nzh_cn.utf8=面包\n".encode(),
        f"{_STAMPS}food/plain.png": _png(),
        f"{_STAMPS}food/plain.txt": b"Not in Chinese\n",
    },
}


@pytest.fixture
def styles() -> set[str]:
    return _SHOWN | (_OF_DEBIAN if shutil.which("dpkg-deb") else set())


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, styles: set[str]) -> dict[str, Package]:
    roles = {role for style in styles for role in STYLES[style].packages}
    pinned = {role: package for role, package in read_packages().items() if role in roles}
    return serve_packages(tmp_path, monkeypatch, pinned, FILES)


def _build(out: Path, packages: dict[str, Package], styles: set[str]) -> dict[str, int]:
    return build(out, packages, {name: style for name, style in STYLES.items() if name in styles})


def _rows(out: Path, style: str) -> dict[str, dict[str, Any]]:
    table = pq.read_table(out / f"{style}.parquet")
    assert table.schema == SCHEMA
    return {row["item"]: row for row in table.to_pylist()}


def test_packages_of_every_kind_become_tables(
    packages: dict[str, Package], styles: set[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    counts = _build(out, packages, styles)
    expected = {"emoji-twemoji": 2, "emoji-two": 2, "emoji-openmoji-lines": 1, "icons-colour": 1}
    expected |= {"flags-square": 1, "flags-circle": 1, "map-maki": 2}
    assert counts == expected | ({"office-colibre": 2, "stamps": 2} if styles >= _OF_DEBIAN else {})

    apple = _rows(out, "emoji-twemoji")["1f34e"]
    assert (apple["name_zh"], apple["keywords_zh"], apple["category_zh"]) == (
        "红苹果",
        ["水果"],
        "食物与饮料",
    )
    assert apple["source"] == f"npm @iconify-json/twemoji {packages['emoji_twemoji'].version}"
    assert (apple["licence"], apple["caption_licence"]) == ("CC-BY-4.0", "Unicode-3.0; CC-BY-SA-4.0")
    image = Image.open(io.BytesIO(apple["png"]))
    assert (image.size, image.mode) == ((64, 64), "RGB")
    assert [image.getpixel((x, 32)) for x in (10, 50)] == [(255, 0, 0), (255, 255, 255)]
    assert set(_rows(out, "emoji-two")) == {"1f34e", "263a"}  # by name, also without what stands in brackets

    cane = _rows(out, "icons-colour")["a-cane"]
    assert (cane["name_zh"], cane["keywords_zh"], cane["name_en"]) == ("拐杖", ["木棍"], "a cane")
    assert _rows(out, "flags-circle")["CN"]["name_zh"] == "中国的旗帜"
    cafe = _rows(out, "map-maki")["amenity/cafe"]
    assert (cafe["name_zh"], cafe["keywords_zh"], cafe["name_en"]) == ("咖啡馆", ["咖啡", "茶"], "Cafe")
    if styles >= _OF_DEBIAN:
        office = _rows(out, "office-colibre")
        assert set(office) == {"InsertTable", "Bold"}
        table = office["InsertTable"]
        assert (table["name_zh"], table["keywords_zh"]) == ("表格", ["插入表格"])
        assert office["Bold"]["name_zh"] == "LibreOffice 粗体"
        assert table["name_en"] == "insert table"
        stamps = _rows(out, "stamps")
        assert {key: row["name_zh"] for key, row in stamps.items()} == {
            "animals/birds/owl": "猫头鹰",
            "food/bread": "面包",
        }

    folder = out / "classification/icon_groups"
    assert (folder / "label_cn.txt").read_text(encoding="utf-8") == "服饰\n"
    assert len(list(folder.glob("test/0000/*.png"))) == 1
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "| npm @iconify-json/circle-flags" in text
    assert len(list((out / "licences").iterdir())) == len(packages)

    before = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    num_calls = len((tmp_path / "calls.txt").read_text().splitlines())
    assert num_calls == len(packages)
    _build(out, packages, styles)
    assert len((tmp_path / "calls.txt").read_text().splitlines()) == num_calls  # from the cache
    assert {path.name: path.read_bytes() for path in out.glob("*.parquet")} == before


def test_a_package_that_is_gone_or_changed_is_skipped_and_said(
    packages: dict[str, Package], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "store" / packages["maki"].pinned.replace("/", "_")).unlink()
    changed = tmp_path / "store" / packages["flags_circle"].pinned.replace("/", "_")
    changed.write_bytes(b"another file")
    counts = _build(out, packages, {"map-maki", "flags-circle", "flags-square"})
    assert counts == {"flags-square": 1}
    said = capsys.readouterr().out
    assert "npm @iconify-json/maki" in said
    assert "no such package" in said
    assert "flags-circle: skipped: no package @iconify-json/circle-flags" in said
    assert "is pinned; not used" in said
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "map-maki: skipped: no package @iconify-json/maki" in text
    with pytest.raises(InputError, match="no style could be built"):
        _build(out, packages, {"map-maki"})


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_a_newer_revision_takes_the_place_of_one_that_is_gone_if_its_content_is_the_same(
    packages: dict[str, Package], tmp_path: Path
) -> None:
    store, pinned = tmp_path / "store", packages["office_colibre"]
    older = (store / pinned.pinned).rename(tmp_path / "older.deb")
    package = dataclasses.replace(pinned, content=content_of(older))
    changelog = {"usr/share/doc/libreoffice-style-colibre/changelog": b"newer"}
    deb(store / pinned.name, {**FILES["office_colibre"], **changelog})
    found = fetch(package, tmp_path / "cache")
    assert integrity_of(found) != pinned.integrity
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert calls == [pinned.pinned, pinned.name]
    assert fetch(package, tmp_path / "cache") == found  # as it is in the cache
    assert (tmp_path / "calls.txt").read_text().splitlines() == calls

    found.unlink()
    icons = next(name for name in FILES["office_colibre"] if name.endswith(".zip"))
    shutil.rmtree(store / f"{pinned.name}.folder")
    deb(store / pinned.name, {**FILES["office_colibre"], icons: _zip({"cmd/lc_other.png": _png()})})
    with pytest.raises(InputError, match=r"libreoffice-style-colibre=.*is pinned; not used"):
        fetch(package, tmp_path / "cache")


def test_the_command_ends_with_one_line_and_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["build_pictures", str(tmp_path / "out")])
    assert build_pictures.main() == InputError.exit_status
    captured = capsys.readouterr()
    assert captured.err.startswith(f"build_pictures: {tmp_path / 'out'}: no style could be built")
    assert "npm: not found on the PATH" in captured.out


def test_the_table_of_packages_serves_every_style() -> None:
    packages = read_packages()
    assert {role for style in STYLES.values() for role in style.packages} <= set(packages)
    assert all(package.integrity.startswith("sha512-") for package in packages.values())
    assert set(UNSEEN_STYLES) <= set(STYLES)
    # What is scored by class was never trained on.
    assert set(CLASSIFICATION.values()) <= set(UNSEEN_STYLES)


def test_a_wrong_table_names_the_package_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "packages.toml"
    path.write_text('[one]\nregistry = "cargo"\nname = "x"\n')
    with pytest.raises(ConfigError, match=r"packages\.toml: one: registry: must be 'npm' or 'debian'"):
        read_packages(path)


@pytest.mark.parametrize(
    ("svg", "said"),
    [
        (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/hostname"/></svg>', "outside itself"),
        (b"<svg><image x=\"1\" xlink:href='file:///a.png'/></svg>", "outside itself"),
        (b"<svg", ""),
        (b" " * (5 << 20), "more than"),
    ],
)
def test_an_svg_that_reaches_outside_or_is_broken_is_refused(svg: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draw(Source("svg", svg))


def test_what_is_read_from_a_package_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.corpora.packages.archives.MAX_TOTAL_BYTES", 8)
    with pytest.raises(InputError, match=r"a\.zip: more than 0 MiB to read; not used"):
        list(read_zip(_zip({"one": b"12345", "two": b"12345"}), "a.zip", lambda path: True))
    with pytest.raises(InputError, match=r"a\.zip: "):
        list(read_zip(b"PK no zip", "a.zip", lambda path: True))
    (tmp_path / "cut.tgz").write_bytes(b"\x1f\x8b cut")
    with pytest.raises(InputError, match=r"cut\.tgz"):
        read_one(tmp_path / "cut.tgz", "any")


def test_captions_of_a_stamp() -> None:
    assert captions_of("A cuckoo.\nzh_cn.utf8=杜鹃。\n") == ("A cuckoo", "杜鹃")
    assert captions_of("") == ("", "")


def test_frequent_characters_have_frequent_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "山 50 n\n水 90 n\n火 1 n\n山水 7 n\n江山 9 n\n山水画 3 n\nT恤 99 n\n山山水水 80 n\n"
    monkeypatch.setattr(characters, "read_one", lambda path, name: lines.encode())
    monkeypatch.setattr(characters, "NUM_CHARACTERS", 2)
    assert characters._frequent(tmp_path) == {"水": ("山水", "山水画"), "山": ("江山", "山水", "山水画")}
