"""The five lines of the README, texts of any length, and where vocabularies are found."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.records import InputError
from tests.helpers.hub_server import Hub
from tests.helpers.tiny_model import write_tiny_model
from training.encoder import Encoder, batches_of_tokens, load
from training.model.tokenizer import SPECIAL_TOKENS, Tokenizer
from training.weights import vocabulary_lookup
from training.weights.vocabulary_lookup import find_vocabulary

WORDS = [*SPECIAL_TOKENS, *"红蓝色的猫狗"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("weights"), words="红蓝色的猫狗")[0]


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def test_the_five_lines_of_the_readme(weights: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        _picture(seed).save(tmp_path / f"{seed}.png")
    model = load(weights)
    images = model.embed_images([str(tmp_path / "0.png"), str(tmp_path / "1.png")])
    texts = model.embed_texts(["红色的猫", "蓝色的狗", "狗"])
    probabilities = model.probabilities(images, texts)
    assert probabilities.shape == (2, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    with torch.no_grad():
        logits = model.model.logit_scale.exp() * torch.from_numpy(images @ texts.T)
    np.testing.assert_allclose(probabilities, logits.softmax(-1).numpy(), atol=1e-6)
    buffer = io.BytesIO()
    _picture(0).save(buffer, "PNG")
    both = model.embed_images([buffer.getvalue(), _picture(0)])
    np.testing.assert_array_equal(both[0], both[1])
    np.testing.assert_allclose(both[0], images[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-6)
    assert model.embed_images([]).shape == (0, 32)
    assert model.embed_texts([]).shape == (0, 32)


def test_texts_of_any_length_equal_padding_to_52(weights: str) -> None:
    model = load(weights)
    texts = ["", "猫" * 50, "红色", "狗" * 7, "蓝色的猫" * 3, "红色", "的" * 20] * 5
    tokens_NL = model.tokenizer.encode(texts, 52)
    tokens_BL = torch.from_numpy(tokens_NL).long()
    with torch.no_grad():
        hidden_BLH = model.model.bert(
            input_ids=tokens_BL, attention_mask=tokens_BL.ne(0).long()
        ).last_hidden_state
        padded = model.model.project_text(hidden_BLH[:, 0]).numpy()
    np.testing.assert_allclose(model.embed_texts(texts), padded, atol=1e-6, rtol=0)


def test_batches_are_about_as_many_tokens_and_hold_every_row_once() -> None:
    generator = np.random.default_rng(0)
    length_N = generator.integers(2, 53, 3000)
    tokens_NL = np.where(np.arange(52) < length_N[:, None], 5, 0).astype(np.int32)
    batches = batches_of_tokens(tokens_NL, 2048)
    assert sorted(np.concatenate(batches)) == list(range(3000))
    sizes = [int(length_N[rows].sum()) for rows in batches]
    assert all(2048 - 52 < size < 2048 + 52 for size in sizes[:-1])
    assert np.all(np.diff(np.concatenate([length_N[rows] for rows in batches])) >= 0)
    assert batches_of_tokens(tokens_NL[:0], 2048) == []


def test_longer_texts_are_counted_and_longer_contexts_work(weights: str) -> None:
    model = load(weights)
    texts = ["猫" * 50, "猫" * 51, "狗" * 200]
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than 52 tokens and were truncated"):
        cut = model.embed_texts(texts)
    np.testing.assert_array_equal(cut[0], cut[1])
    with pytest.warns(UserWarning, match="1 of 3 texts are longer than 64"):
        longer = model.embed_texts(texts, context_length=64)
    assert np.abs(longer[0] - longer[1]).max() > 1e-4
    with pytest.raises(ValueError, match="this model takes 3 to 64 tokens"):
        model.embed_texts(texts, context_length=65)


def test_pictures_that_cannot_be_read_are_named(weights: str, tmp_path: Path) -> None:
    model = load(weights)
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    _picture(0).save(tmp_path / "good.png")
    with pytest.raises(InputError, match=r"bad\.jpg: no image that can be decoded"):
        model.embed_images([str(tmp_path / "good.png"), str(tmp_path / "bad.jpg")])
    with pytest.raises(InputError, match=r"absent\.jpg: no image that can be decoded: no_file: no such file"):
        model.embed_images([str(tmp_path / "absent.jpg")])


# Where vocabularies are found


def _no_network(monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    import huggingface_hub

    def download(model_id: str, name: str) -> str:
        asked.append(model_id)
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_vocabulary_beside_the_weights_or_given(weights: str, tmp_path: Path) -> None:
    assert find_vocabulary(weights, len(WORDS)).vocabulary == tuple(WORDS)
    assert find_vocabulary(str(Path(weights).parent), len(WORDS)).vocabulary == tuple(WORDS)
    swapped = [*SPECIAL_TOKENS, *"狗猫的色蓝红"]
    Tokenizer(swapped).save_vocabulary(str(tmp_path / "other.txt"))
    assert find_vocabulary(weights, len(WORDS), given=str(tmp_path / "other.txt")).vocabulary == tuple(
        swapped
    )
    named = tmp_path / "x.pt"
    Tokenizer(swapped).save_vocabulary(str(tmp_path / "x.vocab.txt"))
    assert find_vocabulary(str(named), len(WORDS)).vocabulary == tuple(swapped)


def test_vocabulary_of_the_run_that_trained_the_weights(tmp_path: Path) -> None:
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "job.json").write_text(json.dumps({"vocabulary": "/gone/vocabulary/caption.txt"}))
    Tokenizer(WORDS).save_vocabulary(str(tmp_path / "vocabulary" / "caption.txt"))
    found = find_vocabulary(str(tmp_path / "stage2" / "model.safetensors"), len(WORDS))
    assert found.vocabulary == tuple(WORDS)


def test_vocabulary_in_the_hub_cache_and_in_cn_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_network(monkeypatch, [])
    weights = str(tmp_path / "model.pt")
    package = tmp_path / "site" / "cn_clip" / "clip"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    Tokenizer([*WORDS, "鸟"]).save_vocabulary(str(package / "vocab.txt"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "cn_clip", raising=False)
    assert find_vocabulary(weights, len(WORDS) + 1).vocabulary[-1] == "鸟"
    cached = tmp_path / "cached.txt"
    Tokenizer(WORDS).save_vocabulary(str(cached))
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda source, name: str(cached) if source == "hfl/chinese-roberta-wwm-ext" else None,
    )
    assert find_vocabulary(weights, len(WORDS)).vocabulary == tuple(WORDS)


def test_a_vocabulary_found_nowhere_names_the_four_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.setattr(vocabulary_lookup, "_in_cn_clip", lambda: None)
    with pytest.raises(InputError) as caught:
        find_vocabulary(str(tmp_path / "model.pt"), 21128)
    message = str(caught.value)
    for place in (
        "next to the weights",
        "--vocab",
        "bert-base-chinese",
        "hfl/chinese-roberta-wwm-ext",
        "cn_clip",
    ):
        assert place in message
    paths = [path for _, path, _ in hub.requests if path.startswith("/api/models/")]
    asked = [path.removeprefix("/api/models/").partition("/revision/")[0] for path in paths]
    assert asked == ["bert-base-chinese", "hfl/chinese-roberta-wwm-ext"]
    assert "\n" not in message


def test_a_vocabulary_of_another_size_is_refused(weights: str) -> None:
    with pytest.raises(
        InputError, match=r"vocab\.txt: a vocabulary of 11 tokens, but the embedding in .* has 21128"
    ):
        find_vocabulary(weights, 21128)
    model = load(weights).model
    with pytest.raises(InputError, match="a vocabulary of 12 tokens, but the model's embedding has 11"):
        Encoder(model, Tokenizer([*WORDS, "鸟"]))
