"""`import cnclip`: what it returns equals what the stages, commands and peers give on the same inputs."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import cnclip
from cnclip import rules
from pipeline.cli import main
from tests.helpers.classification_files import write_cnclip
from tests.helpers.corpus_files import plain_corpus
from tests.helpers.evaluation_files import small_evaluation
from tests.helpers.tiny_model import write_tiny_model
from training.encoder import load as load_encoder

RUN = Path(__file__).parents[1] / "pipeline" / "data" / "finished_run.tar.xz"


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with tarfile.open(RUN) as archive:
        archive.extractall(folder, filter="data")
    return folder / "old_run"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> cnclip.Corpus:
    run = plain_corpus(tmp_path_factory.mktemp("corpus"), range(20))
    return cnclip.Corpus(run.folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> cnclip.Model:
    weights, vocabulary = write_tiny_model(tmp_path_factory.mktemp("model"))
    return cnclip.load(weights, vocabulary=vocabulary, device="cpu")


def test_the_import_is_light_and_every_public_name_is_there() -> None:
    program = """
import sys, cnclip
assert not {"torch", "polars", "transformers", "faiss"} & set(sys.modules), sorted(sys.modules)
assert set(cnclip.__all__) <= set(dir(cnclip))
for name in (*cnclip.__all__, "__version__"):
    assert getattr(cnclip, name) is not None, name
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        cnclip.lod  # noqa: B018


