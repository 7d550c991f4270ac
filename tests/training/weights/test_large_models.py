"""The models beyond the paper: sizes as in open_clip, and twins that equal open_clip and transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline.core.records import ConfigError, InputError
from tests.helpers.large_twins import TWINS
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS, ROBERTA_WWM_LARGE
from training.model.tokenizer import SPECIAL_TOKENS
from training.weights.convert import convert
from training.weights.formats import load_model, read_weights
from training.weights.image_tower import load_image_tower
from training.weights.initialise import initialise
from training.weights.sizes import Said, infer_vision
from training.weights.weights import save_checkpoint, state_for_file, tensor_slots

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}


def _peer(name: str) -> Any:
    """open_clip's own code on a twin's sizes, in evaluation mode, and its configuration."""
    twin, large = TWINS[name], open_clip.get_model_config(name)
    vision: Any = twin.vision
    cfg = large["vision_cfg"] | {"image_size": 32, "patch_size": 8, "layers": 2, "width": vision.width}
    model = {"embed_dim": twin.embed_dim, "vision_cfg": cfg, "text_cfg": TEXT}
    torch.manual_seed(7)
    peer = open_clip.model.CLIP(**model).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return peer, model


@pytest.mark.parametrize("name", TWINS)
def test_the_catalogue_has_open_clips_sizes(name: str) -> None:
    large, ours = open_clip.get_model_config(name), MODELS[name]
    assert (ours.embed_dim, ours.text) == (large["embed_dim"], ROBERTA_WWM_LARGE)
    with torch.device("meta"):
        tower = open_clip.model._build_vision_tower(
            large["embed_dim"], open_clip.CLIPVisionCfg(**large["vision_cfg"])
        )
        slots = {
            slot: found.to_file(found.target)
            for slot, found in tensor_slots(CLIP(ours)).items()
            if slot.startswith("visual.")
        }
    theirs = {f"visual.{key}": tensor for key, tensor in tower.state_dict().items()}
    assert {key: tensor.shape for key, tensor in theirs.items()} == {
        key: tensor.shape for key, tensor in slots.items()
    }
    assert infer_vision(slots, "file") == ours.vision  # heads and activation too, which no shape shows
    assert large["vision_cfg"]["head_width"] * ours.vision.heads == ours.vision.width


@pytest.mark.parametrize("name", TWINS)
def test_open_clips_weights_give_open_clips_features(name: str, tmp_path: Path) -> None:
    peer, cfg = _peer(name)
    image_BCHW = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = F.normalize(peer.encode_image(image_BCHW), dim=-1)
    torch.save(peer.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    model = build_clip(TWINS[name]).eval()
    outcomes = initialise(model, image_weights=str(tmp_path))
    assert {item.outcome for item in outcomes if item.tensor.startswith("visual.")} == {"taken"}
    tower = load_image_tower(str(tmp_path), activation="gelu")
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image_BCHW), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(tower.encode(image_BCHW), expected, atol=1e-6, rtol=0)
    assert model.logit_scale.item() == pytest.approx(peer.logit_scale.item())


@pytest.mark.parametrize("out", ["folder", "a.safetensors"])
def test_a_twin_survives_conversion_and_transformers_computes_the_same(out: str, tmp_path: Path) -> None:
    twin = TWINS["ViT-bigG-14"]
    torch.manual_seed(3)
    model = build_clip(twin).eval()
    source = str(tmp_path / "model.safetensors")
    save_checkpoint(source, model, model.config, {})
    words = [*SPECIAL_TOKENS, *(f"[unused{number}]" for number in range(5, twin.text.vocab_size))]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    target = str(tmp_path / out)
    convert(source, target, vocabulary=str(tmp_path / "vocab.txt"))
    back = str(tmp_path / "back.safetensors")
    convert(target, back, vocabulary=str(tmp_path / "vocab.txt"))
    again = load_model(back)
    assert dataclasses.replace(again.config, name=twin.name) == twin
    ours = state_for_file(model)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in state_for_file(again).items())
    if out == "folder":
        from transformers import ChineseCLIPModel

        peer = ChineseCLIPModel.from_pretrained(target).eval()
        image_BCHW, tokens_BL = torch.randn(2, 3, 32, 32), torch.tensor([[2, 5, 6, 3], [2, 9, 3, 0]])
        with torch.no_grad():
            theirs = peer(input_ids=tokens_BL, pixel_values=image_BCHW, attention_mask=tokens_BL.ne(0).long())
            image_BD, text_BD = again(image_BCHW, tokens_BL)
        torch.testing.assert_close(image_BD, theirs.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(text_BD, theirs.text_embeds, atol=1e-5, rtol=0)


def test_cn_clips_format_cannot_hold_it(tmp_path: Path) -> None:
    twin = TWINS["ViT-g-14"]
    source = str(tmp_path / "model.safetensors")
    save_checkpoint(source, build_clip(twin), twin, {})
    with pytest.raises(
        ConfigError, match=r"a\.pt: cn_clip's ViT has QuickGELU and feed-forward layers of 704, but twin-"
    ):
        convert(source, str(tmp_path / "a.pt"))


def test_a_tower_of_gelu_is_not_run_with_quick_gelu(tmp_path: Path) -> None:
    """A lone file of a size that is only known with GELU."""
    with torch.device("meta"):
        slots = tensor_slots(CLIP(MODELS["ViT-g-14"]))
    shapes = {name: slot.to_file(slot.target) for name, slot in slots.items()}
    assert infer_vision(shapes, "file", Said(activation="quick_gelu")) != MODELS["ViT-g-14"].vision
    path = str(tmp_path / "image.safetensors")
    known = dict(MODELS)
    try:
        MODELS["twin"] = TWINS["ViT-g-14"]
        model = build_clip(TWINS["ViT-g-14"])
        state = {name: value for name, value in state_for_file(model).items() if name.startswith("visual.")}
        torch.save(state, path)
        assert read_weights(path).said.activation is None
        with pytest.raises(
            InputError, match="the only known image tower of its size has gelu, not quick_gelu"
        ):
            load_image_tower(path)
        assert load_image_tower(path, activation="gelu").embed_dim == 48
    finally:
        MODELS.clear()
        MODELS.update(known)
