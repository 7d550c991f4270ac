"""Embedding with a tiny model: its files, the validator agrees with them, and what stays untouched."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from eval.datasets.cnclip_tsv import read_evaluation
from eval.features import evaluation_set as embed
from eval.features.encoder import EvaluationEncoder, ModelSource, load_encoder
from eval.features.evaluation_set import embed_evaluation, validator
from eval.index.flat import build_index
from eval.retrieval.predictions import retrieve
from pipeline.core.records import InputError
from tests.helpers.evaluation_files import png_bytes, small_evaluation, write_evaluation
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS
from training.model.preprocess import preprocess
from training.model.tokenizer import Tokenizer, learn_vocabulary
from training.weights.weights import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a vocabulary and an evaluation with more rows than one batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("embed")
    small_evaluation(folder, count=30)
    vocabulary = learn_vocabulary(["第零一二三四五六七八九张图片0123456789"] * 2, 200)
    tokenizer = Tokenizer(vocabulary)
    tokenizer.save_vocabulary(str(folder / "vocab.txt"))
    config = MODELS["tiny-vit"]
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size)
    )
    save_checkpoint(str(folder / "model.safetensors"), build_clip(config), config, {})
    return folder


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.load(str(folder / "vocab.txt"))


def encoder_of(folder: Path, batch_size: int = 64) -> EvaluationEncoder:
    source = ModelSource(str(folder / "model.safetensors"), str(folder / "vocab.txt"), 52)
    return load_encoder(source, batch_size=batch_size)


def model_of(folder: Path) -> CLIP:
    return load_checkpoint(str(folder / "model.safetensors"))


def test_layout_rows_and_indices(folder: Path, tmp_path: Path) -> None:
    evaluation = read_evaluation(str(folder), "small")
    images, texts = embed_evaluation(encoder_of(folder, batch_size=8), evaluation, str(tmp_path))
    vectors = np.load(tmp_path / "img_emb/img_emb_0.npy")
    assert vectors.dtype == np.float32
    assert vectors.shape == (30, images.dim) == (images.num_rows, MODELS["tiny-vit"].embed_dim)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    metadata = pq.read_table(tmp_path / "metadata/metadata_0.parquet").to_pydict()
    assert metadata["image_id"] == evaluation.image_ids.tolist()
    assert metadata["caption"][29] == "第零张图片"  # its first text by id, not "第29张图片"
    assert pq.read_table(texts.ids).to_pydict()["caption"] == list(evaluation.texts)
    assert images.model_digest == texts.model_digest
    assert images.preprocessing_digest != texts.preprocessing_digest


def test_validator_gives_the_numbers_of_the_prediction_files(folder: Path, tmp_path: Path) -> None:
    evaluation = read_evaluation(str(folder), "small")
    embed_evaluation(encoder_of(folder), evaluation, str(tmp_path))
    for side, vectors in (("image", "img_emb/img_emb_0.npy"), ("text", "text_emb/text_emb_0.npy")):
        build_index(str(tmp_path / vectors), str(tmp_path / "indices" / f"{side}.index"))
    from_files = retrieve(evaluation, str(tmp_path), str(tmp_path / "indices"), str(tmp_path / "out")).scores
    validate = validator({"small": str(folder)}, tokenizer_of(folder))
    model = model_of(folder)
    assert validate(model) == {"small": from_files}
    assert validate(model) == {"small": from_files}  # now from the images kept in memory


def test_muge_is_validated_text_to_image_only(folder: Path, tmp_path: Path) -> None:
    for name in ("muge-valid", "other"):
        small_evaluation(tmp_path, name)
    found = validator(dict.fromkeys(("muge-valid", "other"), str(tmp_path)), tokenizer_of(folder))(
        model_of(folder)
    )
    t2i = found["other"]["t2i"]
    assert found["muge-valid"] == {"t2i": t2i, "i2t": None, "mean_recall": sum(t2i.values()) / 3}
    assert found["other"]["i2t"] is not None


def test_validator_leaves_modes_weights_and_random_numbers_alone(folder: Path) -> None:
    model = model_of(folder)
    model.train()
    model.visual.eval()  # as a locked image tower
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    validator({"small": str(folder)}, tokenizer_of(folder))(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_images_kept_as_uint8_come_back_bit_for_bit() -> None:
    image_BCHW = preprocess([png_bytes(seed, 37) for seed in range(4)], 32)
    pixels = embed._to_uint8(image_BCHW)
    assert pixels.dtype == np.uint8
    assert torch.equal(embed._from_uint8(pixels, torch.device("cpu")), image_BCHW)


def test_a_model_that_diverged_and_a_broken_image_are_named(folder: Path, tmp_path: Path) -> None:
    model = model_of(folder)
    with torch.no_grad():
        model.text_projection.fill_(float("nan"))
    with pytest.raises(InputError, match="evaluation `small`, texts: 30 of 30 features are NaN"):
        validator({"small": str(folder)}, tokenizer_of(folder))(model)

    images = {row: png_bytes(row) for row in range(12)} | {7: b"<html>not found</html>"}
    write_evaluation(tmp_path, "bad", images, [(row, "图片", [row]) for row in range(12)])
    with pytest.raises(InputError, match=r"bad_imgs\.tsv: image 7: "):
        embed_evaluation(encoder_of(folder), read_evaluation(str(tmp_path), "bad"), str(tmp_path / "out"))


def test_validator_refuses_a_bad_set_before_training(folder: Path, tmp_path: Path) -> None:
    small_evaluation(tmp_path, count=4)
    with pytest.raises(InputError, match="4 images are too few"):
        validator({"small": str(tmp_path)}, tokenizer_of(folder))
