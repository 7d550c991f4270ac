"""Emoji images with their Chinese names as a corpus: real drawings of the same things by several houses.

A vendor's file is a Parquet table as `data_prep.corpora.build_emoji` writes it: one image a row, with the
names and keywords of Unicode CLDR. Some vendors' images become training rows on a loopback web site, those
of others an evaluation set: same names, a style never seen.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Literal, Protocol
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Ge
from PIL import Image, UnidentifiedImageError

from data_prep.formats.cnclip import EvaluationText, write_evaluation
from data_prep.sources.local_server import HOST, Answer, write_site
from pipeline.core import store
from pipeline.core.files.foreign import foreign
from pipeline.core.records import ConfigError, InputError

COLUMNS = ("name_zh", "keywords_zh", "name_en", "keywords_en", "category_en", "png")
UNSCORED_CATEGORY = "Flags"  # nearly the same image in every style: matching pixels solves them


@dataclass(frozen=True, slots=True, kw_only=True)
class EmojiConfig:
    """`[corpus]` of the emoji run: which vendors' images to train on and which to score."""

    kind: Literal["emoji"] = "emoji"
    """Chooses this corpus."""
    folder: str
    """Folder of the `<vendor>.parquet` files."""
    train: tuple[str, ...] = ()
    """Vendors to train on; empty: every file that is not evaluated."""
    evaluate: tuple[str, ...] = ("fluent",)
    """Vendors to score on, one evaluation set each."""
    captions_per_picture: Annotated[int, Ge(1)] = 3
    """Rows for each image: its name, then the name with some of its keywords."""
    max_keywords: Annotated[int, Ge(1)] = 3
    """Largest number of keywords in one caption."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the choice of keywords."""


@dataclass(frozen=True, slots=True)
class Emoji:
    """One vendor's image of one thing."""

    name_zh: str
    keywords_zh: Sequence[str]
    name_en: str
    keywords_en: Sequence[str]
    category_en: str
    png: bytes


def captions(
    name: str,
    keywords: Sequence[str],
    *,
    count: int,
    max_keywords: int,
    separators: tuple[str, str],
    rng: Random,
) -> list[str]:
    """Return captions of one image: the name, then `count - 1` times the name with keywords.

    Each has 1 to `max_keywords` keywords; `separators` stand after the name and between keywords. Keywords
    equal to the name are left out; a caption that was drawn before stays in place, so that the list always
    has `count` entries.
    """
    usable = [keyword for keyword in keywords if keyword != name]
    forms = [name]
    for _ in range(count - 1):
        chosen = rng.sample(usable, rng.randint(1, min(max_keywords, len(usable)))) if usable else []
        forms.append(name + separators[0] + separators[1].join(chosen) if chosen else name)
    return forms


def read_vendor(folder: Path, vendor: str) -> list[Emoji]:
    """Read `<vendor>.parquet`.

    Raises:
        InputError: if the file, a column, a row or a name is missing.
    """
    path = folder / f"{vendor}.parquet"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; `make emoji` builds it, or set corpus.folder")
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in folder.glob("*.parquet"))) or "none"
        raise InputError(f"{path}: no such file; vendors found in {folder}: {found}")
    with foreign(str(path), "table", "build it again"):
        store.refuse_special(str(path))
        columns = pq.read_schema(path).names
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}; columns found: {', '.join(columns)}")
    with foreign(str(path), "table", "build it again"):
        rows = pq.read_table(path, columns=list(COLUMNS)).to_pylist()
    emojis = []
    for number, row in enumerate(rows):
        for name in ("name_zh", "name_en", "png"):
            if not row[name]:
                raise InputError(f"{path}: row {number} has no {name}; remove the row or fill it")
        row["keywords_zh"], row["keywords_en"] = row["keywords_zh"] or (), row["keywords_en"] or ()
        emojis.append(Emoji(**row))
    if not emojis:
        raise InputError(f"{path}: no rows; build it again or leave {vendor} out")
    return emojis


def pixels_digest(path: Path, number: int, png: bytes) -> bytes:
    """Return a digest of what a reader sees: size and RGB pixels, transparent ones on white."""
    try:
        image = Image.open(io.BytesIO(png)).convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path}: the image of row {number} cannot be decoded ({error})") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return hashlib.sha256(repr(image.size).encode() + image.convert("RGB").tobytes()).digest()


def evaluation_texts(names: Sequence[str], pixels: Sequence[bytes]) -> list[EvaluationText]:
    """Return one query for each distinct name, in order of first appearance.

    Its hits are the images with that name and those whose pixels equal one of these: they cannot be told
    apart. `names[i]` and `pixels[i]` (any digest) belong to image i.
    """
    by_pixels: dict[bytes, list[int]] = {}
    by_name: dict[str, list[int]] = {}
    for image_id, (name, digest) in enumerate(zip(names, pixels, strict=True)):
        by_pixels.setdefault(digest, []).append(image_id)
        by_name.setdefault(name, []).append(image_id)
    return [
        EvaluationText(name, sorted({hit for image_id in image_ids for hit in by_pixels[pixels[image_id]]}))
        for name, image_ids in by_name.items()
    ]


