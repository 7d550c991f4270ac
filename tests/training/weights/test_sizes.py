"""A model's sizes from its files: the file must give what shapes do not show."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.core.records import InputError
from training.model.clip import CLIP
from training.model.config import MODELS, ModelConfig
from training.model.tokenizer import SPECIAL_TOKENS
from training.weights.convert import convert, inspect
from training.weights.export import save_cn_clip
from training.weights.formats import load_model, read_weights, resized
from training.weights.image_tower import load_image_tower
from training.weights.initialise import initialise
from training.weights.said import read_said
from training.weights.sizes import Said, infer_config
from training.weights.weights import save_checkpoint, state_for_file, tensor_slots


def _model(config: ModelConfig) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # so that another number of heads is seen in the features
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model


def _shapes(config: ModelConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return {name: slot.to_file(slot.target) for name, slot in tensor_slots(CLIP(config)).items()}


def _features(model: CLIP, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image_BCHW = torch.randn(2, 3, side, side, generator=generator)
    with torch.no_grad():
        image_BD, text_BD = model(image_BCHW, torch.tensor([[2, 5, 6, 3], [2, 9, 3, 0]]))
    return image_BD, text_BD


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("RN50", 288), ("ViT-B-32", 384), ("ViT-B-16", 384), ("ViT-L-14", 280), ("ViT-L-14-336", 224),
        ("ViT-H-14", 336), ("ViT-H-14", 224), ("tiny-vit", 64), ("tiny-rn", 96),
    ],
)  # fmt: skip
def test_another_resolution_leaves_the_towers_as_they_are(name: str, side: int) -> None:
    true = resized(MODELS[name], side, "larger")
    seen = infer_config(_shapes(true), "larger")
    assert dataclasses.replace(seen, name=name) == true
    assert infer_config(_shapes(true), "larger", Said(name=f"{name}@any")) == true


@pytest.mark.parametrize(("name", "side"), [("tiny-vit", 64), ("tiny-rn", 96), ("tiny-rn", 32)])
@pytest.mark.parametrize("out", ["a.pt", "a.safetensors", "folder"])
def test_converted_at_another_resolution_and_read_again(
    name: str, side: int, out: str, tmp_path: Path
) -> None:
    source, model = str(tmp_path / "source.pt"), _model(MODELS[name])
    save_cn_clip(source, model)
    words = [*SPECIAL_TOKENS, *(f"[unused{number}]" for number in range(5, model.config.text.vocab_size))]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    convert(source, str(tmp_path / out), image_size_px=side, vocabulary=str(tmp_path / "vocab.txt"))
    larger, again = load_model(source, image_size_px=side), load_model(str(tmp_path / out))
    assert again.config.vision == larger.config.vision
    assert again.config.text.heads == model.config.text.heads
    for ours, theirs in zip(_features(again, side), _features(larger, side), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def _custom(heads: int = 2, text_heads: int = 4) -> ModelConfig:
    """A model that is no known one."""
    tiny: Any = MODELS["tiny-vit"]
    vision = dataclasses.replace(tiny.vision, width=96, layers=3, heads=heads)
    text = dataclasses.replace(tiny.text, width=96, layers=3, heads=text_heads)
    return dataclasses.replace(tiny, name="custom", vision=vision, text=text)


def test_heads_that_nothing_says_are_refused_and_never_guessed(tmp_path: Path) -> None:
    model = _model(_custom())
    torch.save({"state_dict": state_for_file(model)}, tmp_path / "a.pt")
    with pytest.raises(
        InputError, match=r"a\.pt: the number of attention heads of its image tower is unknown"
    ):
        load_model(str(tmp_path / "a.pt"))
    save_cn_clip(str(tmp_path / "b.pt"), model)
    save_checkpoint(str(tmp_path / "b.safetensors"), model, model.config, {})
    for name in ("b.pt", "b.safetensors"):
        assert load_model(str(tmp_path / name)).config == model.config


def test_two_models_of_one_size_are_told_apart_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny: Any = MODELS["tiny-vit"]
    other = dataclasses.replace(
        tiny, name="tiny-vit-4", vision=dataclasses.replace(tiny.vision, heads=4, image_size_px=64)
    )
    monkeypatch.setitem(MODELS, "tiny-vit-4", other)
    for config in (tiny, other):
        state = state_for_file(_model(config))
        torch.save({"name": config.name, "state_dict": state}, tmp_path / "named.pt")
        assert load_model(str(tmp_path / "named.pt")).config == config
        torch.save({"state_dict": state}, tmp_path / "nameless.pt")
        with pytest.raises(InputError, match="known models of this size have 2 or 4"):
            load_model(str(tmp_path / "nameless.pt"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_config": {"num_attention_heads": -2}}, "num_attention_heads is -2"),
        ({"vision_config": {"num_attention_heads": "2"}}, "num_attention_heads is 2, which is not a number"),
        (
            {"vision_config": {}},
            "its image tower has width 64, but the configuration next to it is of one of",
        ),
        (
            {"vision_config": {"hidden_size": 64}},
            "num_attention_heads is absent, and its default of 12 is that",
        ),
        ({"text_config": {"hidden_size": 1024}}, "text_config.num_attention_heads is absent"),
        ({"vision_config": False}, "vision_config is not an object"),
        ({"vision_config_dict": [2]}, "vision_config_dict is not an object"),
        ({"text_config": {"num_attention_heads": 2, "hidden_act": "gelu_new"}}, "text_config.hidden_act is"),
        ({"text_config": [1]}, "text_config is not an object"),
        ({"vision_config": {"layer_norm_eps": 1e-6, "num_attention_heads": 2}}, "layer_norm_eps is"),
    ],
)
def test_a_configuration_that_cannot_be_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    from training.weights.layouts import to_hugging_face

    save_file(to_hugging_face(state_for_file(_model(MODELS["tiny-vit"]))), tmp_path / "model.safetensors")
    heads = {"num_attention_heads": 2}
    settings = {"model_type": "chinese_clip", "vision_config": heads, "text_config": heads, **change}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"config\.json|model\.safetensors") as caught:
        load_model(str(tmp_path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"vision_config": {}, "text_config": {}},
        {"text_config": {"hidden_size": 768}},
        {"vision_config": {"num_attention_heads": 16, "hidden_size": 1024}},
        {"vision_config": {"num_attention_heads": 8}, "vision_config_dict": {"num_attention_heads": 16}},
        {"vision_config": {"num_attention_heads": 8}, "vision_config_dict": {}},
        {"vision_config": {"num_attention_heads": 8}, "vision_config_dict": None},
        {"text_config_dict": {"num_attention_heads": 6}, "text_config": {"num_attention_heads": 12}},
    ],
)
def test_heads_are_those_that_transformers_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    from transformers import ChineseCLIPConfig

    wanted = ChineseCLIPConfig(**json.loads(json.dumps(settings)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chinese_clip", **settings}))
    said = read_said(str(tmp_path), ["config.json"])
    heads = [
        getattr(tower, "num_attention_heads", None) for tower in (wanted.vision_config, wanted.text_config)
    ]
    assert [said.image_heads, said.text_heads] == heads


def test_an_open_clip_width_that_its_heads_do_not_divide_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "open_clip_config.json"
    for vision, heads in (({"width": 1280, "head_width": 80}, 16), ({"width": 768}, 12)):
        path.write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
        assert read_said(str(tmp_path), [path.name]).image_heads == heads
    path.write_text(json.dumps({"model_cfg": {"vision_cfg": {"width": 1000}}}))
    with pytest.raises(InputError, match=r"open_clip_config\.json: head_width 64 does not divide width 1000"):
        read_said(str(tmp_path), [path.name])


def test_heads_of_a_configuration_hold_for_image_towers_too(tmp_path: Path) -> None:
    """A ViT-H/14 of OpenCLIP at another resolution; another tower's heads are refused as a start."""
    tiny: Any = MODELS["tiny-vit"]
    model = _model(tiny)
    state = {name: value for name, value in state_for_file(model).items() if name.startswith("visual.")}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    four = load_image_tower(str(tmp_path), activation="gelu")
    two = load_image_tower(str(tmp_path / "open_clip_model.safetensors"), activation="gelu")
    image_BCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert not np.allclose(four.encode(image_BCHW), two.encode(image_BCHW), atol=1e-3)
    with pytest.raises(InputError, match="has 4 attention heads, but tiny-vit's image tower has 2"):
        initialise(CLIP(tiny), image_weights=str(tmp_path))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_temperature_of_any_shape_is_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    state = state_for_file(_model(MODELS["tiny-vit"]))
    state["logit_scale"] = torch.full(shape, 3.0)
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    assert load_model(str(tmp_path / "a.pt")).logit_scale.item() == 3.0


