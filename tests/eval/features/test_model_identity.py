"""A model's identity: of the weights, whatever their format; an index of another model is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from eval.datasets.cnclip_tsv import read_evaluation
from eval.features.encoder import ModelSource, load_encoder
from eval.features.evaluation_set import embed_evaluation
from eval.features.model_identity import ModelIdentity, check_same_model, identify, read_identity
from eval.index.flat import build_index
from eval.index.partitioned import PartedIndex
from eval.retrieval.predictions import retrieve
from pipeline import cli as command_line
from pipeline.core.records import InputError
from tests.helpers.evaluation_files import png_bytes, small_evaluation, write_shards
from tests.helpers.tiny_model import write_tiny_model
from training.weights.formats import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    for seed in (0, 1):
        (folder / f"model{seed}").mkdir()
        write_tiny_model(folder / f"model{seed}", seed=seed)
    write_shards(folder / "shards", [(png_bytes(row), f"第{row}张图片") for row in range(12)], per_shard=12)
    for seed in (0, 1):
        words = ["--shards", str(folder / "shards"), "--out", str(folder / f"features{seed}")]
        assert command_line.main(["embed", *model(folder, seed), *words]) == 0
    assert command_line.main(["index", str(folder / "features0"), str(folder / "index0")]) == 0
    return folder


def model(folder: Path, seed: int) -> list[str]:
    return [str(folder / f"model{seed}" / "model.safetensors"), "--vocab", str(folder / f"model{seed}")]


def test_the_same_weights_in_another_format_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    weights = model(folder, 0)[0]
    own = identify(load_model(weights))
    for out in ("other.pt", "hugging_face"):
        command = ["convert", weights, str(tmp_path / out), "--vocab", str(folder / "model0")]
        assert command_line.main(command) == 0
        assert identify(load_model(str(tmp_path / out))).weights_sha256 == own.weights_sha256
    assert identify(load_model(model(folder, 1)[0])) != own


def test_an_index_says_whose_features_it_holds(folder: Path) -> None:
    own = identify(load_model(model(folder, 0)[0]))
    assert json.loads((folder / "index0" / "index.json").read_text())["model"] == {
        "name": "tiny-vit",
        "weights_sha256": own.weights_sha256,
        "decode": "upright",
    }
    assert PartedIndex.open(str(folder / "index0")).model == own
    assert read_identity(str(folder / "features0" / "img_emb" / "img_emb_0.npy")) == own


def test_serve_refuses_an_index_of_another_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--index", str(folder / "index0"), "--embeddings", str(folder / "features0")]
    words += ["--images", str(folder / "shards"), "--port", "0"]
    assert command_line.main(["serve", *model(folder, 1), *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "index0: of the model tiny-vit" in error


def test_bench_index_refuses_queries_of_another_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = str(folder / "features1" / "text_emb" / "text_emb_0.npy")
    words = ["bench-index", str(folder / "features0"), "--grid", "Flat", "--k", "3", "--rounds", "2"]
    words += ["--queries"]
    assert command_line.main([*words, queries]) == 1
    assert "features of two models cannot be compared" in capsys.readouterr().err
    assert command_line.main([*words, queries.replace("features1", "features0")]) == 0


def test_retrieval_refuses_an_index_of_another_model_and_of_another_width(
    folder: Path, tmp_path: Path
) -> None:
    evaluation = read_evaluation(small_evaluation(tmp_path / "set"), "small")
    for seed in (0, 1):
        out = tmp_path / f"out{seed}"
        source = ModelSource(model(folder, seed)[0], str(folder / f"model{seed}"), 52)
        embed_evaluation(load_encoder(source), evaluation, str(out))
        for side, name in (("image", "img_emb"), ("text", "text_emb")):
            build_index(str(out / name / f"{name}_0.npy"), str(out / f"{side}.index"))
    features, other = str(tmp_path / "out0"), str(tmp_path / "out1")
    retrieve(evaluation, features, features, str(tmp_path / "scores"))
    with pytest.raises(InputError, match=r"out1: of the model tiny-vit .*, but this is tiny-vit"):
        retrieve(evaluation, features, other, str(tmp_path / "scores"))
    (tmp_path / "out1" / "model.json").unlink()
    np.save(tmp_path / "narrow.npy", np.eye(12, 16, dtype=np.float32))
    build_index(str(tmp_path / "narrow.npy"), str(tmp_path / "out1" / "image.index"))
    with pytest.raises(InputError, match="an index of width 16"):
        retrieve(evaluation, features, other, str(tmp_path / "scores"))


def test_features_of_another_decoding_are_another_model_s() -> None:
    own = ModelIdentity("tiny-vit", "0" * 64, "upright")
    with pytest.raises(InputError, match=r"decoded as `--decode reference` does, .* embed and index again"):
        check_same_model("index", dataclasses.replace(own, decode="reference"), own)
    check_same_model("index", own, own)
    check_same_model("index", dataclasses.replace(own, decode=""), own)  # made before it was kept
