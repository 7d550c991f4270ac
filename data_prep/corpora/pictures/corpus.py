"""The pictures corpus of a run: what is learned from, and what is scored because it was never seen.

A folder of tables as `data_prep.corpora.build_pictures` writes it holds one style a table. Some styles stay
out of training, and so do some concepts in every style: three evaluation sets ask for a style never seen, for
concepts never seen, and for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt

from data_prep.corpora.emoji import (
    Emoji,
    evaluation_texts,
    pixels_digest,
    read_vendor,
    url_path,
    write_training,
)
from data_prep.formats.cnclip import write_evaluation
from data_prep.sources.local_server import HOST, Answer, write_site
from pipeline.core.records import ConfigError, InputError

# One hand of each family that has several. Fluent's three are one drawing, coloured in three ways.
UNSEEN_STYLES = (
    "emoji-fluent",
    "emoji-fluent-flat",
    "emoji-fluent-contrast",
    "icons-colour",
    "flags-circle",
    "office-sukapura",
    "characters-kai",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturesConfig:
    """`[corpus]` of free images: which styles and which concepts are kept out of training."""

    kind: Literal["pictures"]
    """Chooses this corpus."""
    folder: str
    """Folder of the `<style>.parquet` files."""
    unseen_styles: tuple[str, ...] = ()
    """Styles to score on and not to train on. Empty: Fluent's emoji, icons-colour, flags-circle,
    office-sukapura and characters-kai, as far as the folder has them.
    """
    unseen_concepts: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the concepts that are kept out of training in every style, to be scored on."""
    captions_per_picture: Annotated[int, Ge(1)] = 3
    """Rows for each image: its name, then the name with some of its keywords."""
    max_keywords: Annotated[int, Ge(1)] = 3
    """Most keywords in one caption."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the choice of concepts and of keywords."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One image of the folder."""

    style: str
    number: int  # row in its style's table
    emoji: Emoji
    pixels: bytes  # digest of what it shows


def concepts(names: Sequence[str], pixels: Sequence[bytes]) -> list[int]:
    """Return the number of the concept that each image shows, counted in order of appearance.

    Images with one name show one concept, and so do images with equal pixels, whatever they are called:
    otherwise a concept that is kept out of training would be learned under its other name.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    number: dict[str | bytes, int] = {}
    for name, digest in zip(names, pixels, strict=True):
        number.setdefault(name, len(number))
        number.setdefault(digest, len(number))
    ends = [number[name] for name in names], [number[digest] for digest in pixels]
    graph = coo_array((np.ones(len(names)), ends), shape=(len(number), len(number)))
    component = connected_components(graph, directed=False)[1]
    order: dict[int, int] = {}
    return [order.setdefault(int(component[row]), len(order)) for row in ends[0]]


def _unseen(images: Sequence[Shown], config: PicturesConfig) -> list[bool]:
    """Return whether each image's concept is kept out of training; seed and first name decide."""
    groups = concepts([image.emoji.name_zh for image in images], [image.pixels for image in images])
    first: dict[int, str] = {}
    for image, group in zip(images, groups, strict=True):
        first[group] = min(first.get(group, image.emoji.name_zh), image.emoji.name_zh)
    drawn = {
        group: Random(f"{config.seed}/unseen/{name}").random() < config.unseen_concepts
        for group, name in first.items()
    }
    return [drawn[group] for group in groups]


def make_pictures(config: PicturesConfig, out: str | Path) -> None:
    """Write the pictures corpus into a new folder; the same input gives the same bytes.

    - `tables/<style>.parquet`: url, caption, caption_en for each training style. Keywords that name a concept
      which is kept out are left out, too.
    - `site.json`, `site/`: the web site that answers their URLs (see `data_prep.sources.local_server`).
    - `evaluation/{style,concept,both}/` in Chinese-CLIP's layout, names as queries: known concepts in styles
      never seen, concepts never seen in known styles, and both never seen. An image whose pixels are those of
      a training image is not scored.

    Raises:
        InputError: for a missing or broken file, or if a set would be empty.
        ConfigError: if all styles are kept out of training, or one of those named is not in the folder.
    """
    folder, out = Path(config.folder), Path(out)
    found = sorted(path.stem for path in folder.glob("*.parquet"))
    if missing := sorted(set(config.unseen_styles) - set(found)):
        raise ConfigError(
            f"corpus.unseen_styles: {folder} has no {', '.join(missing)}; name styles that it has:"
            f" {', '.join(found) or 'none, build it first'}"
        )
    unseen_styles = config.unseen_styles or tuple(style for style in UNSEEN_STYLES if style in found)
    if not set(found) - set(unseen_styles):
        raise ConfigError(f"corpus.unseen_styles: no style is left to train on in {folder}; name fewer")
    images = [
        Shown(style, number, emoji, pixels_digest(folder / f"{style}.parquet", number, emoji.png))
        for style in found
        for number, emoji in enumerate(read_vendor(folder, style))
    ]
    unseen = _unseen(images, config)
    sets: dict[str, list[Shown]] = {"train": [], "style": [], "concept": [], "both": []}
    for image, is_unseen in zip(images, unseen, strict=True):
        names = ("style", "both") if image.style in unseen_styles else ("train", "concept")
        sets[names[is_unseen]].append(image)
    _write_training(
        config, sets["train"], {image.emoji.name_zh for image in sets["concept"] + sets["both"]}, out
    )
    trained_names = {image.emoji.name_zh for image in sets["train"]}
    trained_pixels = {image.pixels for image in sets["train"]}
    for name in ("style", "concept", "both"):
        scored = [
            image
            for image in sets[name]
            if image.pixels not in trained_pixels
            and (image.emoji.name_zh in trained_names) == (name == "style")
        ]
        if not scored:
            raise InputError(f"{folder}: no image for the evaluation set {name!r}; build it with more styles")
        write_evaluation(
            out / "evaluation" / name,
            name,
            [image.emoji.png for image in scored],
            evaluation_texts([image.emoji.name_zh for image in scored], [image.pixels for image in scored]),
            [f"http://{HOST}{url_path(image.style, image.number)}" for image in scored],
        )


def _write_training(config: PicturesConfig, images: Sequence[Shown], held_out: set[str], out: Path) -> None:
    """Write the caption tables and the site of the training images."""
    answers: dict[str, Answer] = {}
    for style in dict.fromkeys(image.style for image in images):
        rows = {
            image.number: Emoji(
                name_zh=image.emoji.name_zh,
                keywords_zh=[word for word in image.emoji.keywords_zh if word not in held_out],
                name_en=image.emoji.name_en,
                keywords_en=image.emoji.keywords_en,
                category_en=image.emoji.category_en,
                png=image.emoji.png,
            )
            for image in images
            if image.style == style
        }
        answers |= write_training(config, style, rows, out)
    write_site(out, answers)
