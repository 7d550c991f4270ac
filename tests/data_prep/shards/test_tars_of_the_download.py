"""Without `samples_per_shard` the tars of the download are the shards, and sidecars say what counts."""

import hashlib
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

import cnclip
from data_prep.accounting.judged import JudgedFacts
from data_prep.dedup.near_duplicates import DedupImageConfig
from data_prep.formats.shards import ShardFacts
from data_prep.shards import stage as shards
from data_prep.shards.export import export
from data_prep.shards.repack import RepackConfig, reshard_stages
from data_prep.shards.split import SplitConfig
from pipeline import runner
from pipeline.core import store
from pipeline.core.records import InputError
from pipeline.core.run import Run, make_context, read_manifest
from pipeline.publish.corpus import write_corpus
from pipeline.tools import retry
from tests.helpers.corpus_files import drawing, encoded, finish, make_run, sidecars
from tests.helpers.fake_web import NUM_PICTURES, fake_web, load, shard_bytes

NAMES = [f"{number}.jpg" for number in range(40)]
CAPTIONS = {name: f"编号{number:04d}的图片" for number, name in enumerate(NAMES)}


def run_of(folder: Path, seeds: Sequence[int], **options: object) -> Run:
    """Return a finished run over drawings from these seeds, in which copies are dropped."""
    pictures = {name: encoded(drawing(seed)) for name, seed in zip(NAMES, seeds, strict=False)}
    captions = {name: CAPTIONS[name] for name in pictures}
    options = {"samples_per_shard": None, "copies": DedupImageConfig(), **options}
    return finish(make_run(folder, pictures, captions, **options))  # type: ignore[arg-type]


def keys_in(tar: Path) -> list[str]:
    with tarfile.open(tar) as file:
        return [name.removesuffix(".jpg") for name in file.getnames() if name.endswith(".jpg")]


def unlisted(run: Run) -> int:
    manifest = read_manifest(run, "shards")
    assert manifest is not None
    return ShardFacts.total(manifest)


def no_errors(number: int) -> str | None:
    return None


def test_a_tar_stays_and_its_sidecar_lists_what_is_kept(tmp_path: Path) -> None:
    run = run_of(tmp_path, [*range(36), 0, 1, 2, 3])
    folder = Path(run.folder)
    rows = sidecars(run)
    assert (rows.height, unlisted(run)) == (36, 4)
    assert rows["key"].is_sorted()
    for tar in sorted((folder / "shards").glob("*.tar")):
        assert tar.samefile(folder / "download" / "pictures" / tar.name)
        table = pl.read_parquet(tar.with_suffix(".parquet"))
        assert set(table["key"]) < set(keys_in(tar)) or table["key"].to_list() == keys_in(tar)
        data = tar.read_bytes()
        for offset, size, sha256 in table.select("offset_bytes", "size_bytes", "image_sha256").iter_rows():
            assert hashlib.sha256(data[offset : offset + size]).hexdigest() == sha256
    assert runner.verify(run, run.stages) == []
    assert runner.execute(run, run.stages, redo=False) == 0
    write_corpus(
        run.folder, str(tmp_path / "card"), repo="me/own", licence="mit", with_images=True, only_links=True
    )
    assert "the tars have 4 others" in (tmp_path / "card" / "README.md").read_text(encoding="utf-8")


def test_its_readers_see_the_corpus_of_packed_shards(tmp_path: Path) -> None:
    seeds = [*range(36), 0, 1, 2, 3]
    kept, packed = run_of(tmp_path / "kept", seeds), run_of(tmp_path / "packed", seeds, samples_per_shard=8)
    assert sidecars(kept).drop("offset_bytes").equals(sidecars(packed).drop("offset_bytes"))
    exports = [
        export(run.folder, str(tmp_path / name), "tsv", "train", lambda *_: None)
        for run, name in ((kept, "a"), (packed, "b"))
    ]
    assert exports[0].num_images == exports[1].num_images == 36
    for name in exports[0].files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    corpus = cnclip.Corpus(kept.folder)
    views = [[sample.key for sample in corpus], [item["__key__"] for item in corpus.webdataset()]]
    assert views == [sidecars(kept)["key"].to_list()] * 2
    config = RepackConfig(corpora=(kept.folder,), samples_per_shard=8)
    again = finish(Run(str(tmp_path / "again"), 0, "local", 1, reshard_stages(config)))
    assert shard_bytes(again) == shard_bytes(packed)


