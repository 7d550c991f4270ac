"""A run over three tables of numbered rows with some copies; images follow from their URLs."""

import io
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data_prep import corpus
from data_prep.corpus import CorpusStageConfig, TablesConfig
from data_prep.dedup import exact as dedup
from data_prep.dedup.exact import DedupConfig
from data_prep.download.stage import plan as plan_download
from data_prep.filters import image as filter_image
from data_prep.filters import text as filter_text
from data_prep.filters.image import FilterImageConfig
from data_prep.filters.text import FilterTextConfig
from data_prep.shards import stage as shards
from data_prep.shards.stage import ShardsConfig
from data_prep.sources.table import TableSource
from pipeline.core.run import Run
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task
from tests.helpers.download import publish_images

NUM_PAIRS = 45
NUM_COPIES = 12
SAMPLES_PER_SHARD = 8


def draw(url: str) -> bytes:
    """Draw an image that follows from its URL; every ninth is too small."""
    rng = random.Random(url)
    side = 8 if int(url.rsplit("/", 1)[1]) % 9 == 0 else 24
    image = Image.new("RGB", (side, side), (rng.randrange(256), rng.randrange(256), rng.randrange(256)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def fetch(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    return publish_images(context, task, draw)


def numbered_rows() -> list[tuple[str, str]]:
    rng = random.Random(0)
    pairs = [(f"http://a.cn/{number}", f"编号{number:03d}的图片") for number in range(NUM_PAIRS)]
    rows = pairs + rng.choices(pairs, k=NUM_COPIES)
    # Nearly the same is not the same: another caption for an image, another image for a caption.
    rows += [(pairs[1][0], "另一段说明文字"), ("http://a.cn/1001", pairs[1][1])]
    rng.shuffle(rows)
    return rows


def numbered_run(folder: Path | str, tables: Sequence[Path | str], partitions: int | None = 3) -> Run:
    sources = tuple(TableSource(path=str(path), name=Path(path).stem) for path in tables)
    images = FilterImageConfig()
    stages = (
        Stage(
            "corpus", "", 1, CorpusStageConfig(corpus=TablesConfig(kind="tables", tables=sources)), (),
            corpus.plan, corpus.run,
        ),
        Stage("filter_text", "", 1, FilterTextConfig(), ("corpus",), filter_text.plan, filter_text.run),
        Stage("dedup", "", 1, DedupConfig(partitions=partitions), ("filter_text",), dedup.plan, dedup.run),
        Stage("download", "", 1, None, ("corpus", "dedup"), plan_download, fetch),
        Stage(
            "filter_image", "", 1, images, ("corpus", "download"), filter_image.plan, filter_image.run
        ),
        Stage(
            "shards", "", 1, ShardsConfig(samples_per_shard=SAMPLES_PER_SHARD), ("download", "filter_image"),
            shards.plan, shards.run,
        ),
    )  # fmt: skip
    return Run(str(folder), 0, "local", 1, stages)
