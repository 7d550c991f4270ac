"""Rules on images as stages: evaluation images by guard, sizes by source, exact and near copies."""

import base64
import functools
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from data_prep import corpus
from data_prep.corpus import CorpusStageConfig, SourcesConfig
from data_prep.decontamination import make_guard
from data_prep.dedup import copies as near_copies_stages
from data_prep.dedup import exact as dedup
from data_prep.dedup import near_duplicates as dedup_image
from data_prep.dedup.exact import DedupConfig
from data_prep.dedup.near_duplicates import DedupImageConfig, band_values, near_copies, near_hashes
from data_prep.download.stage import plan as plan_download
from data_prep.filters import image as filter_image
from data_prep.filters import text as filter_text
from data_prep.filters.image import FilterImageConfig
from data_prep.filters.text import FilterTextConfig
from data_prep.formats.parquet import write_table
from data_prep.rules import image as image_rules
from data_prep.shards import stage as shards
from data_prep.shards.stage import ShardsConfig
from data_prep.sources.table import TableSource
from pipeline import runner
from pipeline.catalog import load
from pipeline.core.config import build
from pipeline.core.evaluation_sets import EvaluationSource
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import Run, read_manifest
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task
from pipeline.tools.why import explain
from tests.helpers.download import publish_images


def draw(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (160, 120), tuple(rng.integers(0, 255, 3).tolist()))
    canvas = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.integers(0, 120, 2).tolist()
        canvas.rectangle((x, y, x + 40, y + 30), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image.resize(size)


def jpeg(image: Image.Image, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def fetch(
    images: Mapping[str, bytes], config: None, context: Context, task: Task, progress: Progress
) -> Outcome:
    return publish_images(context, task, images.__getitem__)


def make(
    folder: Path,
    tables: Mapping[str, Mapping[str, bytes]],
    images: FilterImageConfig | None = None,
    copies: DedupImageConfig | None = None,
    guards: tuple[str, ...] = (),
    evaluations: tuple[EvaluationSource, ...] = (),
    exempt: Mapping[str, tuple[str, ...]] | None = None,
    partitions: int = 2,
) -> Run:
    """A run over named tables of url → image, finished up to the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for name, pictures in tables.items():
        path = folder / f"{name}.parquet"
        rows = {"url": list(pictures), "caption": [f"编号为{n}的{name}图片" for n in range(len(pictures))]}
        pl.DataFrame(rows).write_parquet(path)
        sources.append(TableSource(path=str(path), name=name, exempt_from=(exempt or {}).get(name, ())))
    web = {url: data for pictures in tables.values() for url, data in pictures.items()}
    config = CorpusStageConfig(
        corpus=SourcesConfig(kind="sources", sources=tuple(sources), guards=guards), evaluations=evaluations
    )
    stages = [
        Stage("corpus", "", 1, config, (), corpus.plan, corpus.run),
        Stage("filter_text", "", 1, FilterTextConfig(), ("corpus",), filter_text.plan, filter_text.run),
        Stage("dedup", "", 1, DedupConfig(partitions=partitions), ("filter_text",), dedup.plan, dedup.run),
        Stage("download", "", 1, None, ("corpus", "dedup"), plan_download, functools.partial(fetch, web)),
        Stage(
            "filter_image", "", 1, images or FilterImageConfig(), ("corpus", "download"),
            filter_image.plan, filter_image.run,
        ),
    ]  # fmt: skip
    last = "filter_image"
    if copies is not None:
        stages += dedup_image.stages(copies, rows=last)
        last = "dedup_image"
    stages.append(Stage("shards", "", 1, ShardsConfig(), ("download", last), shards.plan, shards.run))
    run = Run(str(folder / "run"), 0, "local", 1, tuple(stages))
    runner.execute(run, run.stages, redo=False)
    return run


def kept_urls(run: Run) -> set[str]:
    paths = sorted(Path(run.folder, "shards").glob("*.parquet"))
    return {url for path in paths for url in pl.read_parquet(path)["url"]}


def dropped(run: Run, stage: str) -> dict[str, int]:
    manifest = read_manifest(run, stage)
    assert manifest is not None
    return dict(manifest.dropped)


def web(*pictures: bytes) -> dict[str, bytes]:
    return {f"http://a.cn/{number}": data for number, data in enumerate(pictures)}


def test_copies_of_guarded_pictures_go_whatever_their_address(tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluation" / "中文"
    evaluation.mkdir(parents=True)
    for number in range(3):
        draw(number).save(evaluation / f"{number}.png")
    guard = tmp_path / "guard.parquet"
    assert make_guard(str(tmp_path / "evaluation"), "own", str(guard)) == 3
    table = web(
        jpeg(draw(0)), jpeg(draw(1), quality=60), jpeg(draw(2, (320, 240))), jpeg(draw(3)), jpeg(draw(4)),
    )  # fmt: skip
    guarded = make(tmp_path / "on", {"a": table}, guards=(str(guard),))
    assert dropped(guarded, "filter_image") == {"evaluation_image": 3}
    assert kept_urls(guarded) == {"http://a.cn/3", "http://a.cn/4"}
    assert len(kept_urls(make(tmp_path / "off", {"a": table}))) == 5
    switched = FilterImageConfig(remove_evaluation_copies=False)
    assert len(kept_urls(make(tmp_path / "no", {"a": table}, images=switched, guards=(str(guard),)))) == 5


def test_a_guard_passes_over_what_is_no_image_file_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    draw(1).save(tmp_path / "set" / "1.png")
    (tmp_path / "set" / "._1.png").write_bytes(b"\0\5\x16\7")
    os.mkfifo(tmp_path / "set" / "p.jpg")
    (tmp_path / "set" / "zero.jpg").symlink_to("/dev/zero")
    said = list[str]()
    assert make_guard(str(tmp_path / "set"), "own", str(tmp_path / "guard.parquet"), say=said.append) == 1
    (line,) = said
    assert "3 are not image files and are skipped" in line
    for found in ("._1.png: hidden", "p.jpg: no_file: a FIFO", "zero.jpg: no_file: a device"):
        assert found in line
    (tmp_path / "ids.txt").write_bytes("北京".encode("gbk"))
    with pytest.raises(InputError, match=r"ids\.txt: not UTF-8"):
        make_guard(str(tmp_path / "ids.txt"), "own", str(tmp_path / "guard.parquet"))


def test_copies_of_the_runs_own_evaluation_sets_go(tmp_path: Path) -> None:
    folder = tmp_path / "valid"
    folder.mkdir()
    (folder / "valid_imgs.tsv").write_text(f"7\t{base64.b64encode(jpeg(draw(1))).decode()}\n")
    (folder / "valid_texts.jsonl").write_text('{"text_id": 1, "text": "图", "image_ids": [7]}\n')
    sets = (EvaluationSource(name="valid", folder=str(folder)),)
    run = make(tmp_path / "r", {"a": web(jpeg(draw(0)), jpeg(draw(1), 70))}, evaluations=sets)
    assert kept_urls(run) == {"http://a.cn/0"}


def test_size_and_aspect_are_switched_per_source(tmp_path: Path) -> None:
    small, long = jpeg(draw(0, (12, 12))), jpeg(draw(1, (200, 20)))
    tables = {
        "a": {"http://a.cn/s": small, "http://a.cn/l": long, "http://a.cn/g": jpeg(draw(2))},
        "b": {"http://b.cn/s": small, "http://b.cn/l": long},
        "c": {"http://c.cn/s": small, "http://c.cn/l": long},
    }
    run = make(tmp_path, tables, exempt={"b": ("size", "aspect"), "c": ("aspect",)})
    manifest = read_manifest(run, "filter_image")
    assert manifest is not None
    assert all(extra["rules"] == image_rules.VERSIONS for extra in manifest.extra.values())
    assert dropped(run, "filter_image") == {"aspect": 1, "too_small": 2}
    assert kept_urls(run) == {"http://a.cn/g", "http://b.cn/s", "http://b.cn/l", "http://c.cn/l"}


@pytest.mark.parametrize("partitions", [1, 3])
def test_of_exact_copies_the_lowest_key_stays(tmp_path: Path, partitions: int) -> None:
    pictures = [jpeg(draw(number % 4)) for number in range(11)]
    run = make(tmp_path, {"a": web(*pictures)}, copies=DedupImageConfig(partitions=partitions), partitions=3)
    assert dropped(run, "dedup_image") == {"duplicate_image": 7}
    tables = [pl.read_parquet(path) for path in Path(run.folder, "filter_image", "kept").glob("*.parquet")]
    rows = pl.concat(tables).sort("key")
    first = rows.unique("image_sha256", keep="first", maintain_order=True)
    assert kept_urls(run) == set(first["url"])
    gone = rows.join(first, on="key", how="anti").row(0, named=True)
    lowest = first.filter(image_sha256=gone["image_sha256"])["key"].item()
    assert (
        explain(run, FilterTextConfig(), gone["key"])[1]
        == f"  dropped by dedup_image: duplicate_image ({lowest})"
    )


def test_copies_do_not_depend_on_how_rows_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one file or in many, with one part or several: the same rows stay, to the byte."""
    drawings = [draw(number % 5, (200, 150 + number % 2)) for number in range(14)]
    tables = {"a": web(*(jpeg(image, 60 + number) for number, image in enumerate(drawings)))}
    found = []
    for parts in (1, 3):
        config = DedupImageConfig(max_distance=20, partitions=parts)
        run = make(tmp_path / str(parts), tables, copies=config, partitions=4)
        manifest = read_manifest(run, "dedup_image")
        assert manifest is not None
        found.append((manifest.shards, manifest.dropped))
        monkeypatch.setattr(dedup_image, "_ROWS_GATHERED", 6)
        monkeypatch.setattr(near_copies_stages, "_ROWS_MERGED", 6)
    assert found[0] == found[1]
    assert sum(found[0][1].values()) == 9
    assert len(list(Path(run.folder, "gather_hashes", "hashes").iterdir())) > 22  # of one task
    assert len(list(Path(run.folder, "merge_copies", "copies").iterdir())) > 1


def test_signatures_are_read_of_the_row_groups_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signature(table: int, row: int) -> bytes:
        return bytes([table, row % 256, row // 256]) * 128

    paths = [str(tmp_path / f"{number}.parquet") for number in range(3)]
    for number, path in enumerate(paths):
        rows = {
            "key": [f"{number}{row:04}" for row in range(1000)],
            "image_signature": [signature(number, row) for row in range(1000)],
        }
        write_table(pl.DataFrame(rows), path, rows_per_group=100)
    read, real = [], pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, group: int, **options: Any) -> Any:
        read.append(group)
        return real(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    wanted = [(2, 999), (0, 0), (2, 350), (2, 301), (0, 99), (2, 100)]
    asked = pl.DataFrame(wanted, schema={"table": pl.UInt32, "row": pl.UInt32}, orient="row")
    found = dedup_image.with_signatures(asked, paths)
    assert {row[:2]: row[2] for row in found.iter_rows()} == {place: signature(*place) for place in wanted}
    assert read == [0, 1, 3, 9]
    none = dedup_image.with_signatures(asked.clear(), paths)
    assert none.schema == {"table": pl.UInt32, "row": pl.UInt32, "image_signature": pl.Binary}
    assert len(read) == 4


def test_near_copies_go_and_a_source_can_keep_its_own(tmp_path: Path) -> None:
    tables = {
        "a": {f"http://a.cn/{n}": jpeg(draw(n)) for n in range(4)},
        "b": {f"http://b.cn/{n}": jpeg(draw(n, (200, 150)), 80) for n in range(4)},
    }
    copies = DedupImageConfig(max_distance=20)
    run = make(tmp_path / "on", tables, copies=copies)
    assert dropped(run, "dedup_image") == {"near_duplicate_image": 4}
    assert {url.rsplit("/", 1)[1] for url in kept_urls(run)} == {"0", "1", "2", "3"}
    both = make(
        tmp_path / "b", tables, copies=copies, exempt={"a": ("image_duplicates",), "b": ("image_duplicates",)}
    )
    assert len(kept_urls(both)) == 8


def _rows(keys: list[str], hash_NB: Any) -> pl.DataFrame:
    """Rows of these hashes; all images look the same to the signatures, so that the hashes decide."""
    signatures = [bytes([value % 2]) + bytes(383) for value in range(len(keys))]
    hashes = [item.tobytes() for item in hash_NB]
    return pl.DataFrame({"key": keys, "perceptual_hash": hashes, "image_signature": signatures})


def _hashes(count: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random hashes, a third of them a few bits from another."""
    hash_NB = rng.integers(0, 256, (count, 48), dtype=np.uint8)
    for row in range(0, count, 3):
        bits = np.unpackbits(hash_NB[rng.integers(0, count)])
        bits[rng.choice(384, rng.integers(0, 12), replace=False)] ^= 1
        hash_NB[row] = np.packbits(bits)
    return hash_NB


@pytest.mark.parametrize("max_distance", [0, 3, 7, 11, 31])
def test_bands_find_what_all_pairs_find(max_distance: int) -> None:
    rng = np.random.default_rng(max_distance)
    hash_NB = _hashes(300, rng)
    keys = [f"{number:032x}" for number in rng.permutation(300)]
    rows = _rows(keys, hash_NB)
    num_bands = max_distance + 1
    found: set[str] = set()
    for band in range(num_bands):
        values = band_values(hash_NB, band, num_bands)
        near = near_hashes(rows.with_columns(band=pl.Series(values)), max_distance)
        copies = near_copies(near, max_distance)
        assert set(near["key"]) >= {*copies["key"], *copies["detail"]}
        assert set(copies["reason"]) <= {"near_duplicate_image"}
        for key, detail in copies.select("key", "detail").iter_rows():
            one, other = hash_NB[keys.index(key)], hash_NB[keys.index(detail)]
            assert detail < key
            assert np.bitwise_count(one ^ other).sum() <= max_distance
        found |= set(copies["key"])
    distance_NN = np.bitwise_count(hash_NB[:, None] ^ hash_NB[None]).sum(axis=2)
    expected = {
        keys[i]
        for i in range(300)
        for j in range(300)
        if keys[j] < keys[i] and distance_NN[i, j] <= max_distance
    }
    assert len(expected) > 2
    assert found == expected


def test_a_crowded_band_is_bounded_and_still_finds_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 different hashes share a band's value: each is compared only with its neighbours."""
    rng = np.random.default_rng(0)
    hash_NB = rng.integers(0, 256, (10_000, 48), dtype=np.uint8)
    hash_NB[:, ::2] = 0
    hash_NB[1] = hash_NB[0]
    hash_NB[1, 47] ^= 1
    compared = 0
    count = np.bitwise_count

    def counting(words: Any) -> Any:
        nonlocal compared
        compared += len(words)
        return count(words)

    monkeypatch.setattr(np, "bitwise_count", counting)
    monkeypatch.setattr(dedup_image, "WINDOW", 20)
    keys = [f"{number:032x}" for number in range(10_000)]
    rows = _rows(keys, hash_NB)
    copies = near_copies(rows.with_columns(band=pl.lit(5, dtype=pl.UInt64)), 4)
    assert copies.select("key", "detail").rows() == [(keys[1], keys[0])]
    assert compared <= 20 * 10_000


def test_what_is_not_asked_for_is_not_there() -> None:
    plain, _ = load("demo")
    assert "dedup_image" not in {stage.name for stage in plain.stages}
    run, _ = load("demo", ["dedup_image.max_distance=7", "score.model=m"])
    names = [stage.name for stage in run.stages]
    assert names[names.index("filter_image") : names.index("shards")] == [
        "filter_image", "gather_hashes", "find_copies", "merge_copies", "dedup_image", "score",
        "filter_score",
    ]  # fmt: skip
    paper, _ = load("paper_corpus")
    assert not {"dedup_image", "score"} & {stage.name for stage in paper.stages}
    for fields, message in (
        ({"max_distance": 32}, "max_distance: must be at most 31"),
        ({"exact": False}, "nothing to look for"),
        ({"partitions": 0}, "partitions: must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(DedupImageConfig, fields, "run.toml")
