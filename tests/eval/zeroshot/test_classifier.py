"""Zero-shot classification: ensembles by their definitions, submissions by ELEVATER's rules, the analyses."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from eval.datasets.classification import EncodedImage, read_classification
from eval.datasets.labels import prompts
from eval.features.encoder import EvaluationEncoder, ModelSource, load_encoder
from eval.zeroshot.analyses import NegationPair, negation, prompt_sensitivity, prompts_plot, prompts_table
from eval.zeroshot.classifier import (
    class_vectors,
    classify,
    probabilities,
    scores_of,
    submission_record,
    text_features,
    write_submission,
)
from eval.zeroshot.measure import evaluate_classification
from pipeline import cli as command_line
from pipeline.core.records import InputError
from tests.helpers.classification_files import write_cnclip
from tests.helpers.tiny_model import write_tiny_model

TEMPLATES = ("{}", "{}的照片", "一张{}色的图")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EvaluationEncoder:
    paths = write_tiny_model(tmp_path_factory.mktemp("model"))
    return load_encoder(ModelSource(*paths, context_length=52), batch_size=5)


def test_texts_keep_their_order_over_batches(encoder: EvaluationEncoder) -> None:
    texts = prompts(["红", "绿色的猫狗", "蓝"], TEMPLATES)
    together = encoder.texts(texts)
    alone = np.concatenate([encoder.texts([text]) for text in texts])
    assert np.abs(together - alone).max() < 1e-5
    assert text_features(encoder, ["红", "绿"], TEMPLATES).shape == (2, 3, together.shape[1])


def test_ensembles_by_their_definitions() -> None:
    rng = np.random.default_rng(0)
    text_CTD = rng.normal(size=(4, 5, 8)).astype(np.float32)
    text_CTD /= np.linalg.norm(text_CTD, axis=2, keepdims=True)
    image_ND = rng.normal(size=(6, 8)).astype(np.float32)
    # section 2.1: the mean of the scores of the sentences
    each_NCT = np.einsum("nd,ctd->nct", image_ND, text_CTD)
    assert np.abs(scores_of(image_ND, class_vectors(text_CTD, "scores")) - each_NCT.mean(axis=2)).max() < 1e-5
    # Chinese-CLIP's zero_shot_classifier: mean, then unit length
    mean_CD = text_CTD.mean(axis=1)
    mean_CD /= np.linalg.norm(mean_CD, axis=1, keepdims=True)
    assert np.abs(class_vectors(text_CTD, "features") - mean_CD).max() < 1e-6


def test_templates_that_cancel_out_are_refused() -> None:
    text_CTD = np.array([[[1.0, 0.0], [-1.0, 0.0]]], dtype=np.float32)
    with pytest.raises(InputError, match="cancel out"):
        class_vectors(text_CTD, "features")


def test_probabilities_are_a_softmax() -> None:
    scores_NC = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    found = probabilities(scores_NC, 100.0)
    assert found.sum(axis=1) == pytest.approx(1)
    assert (found.argmax(axis=1) == scores_NC.argmax(axis=1)).all()
    expected = np.exp(100.0 * scores_NC[0].astype(np.float64))
    assert found[0] == pytest.approx(expected / expected.sum())


def test_unreadable_images_are_counted_not_scored(encoder: EvaluationEncoder, tmp_path: Path) -> None:
    root = write_cnclip(tmp_path / "set")
    (root / "test" / "001" / "2.png").write_bytes(b"no image")
    data = read_classification(str(root))
    image_ND, rows_N = encoder.images(data.images)
    assert rows_N.tolist() == [row for row in range(12) if row != 6]
    vectors_CD = class_vectors(text_features(encoder, data.labels.names, TEMPLATES), "features")
    classified = classify(data, image_ND, rows_N, vectors_CD, "accuracy", num_templates=3)
    assert (classified.num_images, classified.num_unreadable) == (11, 1)
    with pytest.raises(InputError, match="1 images cannot be decoded"):
        submission_record(data, classified, encoder)
    with pytest.raises(InputError, match="none of 1 images"):
        encoder.images([EncodedImage(str(root / "test" / "001" / "2.png"))])


def test_submission_follows_index_json_and_the_checker_s_rules(
    encoder: EvaluationEncoder, tmp_path: Path
) -> None:
    root = write_cnclip(tmp_path / "mnist", count=2)
    order = [5, 3, 1, 0, 2, 4]
    (root / "index.json").write_text(json.dumps(order))
    data = read_classification(str(root))
    image_ND, rows_N = encoder.images(data.images)
    vectors_CD = class_vectors(text_features(encoder, data.labels.names, TEMPLATES), "scores")
    classified = classify(data, image_ND, rows_N, vectors_CD, "accuracy", num_templates=3)
    record = submission_record(data, classified, encoder)
    assert list(record) == [
        "model_name", "dataset_name", "num_trainable_params", "num_params", "num_visual_params",
        "num_backbone_params", "n_shot", "rnd_seeds", "predictions",
    ]  # fmt: skip
    found = np.array(record["predictions"])
    assert found.shape == (1, 6, 3)
    assert found[0] == pytest.approx(
        probabilities(classified.scores_NC, encoder.logit_scale)[order], abs=1e-6
    )
    assert record["num_params"] == sum(tensor.numel() for tensor in encoder.base.model.parameters())

    path = tmp_path / "submission.zip"
    write_submission(str(path), [record])
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        assert archive.namelist() == ["all_predictions.json"]
        body = json.loads(archive.read("all_predictions.json"))
    assert body == {"data": [record]}
    first = path.read_bytes()
    write_submission(str(path), [record])
    assert path.read_bytes() == first
    with pytest.raises(InputError, match="each set once"):
        write_submission(str(path), [record, record])
    with pytest.raises(InputError, match="does not sum to 1"):
        write_submission(str(path), [{**record, "predictions": (found * 0.9).tolist()}])


def test_prompt_sensitivity_has_every_template_and_both_ensembles(
    encoder: EvaluationEncoder, tmp_path: Path
) -> None:
    data = read_classification(str(write_cnclip(tmp_path / "mnist")))
    scores = prompt_sensitivity(encoder, data, "accuracy")
    ensembles = [item for item in scores if item.kind == "ensemble"]
    alone = [item for item in scores if item.kind == "template"]
    assert [item.prompt for item in ensembles] == [
        f"{name}, {count} templates, mean of the {how}"
        for name, count in (("general", 80), ("own", 5))
        for how in ("features", "scores")
    ]
    assert len(alone) == 80 + 5
    assert [item.measured.value for item in alone] == sorted(
        (item.measured.value for item in alone), reverse=True
    )
    # one template alone is what `classify` gives for it
    vectors_CD = class_vectors(text_features(encoder, data.labels.names, [alone[0].prompt]), "features")
    image_ND, rows_N = encoder.images(data.images)
    again = classify(data, image_ND, rows_N, vectors_CD, "accuracy", num_templates=1)
    assert again.measured == alone[0].measured
    assert len(prompts_table(scores).splitlines()) == 1 + len(scores)
    short = prompts_table(scores, num_ends=5)
    assert len(short.splitlines()) == 1 + len(ensembles) + 5 + 1 + 5
    assert "… 75 templates between" in short
    assert all(item.prompt in short for item in (*ensembles, *alone[:5], *alone[-5:]))
    assert prompts_plot(scores, "mnist").count("<path") > 3


def test_negation_changes_one_label_alone(encoder: EvaluationEncoder, tmp_path: Path) -> None:
    data = read_classification(str(write_cnclip(tmp_path / "set")))
    pairs = [NegationPair(2, "蓝色", "没有红色"), NegationPair(0, "红色", "红色")]
    changed, same = negation(encoder, data, "accuracy", pairs, ["{}的照片"])
    assert same.plain == same.negated
    vectors_CD = class_vectors(text_features(encoder, ["红色", "绿色", "没有红色"], ["{}的照片"]), "features")
    image_ND, rows_N = encoder.images(data.images)
    expected = classify(data, image_ND, rows_N, vectors_CD, "accuracy", num_templates=1)
    assert changed.negated == expected.measured
    predicted = expected.scores_NC.argmax(axis=1)
    assert changed.negated_recall == pytest.approx(100 * (predicted[8:] == 2).mean())
    with pytest.raises(InputError, match="has no class 3"):
        negation(encoder, data, "accuracy", [NegationPair(3, "a", "b")], ["{}"])


def test_a_set_of_ones_own_says_its_counts(encoder: EvaluationEncoder, tmp_path: Path) -> None:
    own, of_the_paper = (read_classification(str(write_cnclip(tmp_path / name))) for name in ("own", "mnist"))
    found = evaluate_classification(encoder, own, "accuracy")
    assert "own: 12 images of 3 classes" in found.notes
    assert (
        "mnist: 12 images of 3 classes"
        not in evaluate_classification(encoder, of_the_paper, "accuracy").notes
    )


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, vocabulary = write_tiny_model(tmp_path)
    data = write_cnclip(tmp_path / "kitti-distance")
    model = [weights, "--vocab", vocabulary]
    assert command_line.main(["prompts", *model, str(data), "--plot", str(tmp_path / "p.svg")]) == 0
    short = capsys.readouterr().out
    assert "kitti-distance, accuracy, tiny-vit" in short
    assert "templates between" in short
    assert command_line.main(["prompts", *model, str(data), "--all"]) == 0
    every = capsys.readouterr().out
    assert "templates between" not in every
    assert len(every.splitlines()) > len(short.splitlines()) + 60
    assert (tmp_path / "p.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert command_line.main(["negation", *model, str(data), "--pair", "蓝色", "蓝色", "没有红色"]) == 0
    assert "没有红色" in capsys.readouterr().out
    assert command_line.main(["negation", *model, str(data), "--pair", "白色", "a", "b"]) == 2
    assert "--pair 白色: no class with this label" in capsys.readouterr().err
    assert command_line.main(["negation", *model, str(data)]) == 1  # the shipped pair is of a fourth class
    other = tmp_path / "other.txt"
    other.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n猫\n")
    assert command_line.main(["prompts", weights, str(data), "--vocab", str(other)]) == 1
    assert "a vocabulary of 6 tokens" in capsys.readouterr().err
