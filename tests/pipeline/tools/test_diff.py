"""Two builds of a corpus compared: every differing row is counted once, with the other build's reason."""

import dataclasses
import json
from pathlib import Path

import polars as pl
import pytest

from data_prep.corpus import CorpusStageConfig, SourcesConfig
from data_prep.decontamination import make_guard
from data_prep.filters.text import FilterTextConfig
from data_prep.shards import lock
from data_prep.shards.lock import LockConfig
from data_prep.shards.split import SplitConfig
from data_prep.sources.table import TableSource
from pipeline.cli import main
from pipeline.core.records import InputError
from pipeline.core.run import Run
from pipeline.core.stage import Stage
from pipeline.tools import diff
from tests.helpers.corpus_files import drawing, encoded, finish, make_run, sidecars

IMAGES = {f"{number}.jpg": encoded(drawing(number)) for number in range(30)}
CAPTIONS = {name: f"编号{name.removesuffix('.jpg'):0>4}的图片" for name in IMAGES}


def _build(
    folder: Path,
    pictures: dict[str, bytes] = IMAGES,
    captions: dict[str, str] = CAPTIONS,
    splitting: SplitConfig | None = None,
    **filter_text: int,
) -> Run:
    run = make_run(folder, pictures, captions, splitting=splitting)
    stages = [
        dataclasses.replace(stage, config=FilterTextConfig(**filter_text))  # type: ignore[arg-type]
        if stage.name == "filter_text"
        else stage
        for stage in run.stages
    ]
    config = LockConfig(settings={stage.name: stage.config for stage in stages})
    parents = tuple(stage.name for stage in stages)
    stages.append(Stage("lock", "", 1, config, parents, lock.plan, lock.run))
    return finish(dataclasses.replace(run, stages=tuple(stages)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _build(tmp_path_factory.mktemp("plain"))


def _lock(run: Run) -> dict[str, object]:
    return json.loads(Path(run.folder, "lock", lock.LOCK_FILE).read_text())  # type: ignore[no-any-return]


def test_the_lock_names_sources_rules_settings_funnel_and_shards(plain: Run) -> None:
    found = _lock(plain)
    assert [(item["source"], item["rows"]) for item in found["sources"]] == [("mine", 30)]  # type: ignore[attr-defined]
    assert found["rules"]["filter_text"]["characters"] >= 1  # type: ignore[index]
    assert found["settings"]["filter_text"]["max_characters"] == 50  # type: ignore[index]
    assert found["funnel"]["filter_text"]["sources"]["mine"] == {"in": 30, "kept": 30, "dropped": {}}  # type: ignore[index]
    assert sum(shard["samples"] for shard in found["shards"] if shard["path"].endswith(".tar")) == 30  # type: ignore[attr-defined]
    assert plain.folder not in json.dumps(found)


def test_the_same_build_elsewhere_differs_in_nothing(plain: Run, tmp_path: Path) -> None:
    changes = diff.row_changes(diff.Build.open(plain.folder), diff.Build.open(_build(tmp_path).folder))
    assert (changes.kept_by_both, changes.other_image, changes.other_caption) == (30, 0, 0)
    assert changes.missing == {"A": {}, "B": {}}


@pytest.mark.parametrize("rows_at_once", [1, 10, 1_000])
def test_every_differing_row_has_the_others_reason(
    rows_at_once: int, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "_ROWS_AT_ONCE", rows_at_once)
    monkeypatch.setattr(diff, "_BATCH_ROWS", 3)
    captions = dict(CAPTIONS)
    del captions["0.jpg"]  # gone from the source
    captions["1.jpg"] = "一张新的图片"  # another row, and the old one gone
    captions["new.jpg"] = "以前没有的图片"
    pictures = {**IMAGES, "new.jpg": encoded(drawing(99)), "2.jpg": encoded(drawing(98))}
    # Captions of CAPTIONS have 9 characters, the two new ones fewer.
    other = _build(tmp_path, pictures, captions, max_characters=8)
    table = tmp_path / "rows.parquet"
    changes = diff.row_changes(diff.Build.open(plain.folder), diff.Build.open(other.folder), str(table))
    assert changes.kept_by_both == 0
    assert changes.missing["A"] == {("corpus", "not_in_sources"): 2, ("filter_text", "too_long"): 28}
    assert changes.missing["B"] == {("corpus", "not_in_sources"): 2}
    rows = pl.read_parquet(table)
    assert rows.height == 32
    assert set(rows.filter(pl.col("in") == "A")["key"]) == set(sidecars(plain)["key"])
    assert set(rows.filter(pl.col("in") == "B")["caption"]) == {"一张新的图片", "以前没有的图片"}


def test_another_image_at_an_address_and_rows_set_aside(plain: Run, tmp_path: Path) -> None:
    pictures = {**IMAGES, "2.jpg": encoded(drawing(98))}
    other = _build(tmp_path, pictures, splitting=SplitConfig(count=5))
    changes = diff.row_changes(diff.Build.open(other.folder), diff.Build.open(plain.folder))
    num_aside = sidecars(other, "validation").height
    assert changes.missing == {"A": {}, "B": {("split", "validation"): num_aside}}
    assert changes.kept_by_both == 30 - num_aside
    trained = any(url.endswith("/2.jpg") for url in sidecars(other)["url"])
    assert changes.other_image == int(trained)


def test_a_picture_that_the_other_guards_is_no_unknown_row(tmp_path: Path) -> None:
    """Captions of one image are joined, so guarded ones have other keys than the joined text."""
    (tmp_path / "ids.txt").write_text("7\n8\n")
    make_guard(str(tmp_path / "ids.txt"), "coco", str(tmp_path / "guard.parquet"))
    runs = []
    for name, guards in (("a", ()), ("b", (str(tmp_path / "guard.parquet"),))):
        run = make_run(tmp_path / name, IMAGES, CAPTIONS)
        table = tmp_path / name / "inputs" / "table.csv"
        table.write_text(table.read_text() + "http://a.cn/7.jpg,旁边还有一只猫\n", encoding="utf-8")
        source = TableSource(path=str(table), name="coco", kind="coco", join_captions=True)
        corpora = CorpusStageConfig(corpus=SourcesConfig(kind="sources", sources=(source,), guards=guards))
        stages = [dataclasses.replace(run.stages[0], config=corpora), *run.stages[1:]]
        stages.append(
            Stage(
                "lock",
                "",
                1,
                LockConfig(settings={}),
                ("corpus", "filter_text", "shards"),
                lock.plan,
                lock.run,
            )
        )
        runs.append(finish(dataclasses.replace(run, stages=tuple(stages))))
    changes = diff.row_changes(*(diff.Build.open(run.folder) for run in runs))
    assert changes.kept_by_both == 28
    assert changes.missing == {"A": {("corpus", "guarded_id"): 2}, "B": {}}


def test_the_command_shows_settings_funnel_and_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = {**CAPTIONS, "7.jpg": "一张图片两个人"}
    first, other = (
        _build(tmp_path / "a", captions=captions),
        _build(tmp_path / "b", captions=captions, max_characters=8),
    )
    table = tmp_path / "rows.parquet"
    assert main(["diff", first.folder, other.folder, "--rows", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "filter_text.max_characters: 50 → 8" in shown
    assert "rows in training shards: 30 in A, 1 in B" in shown
    assert "kept by both: 1 rows" in shown
    assert "only in A: 29 rows\n  29 dropped by B's filter_text: too_long" in shown
    assert [line.split()[2:] for line in shown.splitlines() if " - too_long " in line] == [
        ["-", "too_long", "0", "29", "+29"]
    ]
    assert pl.read_parquet(table)["reason"].to_list() == ["too_long"] * 29


def test_builds_with_other_keys_are_compared_without_rows(plain: Run, tmp_path: Path) -> None:
    other = _build(tmp_path, normalise_duplicates=True)
    lines = diff.compare(plain.folder, other.folder)
    assert "  filter_text.normalise_duplicates: false → true" in lines
    assert lines[-1].startswith("rows are not compared: ")
    with pytest.raises(InputError, match="leave out --rows"):
        diff.compare(plain.folder, other.folder, str(tmp_path / "rows.parquet"))


def test_a_build_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; finish the corpus"):
        diff.Build.open(str(tmp_path))
    damaged = tmp_path / "lock" / lock.LOCK_FILE
    damaged.parent.mkdir()
    damaged.write_text('{"funnel": []}')
    with pytest.raises(InputError, match="no lock file of a corpus"):
        diff.Build.open(str(tmp_path))
