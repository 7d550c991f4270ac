"""Semantic duplicates: pruning as published, clusters that change nothing, and the stages of a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from data_prep.features import semantic
from pipeline import image_encoders
from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core.records import ConfigError, InputError
from pipeline.last_start import start
from tests.helpers.corpus_files import answer_with_drawings


def published(order: list[int], feature_ND: Any, max_similarity: float) -> set[int]:
    """SemDeDup's pruning of one cluster, row by row: an image goes if one before it is too like it."""
    return {
        row
        for place, row in enumerate(order)
        if any(float(feature_ND[row] @ feature_ND[other]) > max_similarity for other in order[:place])
    }


def test_pruning_is_as_published_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    feature_ND = rng.normal(size=(90, 4)).astype(np.float32)
    feature_ND /= np.linalg.norm(feature_ND, axis=1, keepdims=True)
    keys = pl.Series([f"{number:032x}" for number in range(90)])
    expected = published(list(range(90)), feature_ND, 0.9)
    assert 10 < len(expected) < 80
    for at_once, others in ((7, 5), (7, 200), (90, 31), (2048, 16_384)):
        monkeypatch.setattr(semantic, "_COMPARED_AT_ONCE", at_once)
        monkeypatch.setattr(semantic, "_OTHERS_AT_ONCE", others)
        found = semantic.copies_in(keys, feature_ND, 0.9)
        assert {int(key, 16) for key in found["key"]} == expected
        for key, _, detail in found.iter_rows():
            other, cosine = detail.split(" (cosine ")
            own = feature_ND[int(key, 16)] @ feature_ND[: int(key, 16)].T
            assert int(other, 16) == int(own.argmax())
            assert float(cosine.rstrip(")")) == pytest.approx(float(own.max()), abs=1e-4)


class Brightness:
    """An encoder of two dimensions: dark and bright images are far apart."""

    def embed_images(self, images: Any) -> Any:
        angles = np.array([len(data) % 100 for data in images], np.float32) / 100 * np.pi / 2
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


RUN = """
[run]
folder = "{root}/run"
processes = 1
[corpus]
kind = "tables"
[[corpus.tables]]
path = "{root}/captions.csv"
name = "mine"
[dedup]
partitions = 3
[image_features]
model = "{root}/model.safetensors"
[dedup_semantic]
max_similarity = 0.999
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty rows, whose images an encoder sees by the length of their files alone."""
    rows = {
        "url": [f"http://a.cn/{number}.jpg" for number in range(30)],
        "caption": [f"第{number}只橘猫趴在窗台上" for number in range(30)],
    }
    pl.DataFrame(rows).write_csv(tmp_path / "captions.csv")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "my.toml").write_text(RUN.format(root=tmp_path), encoding="utf-8")

    answer_with_drawings(monkeypatch)
    monkeypatch.setattr(image_encoders, "load", lambda config, run_folder: Brightness())
    return tmp_path


def _rows(run: Path, stage: str, folder: str = "kept") -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted((run / stage / folder).glob("*.parquet"))])


def test_a_run_drops_semantic_duplicates_and_says_why(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml, run = str(root / "my.toml"), root / "run"
    start(toml, last="lock")
    before = _rows(run, "filter_image")
    feature_ND = np.concatenate(
        [np.load(path) for path in sorted((run / "image_features/features").glob("*"))]
    )
    assert feature_ND.dtype == np.float16
    feature_ND = feature_ND.astype(np.float32)
    assigned = _rows(run, "assign_clusters", "assigned")
    assert sorted(assigned["key"]) == before["key"].to_list()
    # One cluster (fewer than 8,000 rows): the published pruning in the order of the similarity to its centre.
    centre = np.load(run / "cluster_images/centres.npy")
    assert np.linalg.norm(centre, axis=1) == pytest.approx(1, abs=1e-5)
    similarity = (feature_ND @ centre.T)[:, 0]
    order = sorted(range(30), key=lambda row: (np.float32(similarity[row]), before["key"][row]))
    expected = {before["key"][row] for row in published(order, feature_ND, 0.999)}
    dropped = _rows(run, "dedup_semantic", "dropped")
    assert set(dropped["key"]) == expected
    assert 5 < len(expected) < 28
    lock = json.loads((run / "lock/corpus.lock.json").read_text())
    assert lock["funnel"]["dedup_semantic"]["dropped"] == {"semantic_duplicate": len(expected)}
    assert set(_rows(run, "shards", ".")["key"]) == set(before["key"]) - expected
    capsys.readouterr()
    assert main(["why", toml, dropped["key"][0]]) == 0
    said = capsys.readouterr().out
    assert f"dropped by dedup_semantic: semantic_duplicate ({dropped['detail'][0]})" in said
    assert "(cosine " in said

    # Another threshold clusters nothing again; with more clusters no pair across two is found.
    assert start(toml, ["dedup_semantic.max_similarity=1"], redo=True, last="dedup_semantic")[1] == 3
    assert start(toml, ["dedup_semantic.clusters=5"], redo=True, last="dedup_semantic")[1] == 5
    cluster = dict(_rows(run, "assign_clusters", "assigned").select("key", "cluster").iter_rows())
    assert len(set(cluster.values())) == 5
    fewer = _rows(run, "dedup_semantic", "dropped")
    for key, detail in fewer.select("key", "detail").iter_rows():
        assert cluster[key] == cluster[detail.split(" ")[0]]


@pytest.mark.slow
def test_clusters_in_several_tasks_find_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml, run = str(root / "my.toml"), root / "run"
    settings = ["dedup_semantic.clusters=4", "dedup.partitions=16"]  # one of which has no rows
    start(toml, settings, last="dedup_semantic")
    assert 0 in [len(np.load(path)) for path in (run / "image_features/features").glob("*")]
    one = _rows(run, "dedup_semantic", "dropped")
    monkeypatch.setattr(semantic, "_ROWS_PER_TASK", 9)
    start(toml, settings, redo=True, last="dedup_semantic")
    assert len(list((run / "find_semantic_copies/copies").glob("*.parquet"))) == 4
    assert len(list((run / "assign_clusters/assigned").glob("*.npy"))) == 4
    assert _rows(run, "dedup_semantic", "dropped").equals(one)


def test_settings_are_checked(root: Path) -> None:
    toml = str(root / "my.toml")
    text = (root / "my.toml").read_text(encoding="utf-8")
    (root / "bare.toml").write_text(text.replace("[image_features]\nmodel", "[launch]\n#"), encoding="utf-8")
    with pytest.raises(ConfigError, match="dedup_semantic: no features to compare"):
        load(str(root / "bare.toml"))
    with pytest.raises(ConfigError, match="give either image_encoder or model"):
        load(toml, ["image_features.image_encoder=b"])
    with pytest.raises(ConfigError, match=r"dedup_semantic\.max_similarity"):
        load(toml, ["dedup_semantic.max_similarity=1.1"])
    (root / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"model\.safetensors: no such file or folder; correct \[image_features\] model"
    ):
        start(toml, last="image_features")
