"""Building the emoji folder from packages, with small packages and an npm that hands them out."""

import dataclasses
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.corpora import build_emoji
from data_prep.corpora.build_emoji import PACKAGES, build, slug
from data_prep.corpora.emoji import EmojiConfig, make_emoji
from data_prep.corpora.packages.archives import read_members
from data_prep.corpora.packages.cldr import code_points, normalise_code
from data_prep.corpora.packages.drawing import SIDE_PX, on_white
from data_prep.corpora.packages.fetch import fetch, integrity_of
from data_prep.corpora.packages.table import Package
from pipeline.core.records import ConfigError, InputError
from tests.helpers.registries import serve_packages, tarball


def _png(colour: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (72, 72), colour).save(buffer, "PNG")
    return buffer.getvalue()


def _svg(colour: str) -> bytes:
    shape = f'<rect width="36" height="72" fill="{colour}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{shape}</svg>'.encode()


def _annotations(folder: str, entries: dict[str, Any]) -> bytes:
    return json.dumps({folder: {"annotations": entries}}, ensure_ascii=False).encode()


def _entry(name: str, *keywords: str) -> dict[str, list[str]]:
    return {"tts": [name], "default": list(keywords)}


EMOJI_JSON = json.dumps(
    [
        {"unified": "1F34E", "category": "Food & Drink", "subcategory": "food-fruit"},
        {"unified": "1F452", "category": "Objects", "subcategory": "clothing"},
        {"unified": "2764-FE0F-200D-1F525", "category": "Smileys & Emotion", "subcategory": "heart"},
        {"unified": "1F1E8-1F1F6", "category": "Flags", "subcategory": "flag"},  # CLDR has no name for it
    ]
).encode()
FILES: dict[str, dict[str, bytes]] = {
    "twemoji": {
        "LICENSE": b"licence of twemoji",
        "emoji.json": EMOJI_JSON,
        "img/twitter/64/1f34e.png": _png((200, 0, 0, 255)),
        "img/twitter/64/1f452.png": _png((0, 0, 0, 0)),
        "img/twitter/64/2764-fe0f-200d-1f525.png": _png((250, 120, 0, 255)),
        "img/twitter/64/1f1e8-1f1f6.png": _png((0, 0, 200, 255)),
        "img/twitter/64/1f44d-1f3fb.png": _png((0, 0, 9, 255)),  # a skin tone: not in the list of emoji
        "img/apple/64/1f34e.png": b"not asked for",
    },
    "openmoji": {
        "LICENSE.txt": b"licence of openmoji",
        "color/svg/1F34E.svg": _svg("#ff0000"),
        "color/svg/2764-FE0F-200D-1F525.svg": _svg("#ff8000"),
        "black/svg/1F34E.svg": _svg("#000000"),
    },
    "fluent": {"LICENSE": b"licence of fluent", "icons/modern/womans-hat.svg": _svg("#00ff00")},
    "cldr": {
        "LICENSE": b"licence of cldr",
        "annotations/zh/annotations.json": _annotations(
            "annotations",
            {
                "🍎": _entry("红苹果", "红苹果", "水果"),
                "👒": _entry("女帽", "帽子"),
                "😀": {"default": ["没有名字"]},
            },
        ),
        "annotations/en/annotations.json": _annotations(
            "annotations", {"🍎": _entry("red apple", "red apple", "fruit"), "👒": _entry("woman’s hat")}
        ),
    },
    "cldr_derived": {
        "LICENSE": b"licence of cldr derived",
        "annotationsDerived/zh/annotations.json": _annotations(
            "annotationsDerived", {"❤️‍🔥": _entry("火上之心", "心"), "🍎": _entry("不用", "不用")}
        ),
        "annotationsDerived/en/annotations.json": _annotations(
            "annotationsDerived", {"❤️‍🔥": _entry("heart on fire", "burn")}
        ),
    },
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Package]:
    """Small packages, which an `npm` on the PATH packs; it notes each call in calls.txt."""
    return serve_packages(tmp_path, monkeypatch, PACKAGES, FILES)


