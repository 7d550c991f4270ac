"""Weights out, read by their owners' code, and back again bit for bit."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli import main
from pipeline.core.records import ConfigError
from tests.helpers.json_documents import check_keys
from training.encoder import load
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS
from training.model.preprocess import preprocess
from training.model.tokenizer import SPECIAL_TOKENS, Tokenizer, hugging_face_tokenizer
from training.weights.convert import convert, inspect, target_of
from training.weights.formats import load_model, read_weights
from training.weights.model_card import facts_of, model_card
from training.weights.weights import save_checkpoint, state_for_file

WORDS = [*SPECIAL_TOKENS, *"红蓝黄绿色的猫狗鸟圆方形一二三", *"abcdefghijklmnopqrstuvwxyz0123456789,.!\"'"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
CAPTIONS = ["一只红色的猫", "“蓝色”的狗！", "Big RED cat 12", "", "\U0002b820猫a" * 8]


def _source(folder: Path, name: str, image_size_px: int | None = None) -> tuple[CLIP, str]:
    """A checkpoint of ours with its vocabulary next to it."""
    torch.manual_seed(0)
    config = MODELS[name]
    if image_size_px is not None:
        config = replace(config, vision=replace(config.vision, image_size_px=image_size_px))
    model = build_clip(config, vocab_size=len(WORDS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.01 * torch.randn_like(parameter)).half().float())
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"stage": "stage2", "samples_seen": "1234"}
    save_checkpoint(str(folder / "model.safetensors"), model, model.config, metadata)
    Tokenizer(WORDS).save_vocabulary(str(folder / "vocab.txt"))
    return model, str(folder / "model.safetensors")


def _same(one: CLIP, other: CLIP) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("name", "out"), [
    ("tiny-vit", "a.pt"), ("tiny-rn", "a.pt"), ("tiny-vit", "folder"), ("tiny-rn", "folder"),
    ("tiny-vit", "a.safetensors"), ("tiny-rn", "a.safetensors"),
])  # fmt: skip
def test_there_and_back_again_is_bit_exact(name: str, out: str, tmp_path: Path) -> None:
    model, source = _source(tmp_path / "in", name)
    path, back = str(tmp_path / out), str(tmp_path / "back.safetensors")
    said = "\n".join(convert(source, path))
    assert ("cn_clip's image features differ: of 48 px" in said) == ((name, out) == ("tiny-rn", "a.pt"))
    assert _same(load_model(path), model)
    convert(path, back)
    loaded = load_model(back)
    assert _same(loaded, model)
    assert loaded.config == model.config
    first = read_weights(path).state
    convert(source, path)
    assert all(torch.equal(value, first[key]) for key, value in read_weights(path).state.items())


def test_the_pt_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    _, source = _source(tmp_path / "in", "tiny-vit")
    convert(source, str(tmp_path / "one.pt"))
    convert(source, str(tmp_path / "two.pt"))
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_cn_clips_class_takes_the_pt(name: str, tmp_path: Path) -> None:
    pytest.importorskip("cn_clip.clip", reason="cn_clip is not installed")
    from tests.helpers.peer_models import cn_clip_of

    model, source = _source(tmp_path / "in", name, image_size_px=64)  # whole cells of 32 pixels
    convert(source, str(tmp_path / "out.pt"))
    checkpoint = torch.load(tmp_path / "out.pt", weights_only=True)
    state = checkpoint["state_dict"]
    assert next(iter(state)).startswith("module.")  # as its create_model asks
    reference = cn_clip_of(model.config, 9)
    reference.load_state_dict({key[len("module.") :]: value for key, value in state.items()})
    side = model.config.vision.image_size_px
    image_BCHW, tokens_BL = torch.randn(2, 3, side, side), torch.tensor([[2, 5, 6, 3], [2, 9, 3, 0]])
    with torch.no_grad():
        image_BD, text_BD, scale = reference(image_BCHW, tokens_BL)
        ours = model(image_BCHW, tokens_BL)
    torch.testing.assert_close(ours[0], image_BD, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], text_BD, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logit_scale.exp()[0], scale)


def test_transformers_loads_the_folder_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ChineseCLIPModel, ChineseCLIPProcessor

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, source = _source(tmp_path / "in", "tiny-vit")
    folder = tmp_path / "hf"
    lines = convert(source, str(folder))
    peer, info = ChineseCLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor: Any = ChineseCLIPProcessor.from_pretrained(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    inputs = processor(
        text=CAPTIONS,
        images=[picture],
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=20,
    )
    tokens_NL = Tokenizer(WORDS).encode(CAPTIONS, 20)
    assert inputs["input_ids"].tolist() == tokens_NL.tolist()
    picture.save(tmp_path / "p.png")
    pixels = preprocess([(tmp_path / "p.png").read_bytes()], 32)
    assert inputs["pixel_values"].shape == pixels.shape  # the whole picture, squashed
    # torchvision's uint8 bicubic against Pillow's: a few grey levels on noise
    assert (inputs["pixel_values"] - pixels).abs().mean() < 0.05
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card
    assert 'backend="pil"' in card
    assert 'backend="pil"' in lines[-1]
    exact: Any = ChineseCLIPProcessor.from_pretrained(folder, backend="pil")
    theirs_too = exact(images=[picture], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.as_tensor(theirs_too), pixels, atol=1e-6, rtol=0)
    with torch.no_grad():
        theirs = peer.eval()(**{**inputs, "pixel_values": pixels})
        image_BD, text_BD = model(pixels, torch.from_numpy(tokens_NL).long())
    torch.testing.assert_close(image_BD, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_BD, theirs.text_embeds, atol=1e-5, rtol=0)
    assert peer.get_text_features(**{k: inputs[k] for k in ("input_ids", "attention_mask")}) is not None


def test_hugging_face_token_ids_equal_ours_on_many_captions() -> None:
    """All of the usual; what differs by design (private use, unassigned, special tokens) is left out."""
    from tokenizers import Tokenizer as Backend

    generator = random.Random(1)
    characters = "红蓝的猫abcXYZ019 ,.!“”’—é À\t\u3000\U00020001\U0002b821\U0001f600ＡＢ㈱ﬁ"
    texts = ["".join(generator.choices(characters, k=generator.randint(0, 30))) for _ in range(3000)]
    backend = Backend.from_str(hugging_face_tokenizer(Tokenizer(WORDS)))
    ours = Tokenizer(WORDS).encode(texts, 80)
    for row, encoding in zip(ours, backend.encode_batch(texts), strict=True):
        assert row[row != 0].tolist() == encoding.ids


@pytest.mark.parametrize(
    ("name", "stand_beside"), [("tiny-vit", False), pytest.param("tiny-rn", True, marks=pytest.mark.slow)]
)
def test_onnx_of_both_towers_with_free_batch_and_length(
    name: str, stand_beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights beyond protobuf's limit stand in a file beside."""
    runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    if stand_beside:
        monkeypatch.setattr("training.weights.export._ONNX_INLINE_BYTES", 200_000)
    model, source = _source(tmp_path / "in", name)
    lines = convert(source, str(tmp_path / "clip.onnx"))
    assert "under onnxruntime" in lines[-1]
    beside = {path.name: path.stat().st_size for path in tmp_path.glob("*.data")}
    assert set(beside) == ({"clip.image.onnx.data", "clip.text.onnx.data"} if stand_beside else set())
    assert all(size > 200_000 for size in beside.values())
    side = model.config.vision.image_size_px
    generator = torch.Generator().manual_seed(3)
    image_BCHW = torch.randn(5, 3, side, side, generator=generator)
    tokens_BL = torch.randint(1, len(WORDS), (7, 33), generator=generator)
    tokens_BL[2, 2:] = 0
    cases = {"image": (image_BCHW, model.encode_image), "text": (tokens_BL, model.encode_text)}
    for kind, (inputs, encode) in cases.items():
        session = runtime.InferenceSession(tmp_path / f"clip.{kind}.onnx", providers=["CPUExecutionProvider"])
        for batch in (inputs, inputs[:1]):
            (found,) = session.run([f"{kind}_features"], {kind: batch.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(found), encode(batch), atol=1e-4, rtol=0)


def test_model_card_says_what_is_known_and_what_is_not(tmp_path: Path) -> None:
    _, source = _source(tmp_path / "run" / "stage2", "tiny-vit")
    convert(source, str(tmp_path / "out.safetensors"))
    card = (tmp_path / "out.md").read_text()
    assert "library_name: pytorch" in card  # the names in the file are not transformers'
    assert "| Stage | stage2 |" in card
    assert "| Samples seen | 1234 |" in card
    assert "| Data | not recorded" in card
    (tmp_path / "run" / "run.resolved.toml").write_text(
        '[corpus]\nkind = "tables"\n[[corpus.tables]]\nname = "wukong"\n'
    )
    recall = {"r1": 50.0, "r5": 75.0, "r10": 100.0}
    scores = {"t2i": recall, "i2t": recall, "mean_recall": 75.0}
    (tmp_path / "run" / "report").mkdir()
    report = {"evaluations": {"muge": scores, "muge/stage1": {"t2i": {"r1": 1.0, "r5": 2.0, "r10": 3.0}}}}
    (tmp_path / "run" / "report" / "report.json").write_text(json.dumps(report))
    facts = facts_of(source, read_weights(source).facts)
    assert facts["data"] == "tables: wukong"
    assert facts["scores"].startswith("muge: text to image R@1/5/10 50.0/75.0/100.0")
    assert facts_of(source, {"stage": "stage1"})["scores"] == "muge: text to image R@1/5/10 1.0/2.0/3.0"
    assert "muge: text to image" in model_card(MODELS["tiny-vit"], 10, facts)
    assert "Table 12" not in model_card(MODELS["tiny-vit"], 10, facts)  # of the final model, not of this one
    line = {
        "label": "MNIST",
        "ours": {"value": 51.25, "low": 50.0, "high": 52.5},
        "paper": 50.2,
        "difference": {"value": 1.05, "low": -0.2, "high": 2.3},
    }
    table = {"number": 12, "title": "ICinW", "setup": "zero-shot", "paper_model": "CN-CLIP RN50"}
    with_tables = {**report, "comparisons": [{**table, "lines": [line], "notes": ["a note"]}]}
    (tmp_path / "run" / "report" / "report.json").write_text(json.dumps(with_tables))
    card = model_card(MODELS["tiny-vit"], 10, facts_of(source, {"stage": "stage2"}))
    assert "## Table 12, ICinW, zero-shot next to CN-CLIP RN50" in card
    assert "| MNIST | 51.2 | 50.0 … 52.5 | 50.2 | +1.1 |" in card
    assert "Table 12" not in model_card(MODELS["tiny-vit"], 10, facts_of(source, {"stage": "stage1"}))
    convert(source, str(tmp_path / "again"), to="safetensors")
    assert "wukong" in (tmp_path / "again" / "README.md").read_text()
    assert read_weights(str(tmp_path / "again")).facts["data"] == "tables: wukong"


def test_formats_are_chosen_by_name_and_the_source_is_never_overwritten(tmp_path: Path) -> None:
    assert [target_of(out, None) for out in ("a.pt", "a.safetensors", "a.onnx", "a", "a/")] == [
        "cn_clip", "safetensors", "onnx", "hugging_face", "hugging_face",
    ]  # fmt: skip
    assert target_of("a.pt", "onnx") == "onnx"
    _, source = _source(tmp_path / "in", "tiny-vit")
    with pytest.raises(ConfigError, match="is also the input"):
        convert(source, source)


def test_inspect_as_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, source = _source(tmp_path / "in", "tiny-vit")
    assert main(["inspect", source, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    check_keys("inspect", document)
    assert document["path"] == source


def test_inspect_says_what_a_file_is_and_what_it_lacks(tmp_path: Path) -> None:
    model, source = _source(tmp_path / "in", "tiny-vit")
    text = "\n".join(inspect(source))
    assert "checkpoint of this project" in text
    assert "tiny-vit: 32 px, 32 dimensions" in text
    assert "missing     nothing" in text
    assert f"{sum(p.numel() for p in model.parameters()):,} in" in text
    state = state_for_file(model)
    del state["visual.proj"]
    state["text_projection"][0] = float("nan")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "part.pt")
    text = "\n".join(inspect(str(tmp_path / "part.pt")))
    assert "missing     visual.proj" in text
    assert "not finite  text_projection" in text
    assert "epoch       3" in text
    torch.save(
        {name: value for name, value in state.items() if name.startswith("bert.")}, tmp_path / "bert.bin"
    )
    assert "text tower only, as in tiny-vit" in "\n".join(inspect(str(tmp_path / "bert.bin")))


def test_another_resolution(tmp_path: Path) -> None:
    _, source = _source(tmp_path / "in", "tiny-vit")
    convert(source, str(tmp_path / "wide.safetensors"), image_size_px=64)
    assert load(str(tmp_path / "wide.safetensors")).image_size_px == 64


@pytest.mark.slow
def test_cn_clips_own_loader_takes_rn50_at_full_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    utils = pytest.importorskip("cn_clip.clip.utils", reason="cn_clip is not installed")
    torch.manual_seed(0)
    model = build_clip(MODELS["RN50"]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    save_checkpoint(str(tmp_path / "rn50.safetensors"), model, model.config, {})
    convert(str(tmp_path / "rn50.safetensors"), str(tmp_path / "clip_cn_rn50.pt"))
    reference, _ = utils.load_from_name("RN50", device="cpu", download_root=str(tmp_path))
    theirs = reference.state_dict()
    ours = state_for_file(model)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].float(), value.float()) for name, value in ours.items())
