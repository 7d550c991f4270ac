"""The demo corpus: a small web site of drawn images with Chinese captions, with the defects of a web crawl.

Every class of dirt is planted in a known number with a written fate, so that a funnel can be checked row by
row: `planted.json` says how many rows of each class there are and what must become of them.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Ge

from data_prep.corpora.demo_scenes import describe, draw, evaluation_scenes, hold_out_pairs, random_dimensions
from data_prep.corpora.planted import (
    PLAN,
    EvaluationImage,
    Plan,
    Row,
    World,
    clean_rows,
    duplicates,
    encode,
    table_dirt,
)
from data_prep.corpora.planted_files import careful_images, download_dirt, image_dirt
from data_prep.formats.cnclip import EvaluationText, write_evaluation
from data_prep.sources.local_server import HOST, Answer, write_site

EVALUATION_NAME = "unseen"
NUM_TABLES = 3
HELD_OUT_SHARE = 0.15  # of the pairs of kinds of things


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """`[corpus]` of the demo: what the generator makes."""

    kind: Literal["demo"] = "demo"
    """Chooses this corpus."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of everything that is drawn."""
    num_clean: Annotated[int, Ge(1)] = 3000
    """Ordinary training rows, each with a different image."""
    num_evaluation: Annotated[int, Ge(1)] = 200
    """Evaluation images, each with one caption; they combine things that training never shows together."""
    image_size_px: Annotated[int, Ge(32)] = 96
    """Side of the most common, square image, in pixels; others are up to 3.1 times as long."""
    dirt: Annotated[float, Ge(0.01)] = 1.0
    """Factor on the number of rows with each kind of defect."""


SCHEMA = pa.schema(
    [
        ("SAMPLE_ID", pa.int64()),
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("HEIGHT", pa.float64()),  # as in the public extract of LAION's Chinese part
        ("WIDTH", pa.float64()),
        ("LICENSE", pa.string()),
        ("LANGUAGE", pa.string()),
        ("NSFW", pa.string()),
        ("similarity", pa.float64()),
        ("caption_en", pa.string()),
    ]
)


def _make_world(config: DemoConfig) -> World:
    held_out = hold_out_pairs(Random(f"{config.seed}/held out"), HELD_OUT_SHARE)
    evaluation = []
    for index, scene in enumerate(
        evaluation_scenes(Random(f"{config.seed}/evaluation"), held_out, config.num_evaluation)
    ):
        rng = Random(f"{config.seed}/evaluation/{index}")
        image = draw(rng, scene, *random_dimensions(rng, config.image_size_px))
        url = f"http://{HOST}/evaluation/{index:05d}.jpg"
        evaluation.append(EvaluationImage(scene, describe(rng, scene), image, url))
    return World(
        seed=config.seed,
        num_clean=config.num_clean,
        image_size_px=config.image_size_px,
        dirt=config.dirt,
        held_out=held_out,
        evaluation=evaluation,
    )


def _table(rows: list[Row], first_id: int) -> pa.Table:
    return pa.table(
        {
            "SAMPLE_ID": range(first_id, first_id + len(rows)),
            "URL": [row.url for row in rows],
            "TEXT": [row.caption for row in rows],
            "HEIGHT": [float(row.height_px) for row in rows],
            "WIDTH": [float(row.width_px) for row in rows],
            "LICENSE": ["?"] * len(rows),
            "LANGUAGE": [row.language for row in rows],
            "NSFW": ["UNLIKELY"] * len(rows),
            "similarity": [row.similarity for row in rows],
            "caption_en": [row.caption_en for row in rows],
        },
        schema=SCHEMA,
    )


def make_demo(config: DemoConfig, folder: str | Path) -> None:
    """Write the demo corpus into a new folder; the same configuration gives the same bytes.

    - `tables/demo-0000N.parquet`: caption tables with LAION's columns and `caption_en`, rows shuffled.
    - `site.json`, `site/`: the web site that answers their URLs (see `data_prep.sources.local_server`).
    - `evaluation/unseen/`: the evaluation set in Chinese-CLIP's layout, and its URLs in `unseen_urls.txt`.
    - `planted.json`: `{class: {"count", "fate", "stage"}}`; `planted.parquet`: the same for every row, by
      SAMPLE_ID.
    - `expected/`, `expected.json` (`{URL: PNG file}`): the upright RGB images that a reader must see in
      the files that need care.
    """
    folder = Path(folder)
    world = _make_world(config)
    clean = list(clean_rows(world))
    rows = [
        *clean,
        *table_dirt(world),
        *duplicates(world, clean),
        *download_dirt(world),
        *careful_images(world),
        *image_dirt(world),
    ]

    answers: dict[str, Answer] = {}
    expected: dict[str, str] = {}
    for row in rows:
        if row.answer is None:
            continue
        assert row.url is not None
        answers[row.url.removeprefix(f"http://{HOST}")] = row.answer
        if row.body is not None and row.answer.file is not None:
            path = folder / "site" / row.answer.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row.body)
        if row.expected is not None:
            assert row.answer.file is not None
            expected[row.url] = f"expected/{row.answer.file}.png"
            path = folder / expected[row.url]
            path.parent.mkdir(parents=True, exist_ok=True)
            row.expected.save(path)
    write_site(folder, answers)
    (folder / "expected.json").write_text(json.dumps(expected, indent=0, sort_keys=True), encoding="utf-8")

    Random(f"{config.seed}/order").shuffle(rows)
    (folder / "tables").mkdir(exist_ok=True)
    step = -(-len(rows) // NUM_TABLES)
    for number in range(NUM_TABLES):
        part = rows[number * step : (number + 1) * step]
        pq.write_table(_table(part, number * step), folder / f"tables/demo-{number:05d}.parquet")

    plans = {"clean": Plan(config.num_clean, "kept", None), **PLAN}
    counts = Counter(row.planted for row in rows)
    summary = {
        planted: {"count": counts[planted], "fate": plan.fate, "stage": plan.stage}
        for planted, plan in plans.items()
    }
    (folder / "planted.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    pq.write_table(
        pa.table(
            {
                "SAMPLE_ID": range(len(rows)),
                "planted": [row.planted for row in rows],
                "fate": [plans[row.planted].fate for row in rows],
                "stage": [plans[row.planted].stage for row in rows],
            }
        ),
        folder / "planted.parquet",
    )
    write_evaluation(
        folder / "evaluation" / EVALUATION_NAME,
        EVALUATION_NAME,
        [encode(shown.image) for shown in world.evaluation],
        [EvaluationText(shown.caption.chinese, [index]) for index, shown in enumerate(world.evaluation)],
        [shown.url for shown in world.evaluation],
    )
