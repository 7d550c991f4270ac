"""Sources of a corpus taken in by real stages, and what is asked of the result."""

import base64
import hashlib
import io
import json
from pathlib import Path

import polars as pl
from PIL import Image

from data_prep import corpus
from data_prep.corpus import CorpusStageConfig, SourcesConfig
from data_prep.filters import text as filter_text
from data_prep.filters.text import FilterTextConfig
from data_prep.sources.readers.source import PackedSource
from data_prep.sources.table import TableSource
from pipeline import runner
from pipeline.core.records import Manifest
from pipeline.core.run import Run, read_manifest
from pipeline.core.stage import Stage
from pipeline.tools.why import explain


def picture(colour: tuple[int, int, int] = (200, 30, 30), side: int = 20) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (side, side), (255, 255, 255))
    image.paste(colour, (0, 0, side // 2, side))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def take_in(
    folder: Path,
    *sources: TableSource | PackedSource,
    guards: tuple[str, ...] = (),
    filters: FilterTextConfig | None = None,
) -> Run:
    """Run the corpus and filter_text stages over some sources."""
    config = CorpusStageConfig(corpus=SourcesConfig(kind="sources", sources=sources, guards=guards))
    filters = filters or FilterTextConfig()
    stages = (
        Stage("corpus", "", 1, config, (), corpus.plan, corpus.run),
        Stage("filter_text", "", 1, filters, ("corpus",), filter_text.plan, filter_text.run),
    )
    run = Run(str(folder), 0, "local", 1, stages)
    runner.execute(run, stages, redo=False)
    return run


def manifest(run: Run, stage: str) -> Manifest:
    found = read_manifest(run, stage)
    assert found is not None
    return found


def why(run: Run, key_or_url: str) -> list[str]:
    filters: FilterTextConfig = run.stage("filter_text").config
    return explain(run, filters, key_or_url)


def key_of(url: str, caption: str) -> str:
    return hashlib.sha256(f"{url}\0{caption}".encode()).hexdigest()[:32]


def kept(run: Run) -> pl.DataFrame:
    paths = sorted(Path(run.folder, "filter_text", "kept").glob("*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths], how="diagonal").sort("file", "row")


def cn_clip_set(folder: Path) -> None:
    """Write two images in Chinese-CLIP's layout, with texts and lines of every kind that is set aside."""
    folder.mkdir(exist_ok=True)
    images = {5: picture(), 9: picture((0, 0, 255))}
    lines = [f"{number}\t{base64.b64encode(data).decode()}\n" for number, data in images.items()]
    (folder / "train_imgs.tsv").write_text("".join(lines) + "no picture\n")
    texts = [
        {"text_id": 1, "text": "左边红色的图片", "image_ids": [5, 9]},
        {"text_id": 2, "text": "没有配对的文字", "image_ids": []},
        {"text_id": 3, "text": "图片不在这里吧", "image_ids": [77]},
        {"text_id": 4, "text": "编号不是一个表", "image_ids": {"a": 1}},
    ]
    (folder / "train_texts.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts)
    )
