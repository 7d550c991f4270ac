"""A web of drawings for the real download stage: a stand-in for img2dataset writes the files it would."""

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from data_prep.download import stage as download
from data_prep.download.config import DownloadConfig
from data_prep.download.pack import ANSWER_SCHEMA
from data_prep.rules.copies import marks_of
from pipeline.core.files.images import decode_pixels
from pipeline.core.run import Run
from tests.helpers.corpus_files import drawing, encoded, make_run

NUM_PICTURES = 60
IMAGES = {f"{number}.jpg": encoded(drawing(number)) for number in range(NUM_PICTURES)}
MARKS = {name: marks_of(decode_pixels(data)) for name, data in IMAGES.items()}
CAPTIONS = {name: f"编号{int(name[:-4]):04d}的图片" for name in IMAGES}

Web = Callable[[int], str | None]  # number of an image → error, None where it is given, "" where it is lost


def fake_web(monkeypatch: pytest.MonkeyPatch, web: Web) -> list[int]:
    """Stands in for img2dataset and the web: writes the files that it writes. Numbers asked for are noted."""
    asked: list[int] = []

    @contextlib.contextmanager
    def downloader(config: Any, raw: Path, *_: Any) -> Iterator[Any]:
        (raw / "shards").mkdir()
        for place, path in enumerate(sorted((raw / "lists").glob("*.parquet"))):
            rows = []
            with tarfile.open(raw / "shards" / f"{place:05d}.tar", "w") as tar:
                for index, (url, key) in enumerate(pl.read_parquet(path).iter_rows()):
                    name = url.rsplit("/", 1)[1]
                    asked.append(int(name[:-4]))
                    error = web(asked[-1])
                    if error == "":
                        continue
                    if error is None:
                        member = tarfile.TarInfo(f"{index:09d}.jpg")
                        member.size = len(IMAGES[name])
                        tar.addfile(member, io.BytesIO(IMAGES[name]))
                    size = 64 if error is None else None
                    marks = MARKS[name] if error is None else (None, None)
                    rows.append((key, f"{index:09d}", error, size, size, size, size, "00", *marks))
            table = pl.DataFrame(rows, schema=ANSWER_SCHEMA, orient="row")
            table.write_parquet(raw / "shards" / f"{place:05d}.parquet")
            (raw / "shards" / f"{place:05d}_stats.json").write_text("{}")
        yield SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(download, "_downloader", downloader)
    return asked


def load(
    folder: Path,
    numbers: range = range(NUM_PICTURES),
    config: DownloadConfig | None = None,
    partitions: int = 3,
    samples_per_shard: int | None = 8,
) -> Run:
    """Return a run, not yet executed, over some of the drawings."""
    names = [f"{number}.jpg" for number in numbers]
    captions = {name: CAPTIONS[name] for name in names}
    run = make_run(
        folder,
        {name: IMAGES[name] for name in names},
        captions,
        partitions=partitions,
        samples_per_shard=samples_per_shard,
    )
    stages = [
        download.stage(config or DownloadConfig()) if stage.name == "download" else stage
        for stage in run.stages
    ]
    return replace(run, stages=tuple(stages))


def shard_bytes(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(run.folder, "shards").glob("00*"))}