@pytest.mark.parametrize("module", ["data_prep.filters.text", "eval.features.tables", "pipeline.tools.diff"])
def test_polars_has_numpy_itself_and_no_stand_in(module: str) -> None:
    program = f"import {module}, polars._dependencies, numpy; print(polars._dependencies.numpy is numpy)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_folders_of_the_same_names_where_one_stands_change_nothing(tmp_path: Path) -> None:
    """Packages that would raise, and folders that are only namespaces; each process imports some of both."""
    for name in ("training", "eval", "pipeline", "data_prep"):
        (tmp_path / name).mkdir()
    for name in ("training", "pipeline"):
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    program = """
import sys
sys.path.insert(0, "")
import multiprocessing
import cnclip
from pipeline.core.processes import die_with_parent
if __name__ == "__main__":
    import os
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(die_with_parent) is None
    import training.stages, eval.evaluate
"""
    (tmp_path / "program.py").write_text(program)
    subprocess.run([sys.executable, "program.py"], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "cnclip", "plan", "demo"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "stage1" in done.stdout


def test_a_package_of_the_same_name_that_came_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("")
    program = "import sys; sys.path.insert(0, ''); import training, cnclip"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"another one was imported before it, from {tmp_path / 'training'}" in done.stderr


@pytest.mark.slow
def test_a_run_in_a_folder_with_packages_of_the_same_names_starts_the_right_children(tmp_path: Path) -> None:
    (tmp_path / "data_prep").mkdir()
    (tmp_path / "data_prep" / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    command = [sys.executable, "-m", "cnclip", "run", "demo", "--to", "download"]
    small = ("corpus.num_clean=30", "corpus.num_evaluation=12", "corpus.dirt=0.02", "download.retries=0")
    settings = [f"--set={item}" for item in (*small, "download.timeout_seconds=2.0", "dedup.partitions=1")]
    done = subprocess.run([*command, *settings], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_embeds_as_the_encoder_and_scores_pairs(model: cnclip.Model, corpus: cnclip.Corpus) -> None:
    samples = list(corpus)[:5]
    images, captions = [sample.image_bytes for sample in samples], [sample.caption for sample in samples]
    reference = load_encoder(model.source.path, vocabulary=model.source.vocabulary, device="cpu")
    image_ND, text_ND = reference.embed_images(images), reference.embed_texts(captions)
    np.testing.assert_array_equal(model.embed_images(images), image_ND)
    np.testing.assert_array_equal(model.embed_texts(captions), text_ND)
    np.testing.assert_array_equal(model.similarity(images, captions), image_ND @ text_ND.T)
    np.testing.assert_allclose(
        cnclip.score(model, images, captions, batch_size=2), (image_ND * text_ND).sum(axis=1), atol=2e-6
    )
    found = model.classify(image_ND, ["猫", "一只狗"], ["{}", "一张{}的照片"])
    assert found.probability_NC.shape == (5, 2)
    np.testing.assert_allclose(found.probability_NC.sum(axis=1), 1, rtol=1e-5)
    assert set(found.best) <= {"猫", "一只狗"}
    with pytest.raises(ValueError, match="5 images and 4 captions"):
        cnclip.score(model, images, captions[:4])
    with pytest.raises(ValueError, match=r"has no \{\}"):
        model.classify(images, ["猫"], ["一张照片"])
    with pytest.raises(ValueError, match="list of texts"):
        model.similarity(images, "猫")


def test_classification_is_the_evaluations(model: cnclip.Model, tmp_path: Path) -> None:
    from eval.datasets.labels import templates_for
    from eval.zeroshot.measure import open_classification

    folder = write_cnclip(tmp_path / "sets" / "colours")
    results = cnclip.evaluate(model, folder.parent, out=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert len(results) == len(written["tables"]) == 1
    (scores,) = results.scores().values()
    data, metric = open_classification(str(folder))
    names = data.labels.names
    best = model.classify(
        [image.read() for image in data.images], names, templates_for(data.name, "own")
    ).best
    right = sum(names[int(row.argmax())] == name for row, name in zip(data.targets_NC, best, strict=True))
    assert metric == "accuracy"
    assert next(iter(scores.values())) == pytest.approx(100 * right / len(best))


def test_a_run_is_loaded_by_its_folder_and_its_toml(
    old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old_run.parent)
    by_folder, by_file = cnclip.load("old_run/run"), cnclip.load("old_run/run.toml")
    texts = ["一只红色的猫", "蓝色的狗"]
    np.testing.assert_array_equal(by_folder.embed_texts(texts), by_file.embed_texts(texts))
    assert by_folder.source.run_folder == "old_run/run"
    results = cnclip.evaluate(by_folder)
    assert len(results) >= 1
    assert "mean recall" in repr(results)
    done = cnclip.run("old_run/run.toml", last="corpus")
    assert (done.num_run, done.folder) == (0, "old_run/run")
    assert len(done.corpus) == len(cnclip.Corpus("old_run/run.toml")) > 0
    with pytest.raises(cnclip.ConfigError, match="stage1"):
        cnclip.run("old_run/run.toml", stage1__epochs="many")


@pytest.mark.parametrize("through_stdin", [True, False])
def test_a_script_without_a_main_guard_runs_once(tmp_path: Path, through_stdin: bool) -> None:
    program = """
import cnclip
print("started")
small = {"num_clean": 30, "num_evaluation": 12, "dirt": 0.02}
print(cnclip.run("demo", last="filter_text", corpus=small))
"""
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-" if through_stdin else "program.py"],
        input=program if through_stdin else None,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "started\nFinishedRun(recipe='demo', folder='runs/demo', num_run=2)\n"


def test_overrides_are_those_of_the_command_line() -> None:
    from cnclip.runs import _as_set
    from pipeline.core.config import apply_overrides

    given = {
        "stage1__peak_learning_rate": 5e-4,
        "run": {"folder": 'a "b"\\c 猫', "processes": 3},
        "filter_text__blacklists": ["advertising"],
        "stage1__lock_image": False,
    }
    items = [item for key, value in given.items() for item in _as_set(key, value)]
    assert apply_overrides({}, items) == {
        "stage1": {"peak_learning_rate": 5e-4, "lock_image": False},
        "run": {"folder": 'a "b"\\c 猫', "processes": 3},
        "filter_text": {"blacklists": ["advertising"]},
    }


def test_a_corpus_has_rows_samples_and_drop_reasons(corpus: cnclip.Corpus, old_run: Path) -> None:
    rows = corpus.rows.select("key", "caption").collect()
    assert len(corpus) == rows.height == 20
    assert [sample.key for sample in corpus] == rows["key"].to_list()
    assert corpus[-1].caption == rows["caption"][-1]
    assert corpus[3].image.mode == "RGB"
    with pytest.raises(IndexError):
        corpus[20]
    reasons = cnclip.Corpus(old_run / "run").drop_reasons()
    assert reasons.columns == ["stage", "source", "reason", "rows"]
    dropped = reasons.filter(pl.col("stage") == "filter_text")["rows"].sum()
    manifest = json.loads((old_run / "run" / "filter_text" / "manifest.json").read_text())
    assert dropped == sum(manifest["dropped"].values()) > 0
    with pytest.raises(cnclip.InputError, match="not a run's folder"):
        cnclip.Corpus(f"{corpus.folder}/shards").drop_reasons()
    with pytest.raises(cnclip.InputError, match="manifest"):
        cnclip.Corpus("no/such/folder")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_every_pair_once_preprocessed(corpus: cnclip.Corpus, num_workers: int) -> None:
    from training.model.preprocess import preprocess

    loader = corpus.loader(batch_size=8, image_size_px=32, num_workers=num_workers)
    batches = list(loader)
    assert [len(captions) for _, captions in batches] == [8, 8, 4]
    samples = list(corpus)
    assert [caption for _, captions in batches for caption in captions] == [item.caption for item in samples]
    expected = preprocess([item.image_bytes for item in samples], 32)
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)
    shuffled = [caption for _, captions in corpus.loader(shuffle=True, seed=1) for caption in captions]
    assert shuffled != [item.caption for item in samples]
    assert sorted(shuffled) == sorted(item.caption for item in samples)
    assert shuffled == [c for _, captions in corpus.loader(shuffle=True, seed=1) for c in captions]


def test_other_libraries_views_hold_the_same_pairs(corpus: cnclip.Corpus) -> None:
    pytest.importorskip("webdataset")
    seen = list(corpus.webdataset())
    assert [item["__key__"] for item in seen] == [sample.key for sample in corpus]
    assert [item["txt"] for item in seen] == [sample.caption for sample in corpus]
    np.testing.assert_array_equal(np.asarray(seen[0]["jpg"]), np.asarray(corpus[0].image))


def test_the_datasets_view_holds_the_same_pairs(corpus: cnclip.Corpus) -> None:
    pytest.importorskip("datasets")
    seen = list(corpus.datasets())
    assert [(item["key"], item["caption"]) for item in seen] == [(s.key, s.caption) for s in corpus]
    np.testing.assert_array_equal(np.asarray(seen[0]["image"]), np.asarray(corpus[0].image))


def test_captions_are_judged_as_in_a_run(corpus: cnclip.Corpus) -> None:
    """Against the stage itself: the same rows in, the same reasons out."""
    rows = pl.DataFrame(
        {
            "TEXT": ["一只猫在看书本", "短", " 编号一的图片\u200b ", None, "长" * 51, "加微信领红包吧大家"],
            "URL": [
                "http://a.cn/1",
                "http://a.cn/2",
                "http://a.cn/3",
                "http://a.cn/4",
                "http://a.cn/5",
                "ftp://x",
            ],
            "similarity": [0.3, 0.3, 0.26, 0.3, 0.3, 0.2],
        }
    )
    kept, dropped = cnclip.filter_captions(rows)
    assert kept["TEXT"].to_list() == ["一只猫在看书本", "编号一的图片"]
    assert dropped["drop_reason"].to_list() == ["too_short", "caption_missing", "too_long", "url_invalid"]
    assert cnclip.filter_captions(rows).counts == dict.fromkeys(dropped["drop_reason"], 1)
    strict = rules.CaptionRules(min_score=0.28, min_characters=6)
    assert cnclip.filter_captions(rows, strict).kept["TEXT"].to_list() == ["一只猫在看书本"]
    alone = cnclip.filter_captions(rows, [rules.caption_present(), rules.characters_between(1, 1)])
    assert alone.kept["TEXT"].to_list() == ["短"]
    assert sidecars_of(corpus).height == cnclip.filter_captions(sidecars_of(corpus).drop("score")).kept.height


def sidecars_of(corpus: cnclip.Corpus) -> pl.DataFrame:
    return corpus.rows.collect()


def test_a_pandas_table_comes_back_as_one_with_its_index() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"caption": ["一只猫在看书本", "短"], "n": [1.5, 2.5]}, index=["a", "b"])
    kept, dropped = cnclip.filter_captions(frame)
    assert (list(kept.index), list(dropped.index)) == (["a"], ["b"])
    assert dropped["drop_reason"].to_list() == ["too_short"]
    assert kept["n"].to_list() == [1.5]


def test_wrong_columns_and_rules_are_one_line() -> None:
    frame = pl.DataFrame({"words": ["一只猫在看书本"]})
    with pytest.raises(ValueError, match="no column of captions"):
        cnclip.filter_captions(frame)
    with pytest.raises(ValueError, match="no role 'captions'"):
        cnclip.filter_captions(frame, columns={"captions": "words"})
    with pytest.raises(ValueError, match="empty list"):
        cnclip.filter_captions(frame, [], columns={"caption": "words"})
    assert cnclip.filter_captions(frame, columns={"caption": "words"}).kept.height == 1


def test_an_index_finds_what_exact_search_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((500, 16), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = cnclip.Index.build(vectors, tmp_path / "index", factory="Flat", rows_per_part=200)
    assert (len(index), index.dim, index.factory) == (500, 16, "Flat")
    scores, rows = index.search(vectors[:7], k=5)
    expected = np.argsort(-(vectors[:7] @ vectors.T), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(rows, expected)
    one_scores, one_rows = index.search(vectors[3], k=5)
    np.testing.assert_array_equal(one_rows, rows[3])
    np.testing.assert_allclose(one_scores, scores[3], rtol=1e-6)
    np.save(tmp_path / "vectors.npy", vectors)
    assert (
        main(["index", str(tmp_path / "vectors.npy"), str(tmp_path / "by_command"), "--factory", "Flat"]) == 0
    )
    np.testing.assert_array_equal(cnclip.Index(tmp_path / "by_command").search(vectors[:7], 5)[1], expected)
    with pytest.raises(cnclip.InputError, match="index of width 16"):
        index.search(vectors[:, :8], 5)


def test_evaluate_needs_sets(model: cnclip.Model, tmp_path: Path) -> None:
    with pytest.raises(cnclip.ConfigError, match="give sets=FOLDER"):
        cnclip.evaluate(model)
    small_evaluation(tmp_path, "small")
    (table,) = cnclip.evaluate(model, tmp_path)
    assert {line.label for line in table.lines} >= {"text-to-image R@1", "mean recall"}