def test_a_tar_of_which_little_is_kept_is_packed_anew(tmp_path: Path) -> None:
    run = run_of(tmp_path, [0] * 9 + [1, 2, 3], partitions=1)
    assert (sidecars(run).height, unlisted(run)) == (4, 0)
    assert keys_in(Path(run.folder, "shards", "00000.tar")) == sidecars(run)["key"].to_list()


def test_rows_set_aside_are_in_no_sidecar_of_training(tmp_path: Path) -> None:
    run = run_of(tmp_path, range(40), splitting=SplitConfig(count=6), copies=None)
    train, validation = sidecars(run), sidecars(run, "validation")
    assert (train.height, validation.height) == (34, 6)
    assert set(train["key"]).isdisjoint(validation["key"])
    assert keys_in(Path(run.folder, "validation", "00000.tar")) == validation["key"].to_list()


def test_a_tar_with_other_bytes_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path, range(10))
    tar = Path(run.folder, "download", "pictures", "00001.tar")
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(InputError, match=r"pictures/00001\.tar: not the bytes .*--stage download --repair"):
        runner.execute(run, [run.stage("shards")], redo=True, force=True)


def test_images_that_a_retry_brings_are_packed_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_web(monkeypatch, no_errors)
    good = finish(load(tmp_path / "good", samples_per_shard=None))
    fake_web(monkeypatch, lambda number: "timeout: 10 s" if number == 7 else None)
    run = finish(load(tmp_path / "bad", samples_per_shard=None))
    assert sidecars(run).height == NUM_PICTURES - 1
    fake_web(monkeypatch, no_errors)
    retry.do(run)
    assert shard_bytes(run) == shard_bytes(good)
    links = [path.stat().st_nlink for path in sorted(Path(run.folder, "shards").glob("*.tar"))]
    assert sorted(links) == [1, 2, 2]


def test_captions_that_a_threshold_took_are_in_no_tar(tmp_path: Path) -> None:
    run = run_of(tmp_path, range(40), copies=None)
    context = make_context(run, run.stage("shards"))
    assert context is not None
    rows = context.parents["filter_image"]
    lost = JudgedFacts(captions_dropped={"score_below_threshold": 1}).to_json()
    scored = replace(rows, extra={**rows.extra, "00001": {**rows.extra["00001"], **lost}})
    # The threshold need not be the last stage that judges rows.
    for later in ({}, {"balance": rows}):
        parents = {**context.parents, "filter_score": scored, **later}
        tasks = shards.plan(run.stage("shards").config, replace(context, parents=parents))
        assert ["whole" in task.arguments for task in tasks] == [True, False, True]


def test_a_second_name_is_a_copy_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "a").write_bytes(b"data")
    store.link(str(tmp_path / "a"), str(tmp_path / "deep" / "b"))
    assert (tmp_path / "deep" / "b").read_bytes() == b"data"
    with pytest.raises(FileNotFoundError):
        store.link(str(tmp_path / "none"), str(tmp_path / "c"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "deep"]


def test_a_store_that_cannot_copy_gets_the_bytes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cp_file", refuse)
    store.write_bytes("memory://link/a", b"data")
    store.link("memory://link/a", "memory://link/deep/b")
    assert store.read_bytes("memory://link/deep/b") == b"data"
    with pytest.raises(FileNotFoundError):
        store.link("memory://link/none", "memory://link/c")
    store.remove("memory://link")
