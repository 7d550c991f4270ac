"""The demo corpus: its promises about images, captions, held-out pairs, and each planted row's fate."""

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from data_prep.corpora.demo import SCHEMA, DemoConfig, make_demo
from data_prep.corpora.demo_scenes import (
    COLOURS,
    SHAPES,
    Group,
    Kind,
    Scene,
    describe,
    draw,
    evaluation_scenes,
    hold_out_pairs,
    random_training_scene,
)
from data_prep.corpora.planted import PLAN
from data_prep.corpora.planted_files import BOMB_SIDE_PX
from data_prep.rules import image as image_rules
from data_prep.rules import text as text_rules
from data_prep.sources.local_server import HOST, read_site
from pipeline.core.config import build
from pipeline.core.records import ConfigError
from tests.helpers.hash_distances import nearest_hash_distances

CONFIG = DemoConfig(num_clean=60, num_evaluation=24, dirt=0.15)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_demo(CONFIG, folder)
    return folder


def _rows(corpus: Path) -> list[dict[str, Any]]:
    """Rows of all tables with the plan's three columns."""
    tables = [pq.read_table(path) for path in sorted((corpus / "tables").glob("*.parquet"))]
    assert all(table.schema.names == SCHEMA.names for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    plans = pq.read_table(corpus / "planted.parquet").to_pylist()
    assert [row["SAMPLE_ID"] for row in rows] == list(range(len(rows)))
    assert [plan["SAMPLE_ID"] for plan in plans] == list(range(len(rows)))
    return [row | plan for row, plan in zip(rows, plans, strict=True)]


def _file(corpus: Path, url: str) -> bytes:
    answer = read_site(corpus)[url.removeprefix(f"http://{HOST}")]
    assert answer.file is not None
    return (corpus / "site" / answer.file).read_bytes()


def _evaluation_images(corpus: Path) -> Iterator[Image.Image]:
    for line in (corpus / "evaluation/unseen/unseen_imgs.tsv").read_text().splitlines():
        yield Image.open(io.BytesIO(base64.b64decode(line.split("\t")[1])))


def test_same_seed_same_bytes(corpus: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    make_demo(CONFIG, tmp_path)
    assert digests(tmp_path) == digests(corpus)


def test_the_plan_counts_every_row(corpus: Path) -> None:
    planted = json.loads((corpus / "planted.json").read_text())
    assert set(planted) == {"clean", *PLAN}
    assert {name: entry["count"] for name, entry in planted.items()} == Counter(
        row["planted"] for row in _rows(corpus)
    )
    assert all(entry["count"] > 0 for entry in planted.values())
    for row in _rows(corpus):
        assert (row["fate"], row["stage"]) == (
            planted[row["planted"]]["fate"],
            planted[row["planted"]]["stage"],
        )
        assert (row["fate"] == "kept") == (row["stage"] is None)


def test_each_text_row_breaks_its_rule_and_no_other(corpus: Path) -> None:
    urls = (corpus / "evaluation/unseen/unseen_urls.txt").read_text().split()
    rules = [
        text_rules.caption_present(),
        text_rules.url_valid(),
        text_rules.not_an_evaluation_url(urls),
        text_rules.language_is("zh"),
        text_rules.score_at_least(0.26),
        text_rules.characters_between(5, 50),
        *(
            text_rules.not_blacklisted({theme: text_rules.blacklist(theme)})
            for theme in ("advertising", "file_name")
        ),
    ]
    rows = _rows(corpus)
    table = pl.DataFrame(
        {
            "url": [row["URL"] for row in rows],
            "caption": [row["TEXT"] for row in rows],
            "language": [row["LANGUAGE"] for row in rows],
            "score": [row["similarity"] for row in rows],
        }
    ).select(rule.reason.alias(str(number)) for number, rule in enumerate(rules))
    for row, reasons in zip(rows, table.rows(), strict=True):
        hits = {reason for reason in reasons if reason}
        if row["planted"] == "no_caption":  # no characters at all also means too few
            hits.discard("too_short")
        assert hits == ({row["fate"]} if row["stage"] == "filter_text" else set()), row


def test_duplicates_are_copies_and_nothing_else_is(corpus: Path) -> None:
    rows = _rows(corpus)
    pairs = Counter((row["URL"], row["TEXT"]) for row in rows if row["stage"] != "filter_text")
    extra = sum(count - 1 for count in pairs.values())
    assert extra == sum(row["planted"] == "duplicate" for row in rows)
    clean = {(row["URL"], row["TEXT"]) for row in rows if row["planted"] == "clean"}
    assert all((row["URL"], row["TEXT"]) in clean for row in rows if row["planted"] == "duplicate")


def test_pictures_that_need_care_have_their_expected_pixels(corpus: Path) -> None:
    expected = json.loads((corpus / "expected.json").read_text())
    orientations = set()
    for url, path in expected.items():
        image: Image.Image = Image.open(io.BytesIO(_file(corpus, url)))
        orientations.add(image.getexif().get(0x0112))
        if image.mode == "I;16":
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        image = ImageOps.exif_transpose(image)
        if image.mode in ("P", "RGBA"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        with Image.open(corpus / path) as reference:
            assert image.size == reference.size, url
            difference = np.asarray(image.convert("RGB"), np.int16) - np.asarray(reference, np.int16)
        assert np.abs(difference).mean() < 5, url
    assert orientations >= set(range(1, 9))
    kept = {row["URL"] for row in _rows(corpus) if row["fate"] == "kept" and row["planted"] != "clean"}
    assert set(expected) == kept


@pytest.mark.parametrize(
    ("planted", "image_format", "mode"),
    [
        ("cmyk_jpeg", "JPEG", "CMYK"),
        ("grey_jpeg", "JPEG", "L"),
        ("palette_png", "PNG", "P"),
        ("palette_transparent_png", "PNG", "P"),
        ("rgba_png", "PNG", "RGBA"),
        ("grey16_png", "PNG", "I;16"),
        ("webp", "WEBP", "RGB"),
    ],
)
def test_files_are_of_the_kind_that_they_are_planted_as(
    corpus: Path, planted: str, image_format: str, mode: str
) -> None:
    image = Image.open(io.BytesIO(_file(corpus, f"http://{HOST}/{planted}/00000.{_extension(image_format)}")))
    assert (image.format, image.mode) == (image_format, mode)
    assert ("transparency" in image.info) == (planted == "palette_transparent_png")


def _extension(image_format: str) -> str:
    return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[image_format]


def test_sixteen_bits_and_progressive_files_are_what_they_say(corpus: Path) -> None:
    assert _file(corpus, f"http://{HOST}/rgb16_png/00000.png")[24:26] == bytes([16, 2])  # depth, colour type
    assert (
        "progressive"
        in Image.open(io.BytesIO(_file(corpus, f"http://{HOST}/progressive_jpeg/00000.jpg"))).info
    )


def test_files_that_are_no_pictures_do_not_decode(corpus: Path) -> None:
    for row in _rows(corpus):
        if row["planted"] not in ("html_page", "random_bytes", "garbled_image", "truncated_jpeg"):
            continue
        with pytest.raises(OSError, match="truncated" if row["fate"] == "truncated" else "identify|decoder"):
            Image.open(io.BytesIO(_file(corpus, row["URL"]))).load()


def test_the_bomb_is_small_in_bytes_and_large_in_pixels(corpus: Path) -> None:
    body = _file(corpus, f"http://{HOST}/bomb/00000.png")
    assert len(body) < 1_000_000
    assert (int.from_bytes(body[16:20]), int.from_bytes(body[20:24])) == (BOMB_SIDE_PX, BOMB_SIDE_PX)


def test_sizes_break_the_image_rules_only_where_planned(corpus: Path) -> None:
    for row in _rows(corpus):
        if row["stage"] not in (None, "filter_image"):
            continue
        image = Image.open(io.BytesIO(_file(corpus, row["URL"])))
        sides = pl.DataFrame([image.size], schema=["width_px", "height_px"], orient="row")
        reason = sides.select(image_rules.size(16, 5.0)).item()
        assert reason == (row["fate"] if row["planted"] in ("tiny", "strip") else None), row["URL"]


def test_copies_of_evaluation_pictures_are_near_them_and_nothing_else_is(corpus: Path) -> None:
    def image_hash(image: Image.Image) -> bytes:
        return image_rules.perceptual_hash(np.asarray(image.convert("RGB")))

    evaluation = [image_hash(image) for image in _evaluation_images(corpus)]
    hashes: dict[bool, list[bytes]] = {True: [], False: []}
    for row in _rows(corpus):
        if row["planted"] in ("clean", "evaluation_copy"):
            image = Image.open(io.BytesIO(_file(corpus, row["URL"])))
            hashes[row["planted"] == "evaluation_copy"].append(image_hash(image))
    copies = nearest_hash_distances(hashes[True], evaluation)
    others = nearest_hash_distances(hashes[False], evaluation)
    assert copies.max() < others.min()


def test_the_evaluation_set_shows_unseen_pairs_once_each(corpus: Path) -> None:
    folder = corpus / "evaluation/unseen"
    texts = [json.loads(line) for line in (folder / "unseen_texts.jsonl").read_text().splitlines()]
    assert [text["image_ids"] for text in texts] == [[number] for number in range(CONFIG.num_evaluation)]
    assert len({text["text"] for text in texts}) == CONFIG.num_evaluation
    assert all(5 <= len(text["text"]) <= 50 for text in texts)
    assert len(list(_evaluation_images(corpus))) == CONFIG.num_evaluation
    urls = (folder / "unseen_urls.txt").read_text().splitlines()
    assert len(set(urls)) == CONFIG.num_evaluation
    assert all(urlsplit(url).hostname == HOST for url in urls)


def test_training_never_shows_a_held_out_pair_and_evaluation_shows_nothing_else() -> None:
    held_out = hold_out_pairs(Random("pairs"), 0.15)
    rng = Random("training")
    scenes = [random_training_scene(rng, held_out) for _ in range(2000)]
    kinds = {group.kind for scene in scenes for group in (scene.first, scene.second) if group}
    assert len(kinds) == len(COLOURS) * len(SHAPES)  # every thing is familiar
    for scene in scenes:
        assert scene.second is None or frozenset((scene.first.kind, scene.second.kind)) not in held_out
    evaluation = evaluation_scenes(rng, held_out, 100)
    for scene in evaluation:
        assert scene.second is not None
        assert frozenset((scene.first.kind, scene.second.kind)) in held_out


def test_captions_have_5_to_50_characters_in_all_forms() -> None:
    rng = Random("captions")
    forms = set()
    for _ in range(3000):
        caption = describe(rng, random_training_scene(rng, set()), colourless=rng.random() < 0.2)
        assert 5 <= len(caption.chinese) <= 50
        assert caption.english.isascii()
        forms.add(caption.chinese[:2])
    assert len(forms) > 15


def test_a_caption_tells_both_groups_and_their_relation_in_both_languages() -> None:
    scene = Scene(
        Group(Kind("红色", "圆形"), 3, "small"), "白色", "left", Group(Kind("蓝色", "正方形"), 1, "large")
    )
    rng = Random("one scene")
    captions = {describe(rng, scene) for _ in range(200)}
    assert len({caption.chinese for caption in captions}) > 20
    for caption in captions:
        assert caption.chinese.index("圆形") != caption.chinese.index("正方形")
        assert all(word in caption.chinese for word in ("三个", "红色", "小", "一个", "蓝色", "大"))
        assert "three small red circles" in caption.english
        assert "one large blue square" in caption.english
        assert "左" in caption.chinese
        assert "left" in caption.english
    grey = describe(rng, scene, colourless=True)
    assert "色" not in grey.chinese
    assert "red" not in grey.english.split()


@pytest.mark.parametrize(
    ("relation", "side"), [("left", "left"), ("right", "right"), ("above", "top"), ("below", "bottom")]
)
def test_the_picture_shows_the_relation(relation: Any, side: str) -> None:
    scene = Scene(
        Group(Kind("红色", "圆形"), 2, "plain"), "白色", relation, Group(Kind("蓝色", "正方形"), 2, "plain")
    )
    image_HWC = np.asarray(draw(Random("relation"), scene, 96, 128), np.int16)
    red_HW = (image_HWC[:, :, 0] - image_HWC[:, :, 2]) > 100
    blue_HW = (image_HWC[:, :, 2] - image_HWC[:, :, 0]) > 100
    (red_y, red_x), (blue_y, blue_x) = (np.argwhere(mask).mean(0) for mask in (red_HW, blue_HW))
    offset = {
        "left": blue_x - red_x,
        "right": red_x - blue_x,
        "top": blue_y - red_y,
        "bottom": red_y - blue_y,
    }
    assert offset[side] > 20


def test_a_scene_told_from_the_other_side_is_the_same_scene() -> None:
    red, blue = Group(Kind("红色", "圆形"), 1, "plain"), Group(Kind("蓝色", "菱形"), 2, "small")
    assert Scene(red, "白色", "right", blue).canonical() == Scene(blue, "白色", "left", red).canonical()
    assert Scene(red, "白色", "above", blue).canonical() == Scene(blue, "白色", "below", red).canonical()


@pytest.mark.parametrize("name", ["num_clean", "num_evaluation", "image_size_px", "dirt"])
def test_numbers_that_leave_nothing_to_make_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.toml: {name}: must be (at least|greater than) .*, found 0"):
        build(DemoConfig, {name: 0}, "run.toml")
