"""Prediction and score files: their form, that they agree with the metrics, and plain errors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.datasets.cnclip_tsv import RetrievalSet, read_evaluation
from eval.index.flat import build_index
from eval.metrics.recall import recall_at_k
from eval.retrieval.measure import evaluate_retrieval
from eval.retrieval.predictions import rank_image_to_text, rank_text_to_image, retrieve
from pipeline.core.records import InputError
from tests.helpers.evaluation_files import ArrayEncoder, png_bytes, small_evaluation, write_evaluation


def write_features(folder: Path, modality: str, vectors: np.ndarray) -> np.ndarray:
    unit = np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)
    name = {"image": "img_emb", "text": "text_emb"}[modality]
    (folder / name).mkdir(parents=True, exist_ok=True)
    np.save(folder / name / f"{name}_0.npy", unit)
    build_index(str(folder / name / f"{name}_0.npy"), str(folder / f"{modality}.index"))
    return unit


def random_evaluation(folder: Path, num_images: int = 60, num_texts: int = 90) -> RetrievalSet:
    """Several images a text, several texts an image, some images without a text."""
    rng = np.random.default_rng(0)
    images = {1000 - 3 * row: png_bytes(row) for row in range(num_images)}
    named = sorted(images)[: num_images - 5]
    texts = [
        (7 * row, f"文本{row}", rng.choice(named, rng.integers(1, 4), replace=False).tolist())
        for row in range(num_texts)
    ]
    return read_evaluation(write_evaluation(folder, "many", images, texts), "many")


def test_scores_of_the_files_equal_the_metrics_with_many_ties(tmp_path: Path) -> None:
    evaluation = random_evaluation(tmp_path)
    rng = np.random.default_rng(1)
    base = rng.normal(size=(25, 12))  # fewer vectors than rows: every score is tied
    image = write_features(tmp_path / "emb", "image", base[rng.integers(0, 25, evaluation.num_images)])
    text = write_features(tmp_path / "emb", "text", base[rng.integers(0, 25, evaluation.num_texts)])
    scores = retrieve(evaluation, str(tmp_path / "emb"), str(tmp_path / "emb"), str(tmp_path / "out")).scores
    assert scores == evaluate_retrieval(ArrayEncoder(image, text), evaluation).scores
    assert 0 < scores["mean_recall"] < 100

    lines = (tmp_path / "out/many.predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["text_id"] for record in records] == evaluation.text_ids.tolist()
    assert all(set(record) == {"text_id", "image_ids"} for record in records)
    assert all(len(set(record["image_ids"])) == 10 for record in records)
    lines = (tmp_path / "out/many.tr.predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    named = [
        image_id
        for image_id, rows in zip(evaluation.image_ids, evaluation.texts_of_image, strict=True)
        if len(rows)
    ]
    assert [record["image_id"] for record in records] == named
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "many.predictions.jsonl", "many.scores.json", "many.tr.predictions.jsonl", "many.tr.scores.json"
    ]  # fmt: skip

    score_file = json.loads((tmp_path / "out/many.scores.json").read_text())
    assert score_file["success"] is True
    assert score_file["scoreJson"] == {
        "score": score_file["score"], "mean_recall": score_file["score"], **scores["t2i"]
    }  # fmt: skip


def test_same_features_same_bytes(tmp_path: Path) -> None:
    evaluation = random_evaluation(tmp_path)
    rng = np.random.default_rng(1)
    write_features(tmp_path / "emb", "image", rng.normal(size=(evaluation.num_images, 8)))
    write_features(tmp_path / "emb", "text", rng.normal(size=(evaluation.num_texts, 8)))
    for out in ("a", "b"):
        retrieve(evaluation, str(tmp_path / "emb"), str(tmp_path / "emb"), str(tmp_path / out))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_text_to_image_only_has_a_mean_of_three(tmp_path: Path) -> None:
    evaluation = random_evaluation(tmp_path, num_texts=5)
    write_features(tmp_path / "emb", "image", np.random.default_rng(0).normal(size=(60, 8)))
    write_features(tmp_path / "emb", "text", np.random.default_rng(1).normal(size=(5, 8)))
    evaluation = replace(evaluation, image_to_text=False)
    scores = retrieve(evaluation, str(tmp_path / "emb"), str(tmp_path / "emb"), str(tmp_path)).scores
    assert scores["i2t"] is None
    assert scores["mean_recall"] == pytest.approx(
        (scores["t2i"]["r1"] + scores["t2i"]["r5"] + scores["t2i"]["r10"]) / 3
    )
    assert not (tmp_path / "many.tr.predictions.jsonl").exists()


def test_too_few_images_nan_and_foreign_features_are_refused(tmp_path: Path) -> None:
    few = read_evaluation(small_evaluation(tmp_path / "few", count=9), "small")
    with pytest.raises(InputError, match="9 images are too few for recall at 10"):
        retrieve(few, str(tmp_path), str(tmp_path), str(tmp_path))

    evaluation = read_evaluation(small_evaluation(tmp_path / "set"), "small")
    vectors = np.random.default_rng(0).normal(size=(12, 8))
    write_features(tmp_path, "image", vectors)
    broken = write_features(tmp_path, "text", vectors)
    broken[5] = np.nan
    np.save(tmp_path / "text_emb/text_emb_0.npy", broken)
    with pytest.raises(InputError, match=r"text_emb_0\.npy: 1 of 12 features are NaN"):
        retrieve(evaluation, str(tmp_path), str(tmp_path), str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*"))

    write_features(tmp_path, "text", vectors[:11])
    with pytest.raises(InputError, match=r"text_emb_0\.npy: 11 rows, but the evaluation has 12"):
        retrieve(evaluation, str(tmp_path), str(tmp_path), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nonsense", r"p\.jsonl:1: expected"),
        ('{"text_id": "0", "image_ids": []}', r"p\.jsonl:1: expected"),
        (
            '{"text_id": 0, "image_ids": [100, 100, 101, 102, 103, 104, 105, 106, 107, 108]}',
            "10 with 9 distinct",
        ),
        ('{"text_id": 0, "image_ids": [100]}', "must be 10 distinct ids"),
        (
            '{"text_id": 0, "image_ids": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}',
            "predicts 0, which the set does not hold",
        ),
        ('{"text_id": 99, "image_ids": [100, 101, 102, 103, 104, 105, 106, 107, 108, 109]}', "none of the"),
        (
            '{"text_id": 0, "image_ids": [100, 101, 102, 103, 104, 105, 106, 107, 108, 109]}',
            "11 of 12 queries are missing, first 1",
        ),
    ],
)
def test_bad_prediction_files_are_refused(tmp_path: Path, line: str, expected: str) -> None:
    evaluation = read_evaluation(small_evaluation(tmp_path), "small")
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=expected):
        rank_text_to_image(str(tmp_path / "p.jsonl"), evaluation)


def test_any_of_several_positives_is_a_hit(tmp_path: Path) -> None:
    evaluation = read_evaluation(small_evaluation(tmp_path), "small")
    ids = evaluation.image_ids.tolist()
    predicted = {row: [image_id for image_id in ids if image_id != 100 + row][:10] for row in range(12)}
    predicted[0] = [111, *ids[1:10]]  # text 0 names images 100 and 111
    lines = [json.dumps({"text_id": row, "image_ids": ids}) for row, ids in predicted.items()]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    recall = recall_at_k(rank_text_to_image(str(tmp_path / "p.jsonl"), evaluation))
    assert recall == pytest.approx({"r1": 100 / 12, "r5": 100 / 12, "r10": 100 / 12})

    lines = [json.dumps({"image_id": image_id, "text_ids": list(range(10))}) for image_id in ids]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    recall = recall_at_k(rank_image_to_text(str(tmp_path / "q.jsonl"), evaluation))
    assert recall == pytest.approx({"r1": 200 / 12, "r5": 600 / 12, "r10": 1100 / 12})