def test_a_temperature_above_the_clamp_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pt"
    state = state_for_file(_model(MODELS["tiny-vit"]))
    for value, said in ((4.6052, ""), (7.0, "logit_scale is 7, a factor of 1,097 on cosines")):
        torch.save({"state_dict": {**state, "logit_scale": torch.tensor(value)}}, path)
        assert abs(load_model(str(path)).logit_scale.item() - value) < 1e-6
        error = capsys.readouterr()
        assert (said in error.out + error.err) if said else (error.out + error.err == "")
        assert any(said in line for line in inspect(str(path)))
    torch.save({"state_dict": {**state, "logit_scale": torch.tensor(100.0)}}, path)
    with pytest.raises(InputError, match=r"a\.pt: logit_scale is 100, whose exponential is beyond float32"):
        load_model(str(path))


def test_image_weights_without_a_temperature_start_from_a_known_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = state_for_file(_model(MODELS["tiny-vit"]))
    image = {name: value for name, value in state.items() if name.startswith("visual.")}
    torch.save(image, tmp_path / "image.pt")
    target = CLIP(MODELS["tiny-vit"])
    outcomes = {
        item.tensor: item.outcome for item in initialise(target, image_weights=str(tmp_path / "image.pt"))
    }
    assert outcomes["logit_scale"] == "initialised"
    assert abs(target.logit_scale.item() - np.log(1 / 0.07)) < 1e-6
    said = capsys.readouterr()
    assert "image.pt: holds no logit_scale: the temperature starts from 0.07" in said.out + said.err


def test_a_name_that_says_nothing_of_its_sizes_changes_nothing(tmp_path: Path) -> None:
    model = _model(MODELS["tiny-vit"])
    torch.save({"name": "ViT-H-14@any", "state_dict": state_for_file(model)}, tmp_path / "a.pt")
    assert read_weights(str(tmp_path / "a.pt")).config == model.config