def url_path(vendor: str, number: int) -> str:
    """Return the path of the image of a table's row on the corpus's site."""
    return f"/{quote(vendor)}/{number:05d}.png"


class CaptionChoice(Protocol):
    """The settings that choose captions."""

    @property
    def captions_per_picture(self) -> int: ...
    @property
    def max_keywords(self) -> int: ...
    @property
    def seed(self) -> int: ...


def write_training(
    config: CaptionChoice, vendor: str, emojis: Mapping[int, Emoji], out: Path
) -> dict[str, Answer]:
    """Write the caption table and the images of one vendor, by row number; gives the site's answers."""
    rows: list[dict[str, str]] = []
    answers: dict[str, Answer] = {}
    (out / "site" / vendor).mkdir(parents=True, exist_ok=True)
    (out / "tables").mkdir(exist_ok=True)
    for number, emoji in emojis.items():
        path = url_path(vendor, number)
        answers[path] = Answer(file=f"{vendor}/{number:05d}.png", content_type="image/png")
        (out / "site" / vendor / f"{number:05d}.png").write_bytes(emoji.png)
        both = [
            captions(
                name,
                keywords,
                count=config.captions_per_picture,
                max_keywords=config.max_keywords,
                separators=separators,
                rng=Random(f"{config.seed}/{vendor}/{number}/{name}"),
            )
            for name, keywords, separators in (
                (emoji.name_zh, emoji.keywords_zh, ("，", "、")),
                (emoji.name_en, emoji.keywords_en, (", ", ", ")),
            )
        ]
        # An image with few keywords repeats itself: one row each is enough.
        distinct = dict(zip(*both, strict=True))
        rows += [
            {"url": f"http://{HOST}{path}", "caption": chinese, "caption_en": english}
            for chinese, english in distinct.items()
        ]
    columns = ("url", "caption", "caption_en")
    table = pa.table({column: [row[column] for row in rows] for column in columns})
    pq.write_table(table, out / "tables" / f"{vendor}.parquet")
    return answers


def _write_evaluation(folder: Path, vendor: str, emojis: list[Emoji], out: Path) -> None:
    path = folder / f"{vendor}.parquet"
    scored = [
        (number, emoji) for number, emoji in enumerate(emojis) if emoji.category_en != UNSCORED_CATEGORY
    ]
    if not scored:
        raise InputError(f"{path}: every image is in category {UNSCORED_CATEGORY}, which is not scored")
    write_evaluation(
        out / "evaluation" / vendor,
        vendor,
        [emoji.png for _, emoji in scored],
        evaluation_texts(
            [emoji.name_zh for _, emoji in scored],
            [pixels_digest(path, number, emoji.png) for number, emoji in scored],
        ),
        [f"http://{HOST}{url_path(vendor, number)}" for number, _ in scored],
    )


def make_emoji(config: EmojiConfig, out: str | Path) -> None:
    """Write the emoji corpus into a new folder; the same input gives the same bytes.

    - `tables/<vendor>.parquet`: url, caption, caption_en for each training vendor. Most names are shorter
      than five characters: the rule on length is for captions from the web.
    - `site.json`, `site/`: the web site that answers their URLs (see `data_prep.sources.local_server`).
    - `evaluation/<vendor>/`: images of each evaluated vendor but flags, in Chinese-CLIP's layout, their
      Chinese names as queries; `<vendor>_urls.txt`.

    Raises:
        InputError: for a missing or broken file.
        ConfigError: if a vendor is both trained and evaluated on.
    """
    folder, out = Path(config.folder), Path(out)
    both = sorted(set(config.train) & set(config.evaluate))
    if both:
        raise ConfigError(f"corpus.train and corpus.evaluate both name {', '.join(both)}; remove it from one")
    evaluated = {vendor: read_vendor(folder, vendor) for vendor in config.evaluate}
    rest = sorted(path.stem for path in folder.glob("*.parquet") if path.stem not in config.evaluate)
    train = config.train or rest
    if not train:
        raise InputError(f"{folder}: no file to train on besides the evaluated {', '.join(config.evaluate)}")
    answers: dict[str, Answer] = {}
    for vendor in train:
        answers |= write_training(config, vendor, dict(enumerate(read_vendor(folder, vendor))), out)
    write_site(out, answers)
    for vendor, emojis in evaluated.items():
        _write_evaluation(folder, vendor, emojis, out)
