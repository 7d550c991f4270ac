"""Shards as a source: each row keeps its exemptions from run to run."""

import dataclasses
import json
from pathlib import Path

import polars as pl
import pytest

from data_prep.corpus import CorpusStageConfig, SourcesConfig
from data_prep.corpus_facts import exemptions_of_shards, is_exempt, with_exemptions
from data_prep.filters.text import FilterTextConfig
from data_prep.sources.readers.source import PackedSource
from data_prep.sources.table import TableSource
from pipeline.cli import main
from pipeline.core.records import InputError
from pipeline.core.run import Run, read_manifest
from pipeline.tools.why import explain
from tests.helpers.corpus_files import drawing, encoded, finish, make_run, sidecars

NAMES = ("vg1", "vg2", "coco1", "coco2", "web1", "web2")
LONG = "一张很长的说明" * 10
CAPTIONS = {
    "vg": [("vg1", "窗边的猫"), ("vg1", LONG), ("vg2", "狗")],
    "coco": [("coco1", "猫"), ("coco1", LONG), ("coco2", "树下的人")],
    "web": [("web1", "网上的一张图片"), ("web2", "网上的另一张照片")],
}


def run_over(folder: Path, *sources: TableSource | PackedSource, filters: FilterTextConfig) -> Run:
    """A finished run up to its shards."""
    pictures = {f"{name}.jpg": encoded(drawing(number)) for number, name in enumerate(NAMES)}
    run = make_run(folder, pictures, {})
    corpus = CorpusStageConfig(corpus=SourcesConfig(kind="sources", sources=sources))
    stages = [dataclasses.replace(run.stages[0], config=corpus), *run.stages[1:]]
    stages[1] = dataclasses.replace(stages[1], config=filters)
    return finish(dataclasses.replace(run, stages=tuple(stages)))


@pytest.fixture
def first(tmp_path: Path) -> Run:
    for name, rows in CAPTIONS.items():
        table = [(f"http://a.cn/{image}.jpg", caption, image) for image, caption in rows]
        frame = pl.DataFrame(table, schema=["url", "caption", "image_id"], orient="row")
        frame.write_csv(tmp_path / f"{name}.csv")
    return run_over(
        tmp_path / "first",
        TableSource(path=str(tmp_path / "vg.csv"), name="vg", kind="visual_genome"),
        TableSource(path=str(tmp_path / "coco.csv"), name="coco", kind="coco"),
        TableSource(path=str(tmp_path / "web.csv"), name="web"),
        filters=FilterTextConfig(),
    )


def by_image(run: Run) -> list[tuple[str, str]]:
    """(image, caption) of the packed rows, sorted."""
    rows = sidecars(run).select(pl.col("url").str.extract(r"/(\w+)\.jpg$"), "caption")
    return sorted(rows.rows())


def test_captions_of_coco_are_rows_and_those_of_visual_genome_are_joined(first: Run) -> None:
    coco = [("coco1", LONG), ("coco1", "猫"), ("coco2", "树下的人")]
    web = [("web1", "网上的一张图片"), ("web2", "网上的另一张照片")]
    assert by_image(first) == [*coco, ("vg1", f"窗边的猫，{LONG}"), ("vg2", "狗"), *web]


def test_a_cycle_loses_no_row_of_coco_or_visual_genome_to_the_rule_on_length(
    first: Run, tmp_path: Path
) -> None:
    stricter = FilterTextConfig(min_characters=8)
    before = first
    for number in (2, 3):  # the third run knows the exemptions from the shards of the second alone
        source = PackedSource(kind="shards", path=f"{before.folder}/shards", name=f"back{number}")
        before = run_over(tmp_path / str(number), source, filters=stricter)
        filtered = read_manifest(before, "filter_text")
        assert filtered is not None
        assert filtered.dropped == ({"too_short": 1} if number == 2 else {})
        assert by_image(before) == [row for row in by_image(first) if row[0] != "web1"]
    key = sidecars(before).filter(pl.col("caption") == "狗")["key"].item()
    assert explain(before, stricter, key)[0].startswith(f"{key}  back3 row")


def test_resharded_rows_keep_their_exemptions(first: Run, tmp_path: Path) -> None:
    out = tmp_path / "resharded"
    assert main(["reshard", first.folder, "--out", str(out), "--samples", "2"]) == 0
    found = pl.concat([pl.read_parquet(path) for path in sorted(out.rglob("0*.parquet"))], how="diagonal")
    assert set(found.select("source", "exempt_from").rows()) == {
        ("vg", "characters"), ("coco", "characters"), ("web", None),
    }  # fmt: skip


def test_rows_without_exemptions_stay_as_they_are(tmp_path: Path) -> None:
    rows = pl.LazyFrame({"key": ["a"], "source": ["web"]})
    assert with_exemptions(rows, exemptions_of_shards(str(tmp_path / "shards"))).collect().columns == [
        "key",
        "source",
    ]


def test_rules_of_rows_and_of_their_source_add_up(first: Run) -> None:
    rows = pl.LazyFrame({"source": ["a", "b", "c"], "exempt_from": ["size", "aspect", None]})
    found = with_exemptions(rows, {"a": ("characters",), "c": ("score",)}).collect()
    assert found["exempt_from"].to_list() == ["characters,size", "aspect", "score"]
    corpus = read_manifest(first, "corpus")
    assert corpus is not None
    table = pl.DataFrame({"source": ["coco", "back", "web"], "exempt_from": [None, "size,characters", None]})
    exempt = table.select(is_exempt(corpus, "characters", table.columns)).to_series()
    assert exempt.to_list() == [True, True, False]


def test_a_source_without_scores_is_scored_when_it_is_taken_back() -> None:
    wukong = TableSource(path="x", name="wukong", kind="wukong")
    assert (wukong.exemptions, wukong.lasting_exemptions) == (("score",), ())
    asked = dataclasses.replace(wukong, exempt_from=("score",))
    assert asked.lasting_exemptions == ("score",)


def test_a_damaged_manifest_beside_the_shards_is_named(first: Run) -> None:
    path = Path(first.folder, "corpus", "manifest.json")
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "extra": []}))
    with pytest.raises(InputError, match=r"corpus/manifest\.json: not the manifest of a corpus"):
        exemptions_of_shards(f"{first.folder}/shards")
