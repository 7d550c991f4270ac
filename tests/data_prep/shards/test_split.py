"""Train and validation: every row in one of them, no copy of an image in both, whatever the workers."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from data_prep.shards import split as split_module
from data_prep.shards.split import SplitConfig
from pipeline.core.config import build
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import Run, read_manifest
from tests.helpers.corpus_files import drawing, encoded, finish, make_run, sidecars
from tests.helpers.hash_distances import nearest_hash_distances

NUM_PICTURES = 60
DISTANCE = 32


def _copies(number: int) -> dict[str, bytes]:
    """A drawing, the same bytes under another address, and for some a smaller and a coarser copy."""
    image = drawing(number)
    found = {f"{number}.jpg": encoded(image), f"{number}-same.jpg": encoded(image)}
    if number % 3 == 0:
        found[f"{number}-small.jpg"] = encoded(image.resize((52, 52), Image.Resampling.LANCZOS))
        found[f"{number}-coarse.jpg"] = encoded(image, quality=40)
    return found


IMAGES = {name: data for number in range(NUM_PICTURES) for name, data in _copies(number).items()}
CAPTIONS = {name: f"名叫{name.removesuffix('.jpg')}的一张图片" for name in IMAGES}


def _split(folder: Path, splitting: SplitConfig, partitions: int = 3, processes: int = 1) -> Run:
    return finish(
        make_run(folder, IMAGES, CAPTIONS, partitions=partitions, splitting=splitting, processes=processes)
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _split(tmp_path_factory.mktemp("split"), SplitConfig(count=20))


def _numbers(table: pl.DataFrame) -> set[str]:
    return set(table["url"].str.extract(r"/(\d+)"))


def test_every_row_is_in_one_part(done: Run) -> None:
    train, validation = sidecars(done), sidecars(done, "validation")
    assert 0 < validation.height <= 20
    assert sorted([*train["url"], *validation["url"]]) == sorted(f"http://a.cn/{name}" for name in IMAGES)
    heights = [pl.read_parquet(path).height for path in sorted(Path(done.folder, "shards").glob("*.parquet"))]
    assert heights[:-1] == [8] * (len(heights) - 1)


def test_no_copy_crosses(done: Run) -> None:
    train, validation = sidecars(done), sidecars(done, "validation")
    assert _numbers(train).isdisjoint(_numbers(validation))
    assert set(train["image_sha256"]).isdisjoint(validation["image_sha256"])
    distances = nearest_hash_distances(list(validation["perceptual_hash"]), list(train["perceptual_hash"]))
    assert distances.min() > DISTANCE
    # The planted copies are such that equal bytes or equal hashes alone would let some cross.
    hashes = pl.concat([train, validation]).with_columns(number=pl.col("url").str.extract(r"/(\d+)"))
    per_picture = hashes.group_by("number").agg(pl.col("perceptual_hash").n_unique())
    assert per_picture["perceptual_hash"].max() > 1


def test_rows_of_validation_are_not_trained_on(done: Run) -> None:
    manifest = read_manifest(done, "shards")
    split_manifest = read_manifest(done, "split")
    assert manifest is not None
    assert split_manifest is not None
    facts = split_manifest.extra["split"]
    assert manifest.num_kept == len(IMAGES) - facts["validation"]
    assert sum(facts["counts"].values()) == facts["validation"]


@pytest.mark.parametrize(
    ("partitions", "processes"), [(1, 1), (7, 1), pytest.param(3, 2, marks=pytest.mark.slow)]
)
def test_the_parts_depend_on_neither_partitions_nor_workers(
    done: Run, tmp_path: Path, partitions: int, processes: int
) -> None:
    other = _split(tmp_path, SplitConfig(count=20), partitions, processes)
    for stage in ("shards", "validation"):
        first, second = (read_manifest(run, stage) for run in (done, other))
        assert first is not None
        assert second is not None
        assert [shard.digest for shard in first.shards] == [shard.digest for shard in second.shards]


def test_share_and_equal_hashes_alone(tmp_path: Path) -> None:
    run = _split(tmp_path, SplitConfig(share=0.1, distance=0))
    validation = sidecars(run, "validation")
    assert validation.height <= 0.1 * len(IMAGES)
    assert set(sidecars(run)["perceptual_hash"]).isdisjoint(validation["perceptual_hash"])


def test_candidates_beside_training_rows_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few candidates, copies of some lie among the rows that are none."""
    monkeypatch.setattr(split_module, "_SPARE_CANDIDATES", 0)
    run = _split(tmp_path, SplitConfig(count=12))
    manifest = read_manifest(run, "split")
    assert manifest is not None
    assert manifest.extra["split"]["candidates_with_copies_in_training"] > 0
    validation, train = sidecars(run, "validation"), sidecars(run)
    assert _numbers(train).isdisjoint(_numbers(validation))


def test_rows_without_a_hash_go_by_their_bytes() -> None:
    rows = pl.DataFrame(
        {
            "rank": ["a", "b", "c"],
            "perceptual_hash": [None, bytes(48), None],
            "signatures": [[None], [bytes(384)], [None]],
            "num_rows": [1, 1, 1],
        },
        schema_overrides={"perceptual_hash": pl.Binary, "signatures": pl.List(pl.Binary)},
    )
    chosen = split_module._choose(SplitConfig(count=2), rows, np.zeros(3, dtype=np.bool_), 2)
    assert chosen["rank"].to_list() == ["a", "b"]


def test_wrong_settings() -> None:
    for wrong in (
        {},
        {"share": 0.1, "count": 3},
        {"share": 1.5},
        {"count": 0},
        {"count": 1, "distance": 384},
    ):
        with pytest.raises(ConfigError, match=r"share|count|distance"):
            build(SplitConfig, wrong, "run.toml")


def test_more_than_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"of 160 rows; correct \[split\]"):
        _split(tmp_path, SplitConfig(count=160))