def _calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_pictures_meet_their_names(packages: dict[str, Package], tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="the SVG renderer is in the extra `emoji`")
    out = tmp_path / "out"
    assert build(out, packages) == {"twemoji": 3, "openmoji": 2, "fluent": 1}
    rows = {row["image_id"]: row for row in pq.read_table(out / "twemoji.parquet").to_pylist()}
    assert list(rows) == ["twemoji/1f34e", "twemoji/1f452", "twemoji/2764-200d-1f525"]
    apple = rows["twemoji/1f34e"]
    assert (apple["name_zh"], apple["keywords_zh"]) == ("红苹果", ["水果"])
    assert (apple["name_en"], apple["keywords_en"]) == ("red apple", ["red apple", "fruit"])
    assert (apple["category_en"], apple["subcategory_en"]) == ("Food & Drink", "food-fruit")
    assert rows["twemoji/2764-200d-1f525"]["name_zh"] == "火上之心"

    def pixels_HWC(vendor: str, row: int) -> Any:
        image = Image.open(io.BytesIO(pq.read_table(out / f"{vendor}.parquet")["png"][row].as_py()))
        assert (image.size, image.mode) == ((SIDE_PX, SIDE_PX), "RGB")
        return np.asarray(image)

    assert pixels_HWC("twemoji", 0)[30, 30].tolist() == [200, 0, 0]
    assert (pixels_HWC("twemoji", 1) == 255).all()  # transparent: white
    assert pixels_HWC("openmoji", 0)[30, 10].tolist() == [255, 0, 0]
    assert pixels_HWC("openmoji", 0)[30, 50].tolist() == [255, 255, 255]
    assert pixels_HWC("fluent", 0)[30, 10].tolist() == [0, 255, 0]

    assert (out / "licences/openmoji.txt").read_bytes() == b"licence of openmoji"
    assert sorted(path.stem for path in (out / "licences").iterdir()) == sorted(
        p.name for p in packages.values()
    )
    assert "CC-BY-SA-4.0" in (out / "README.md").read_text()

    before = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    assert len(_calls(tmp_path)) == 5
    build(out, packages)
    assert len(_calls(tmp_path)) == 5  # from the cache
    assert {path.name: path.read_bytes() for path in out.glob("*.parquet")} == before

    make_emoji(EmojiConfig(folder=str(out)), tmp_path / "corpus")
    assert (tmp_path / "corpus/evaluation/fluent/fluent_texts.jsonl").read_text() == (
        '{"text_id": 0, "text": "女帽", "image_ids": [0]}\n'
    )


def test_a_damaged_cache_is_fetched_again(packages: dict[str, Package], tmp_path: Path) -> None:
    package = packages["cldr"]
    path = fetch(package, tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-10])
    assert integrity_of(fetch(package, tmp_path / "cache")) == package.integrity
    assert len(_calls(tmp_path)) == 2


def test_a_relative_folder_is_where_the_command_runs(
    packages: dict[str, Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert integrity_of(fetch(packages["cldr"], Path("cache"))) == packages["cldr"].integrity


def test_another_digest_is_refused(packages: dict[str, Package], tmp_path: Path) -> None:
    package = dataclasses.replace(packages["cldr"], integrity=PACKAGES["cldr"].integrity)
    with pytest.raises(
        InputError, match=r"cldr-annotations-full@47\.0\.0: digest sha512-.* is pinned; not used"
    ):
        fetch(package, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_that_fails_or_is_missing_is_named(
    packages: dict[str, Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = dataclasses.replace(packages["cldr"], version="0.0.1")
    with pytest.raises(
        InputError, match=r"npm pack cldr-annotations-full@0\.0\.1: exit status 1: npm error 404"
    ):
        fetch(gone, tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="npm: not found on the PATH"):
        fetch(packages["cldr"], tmp_path / "cache")


def test_the_command_ends_with_one_line_and_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["build_emoji", str(tmp_path / "out")])
    assert build_emoji.main() == 2
    assert capsys.readouterr().err.splitlines() == [
        "build_emoji: npm: not found on the PATH; install Node.js's npm (Debian: apt-get install npm)"
    ]


def test_a_package_without_the_file_is_named(packages: dict[str, Package], tmp_path: Path) -> None:
    tarball(tmp_path / "store" / "cldr-annotations-full@47.0.0", {"LICENSE": b"only"})
    integrity = integrity_of(tmp_path / "store" / "cldr-annotations-full@47.0.0")
    packages["cldr"] = dataclasses.replace(packages["cldr"], integrity=integrity)
    with pytest.raises(InputError, match=r"no file annotations/zh/annotations\.json in it"):
        build(tmp_path / "out", packages)


def test_links_in_a_tarball_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as archive:
        link = tarfile.TarInfo("package/passwords")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        hard = tarfile.TarInfo("package/hard")
        hard.type, hard.linkname = tarfile.LNKTYPE, "package/passwords"
        archive.addfile(hard)
    assert list(read_members(tmp_path / "evil.tgz", lambda path: True)) == []


def test_code_points_and_slugs() -> None:
    assert code_points("❤️‍🔥") == normalise_code("2764-FE0F-200D-1F525") == "2764-200d-1f525"
    assert code_points("#️⃣") == "0023-20e3"
    assert slug("woman’s hat") == "womans-hat"
    assert slug("A button (blood type)") == "a-button-blood-type"


def test_wide_pictures_are_centred_on_white() -> None:
    image = on_white(Image.new("RGBA", (128, 64), (255, 0, 0, 255)))
    pixels_HWC = np.asarray(image)
    assert image.size == (SIDE_PX, SIDE_PX)
    assert pixels_HWC[2, 32].tolist() == [255, 255, 255]
    assert pixels_HWC[32, 2].tolist() == [255, 0, 0]
