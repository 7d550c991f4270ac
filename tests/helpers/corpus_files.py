"""Small finished corpora for tests: real stages, but images come from a folder instead of the web."""

import io
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image, ImageDraw

from data_prep import corpus
from data_prep.corpus import CorpusStageConfig, TablesConfig
from data_prep.dedup import exact as dedup
from data_prep.dedup import near_duplicates
from data_prep.dedup.exact import DedupConfig
from data_prep.dedup.near_duplicates import DedupImageConfig
from data_prep.download import stage as download
from data_prep.filters import image as filter_image
from data_prep.filters import text as filter_text
from data_prep.filters.image import FilterImageConfig
from data_prep.filters.text import FilterTextConfig
from data_prep.shards import split
from data_prep.shards import stage as shards
from data_prep.shards.split import SplitConfig
from data_prep.shards.stage import ShardsConfig
from data_prep.sources.table import TableSource
from pipeline import runner
from pipeline.core.evaluation_sets import EvaluationSource
from pipeline.core.run import Run
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task
from tests.helpers.download import publish_images


def drawing(seed: int, side: int = 64) -> Image.Image:
    """Draw rectangles that follow from the seed; two seeds are far apart by perceptual hash."""
    rng = random.Random(seed)
    image = Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in range(3)))
    for _ in range(12):
        left, top = rng.randrange(side), rng.randrange(side)
        box = (left, top, left + rng.randrange(8, side // 2), top + rng.randrange(8, side // 2))
        ImageDraw.Draw(image).rectangle(box, fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def encoded(image: Image.Image, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def fetch(config: str, context: Context, task: Task, progress: Progress) -> Outcome:
    """Stand in for the download: a folder has one file for the end of each URL."""
    return publish_images(context, task, lambda url: (Path(config) / url.rsplit("/", 1)[1]).read_bytes())


def answer_with_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the download of this process's runs answer: the image at `…/7.jpg` is the drawing of seed 7."""

    def image_of(url: str) -> bytes:
        return encoded(drawing(int(url.rsplit("/", 1)[1].removesuffix(".jpg"))))

    def fetch(
        config: Any, context: Context, tasks: list[Task], progress: Any
    ) -> Iterator[tuple[Task, Outcome]]:
        for task in tasks:
            yield task, publish_images(context, task, image_of)

    monkeypatch.setattr(download, "run_together", fetch)


def make_run(
    folder: Path,
    pictures: Mapping[str, bytes],
    captions: Mapping[str, str],
    *,
    partitions: int = 3,
    samples_per_shard: int | None = 8,
    splitting: SplitConfig | None = None,
    processes: int = 1,
    source: str = "mine",
    evaluations: tuple[EvaluationSource, ...] = (),
    copies: DedupImageConfig | None = None,
) -> Run:
    """Return a run over images and captions by name, up to its shards; not yet executed."""
    inputs = folder / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        (inputs / name).write_bytes(data)
    table = inputs / "table.csv"
    lines = [(f"http://a.cn/{name}", caption) for name, caption in captions.items()]
    pl.DataFrame(lines, schema=["url", "caption"], orient="row").write_csv(table)
    sources = (TableSource(path=str(table), name=source),)
    images = FilterImageConfig(remove_evaluation_copies=bool(evaluations))
    packing = ShardsConfig(samples_per_shard=samples_per_shard)
    stages = [
        Stage(
            "corpus", "", 1,
            CorpusStageConfig(corpus=TablesConfig(kind="tables", tables=sources), evaluations=evaluations),
            (), corpus.plan, corpus.run,
        ),
        filter_text.stage(FilterTextConfig()),
        Stage("dedup", "", 1, DedupConfig(partitions=partitions), ("filter_text",), dedup.plan, dedup.run),
        Stage("download", "", 1, str(inputs), ("corpus", "dedup"), download.plan, fetch),
        filter_image.stage(images),
    ]  # fmt: skip
    rows = "filter_image"
    if copies is not None:
        stages += near_duplicates.stages(copies, rows=rows)
        rows = "dedup_image"
    parents: tuple[str, ...] = ("download", rows)
    if splitting is not None:
        stages.append(Stage("split", "", 1, splitting, (rows,), split.plan, split.run))
        parents += ("split",)
    stages.append(Stage("shards", "", 1, packing, parents, shards.plan, shards.run))
    if splitting is not None:
        stages.append(
            Stage("validation", "", 1, packing, parents, validation_tasks, shards.run)
        )  # fmt: skip
    return Run(str(folder / "run"), 0, "local", processes, tuple(stages))


def validation_tasks(config: ShardsConfig, context: Context) -> list[Task]:
    return shards.plan(config, context, part="validation")


def finish(run: Run) -> Run:
    runner.execute(run, run.stages, redo=False)
    return run


def plain_corpus(folder: Path, names: range, *, samples_per_shard: int = 8, source: str = "mine") -> Run:
    """Return a finished run of one drawing and one caption for each number."""
    pictures = {f"{number}.jpg": encoded(drawing(number)) for number in names}
    captions = {f"{number}.jpg": f"编号{number:04d}的图片" for number in names}
    run = make_run(folder, pictures, captions, samples_per_shard=samples_per_shard, source=source)
    return finish(run)


def sidecars(run: Run, stage: str = "shards") -> pl.DataFrame:
    paths = sorted(Path(run.folder, stage).glob("*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths])
