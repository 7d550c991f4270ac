"""Reads weights of every published format, and the errors for those that do not fit."""

import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.core.records import InputError
from tests.helpers.peer_models import cn_clip_of, hugging_face_model
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS
from training.weights.formats import load_model, read_weights, resize_positions
from training.weights.initialise import initialise, write_provenance
from training.weights.layouts import to_hugging_face
from training.weights.tensor_files import read_tensors
from training.weights.weights import save_checkpoint, state_for_file

VIT, RN = MODELS["tiny-vit"], MODELS["tiny-rn"]


def _model(name: str = "tiny-vit", seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return build_clip(MODELS[name]).eval()


def _same(one: CLIP, other: CLIP) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_chinese_clip_with_and_without_prefix_and_pooler(name: str, prefix: str, tmp_path: Path) -> None:
    model, path = _model(name), str(tmp_path / "clip_cn.pt")
    state = {prefix + key: value for key, value in state_for_file(model).items()}
    width = model.config.text.width
    state[f"{prefix}bert.pooler.dense.weight"] = torch.zeros(width, width)
    state[f"{prefix}bert.embeddings.position_ids"] = torch.arange(4)[None]
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"epoch": 2, "step": 9, "name": "x", "state_dict": state, "optimizer": optimizer}, path)
    weights = read_weights(path)
    assert weights.format == "Chinese CLIP, torch.save"
    assert weights.config == model.config
    assert weights.facts == {"name": "x", "epoch": "2", "step": "9"}
    assert set(weights.dropped) == {"bert.pooler.dense.weight", "bert.embeddings.position_ids"}
    assert weights.problems() == {}
    assert _same(load_model(path), model)


def test_the_old_format_of_torch_and_flash_attention_names_are_read(tmp_path: Path) -> None:
    model, path = _model(), str(tmp_path / "old.pt")
    state = state_for_file(model)
    for name in list(state):
        if "attn.in_proj_" in name:
            state[name.replace("attn.in_proj_", "attn.Wqkv.")] = state.pop(name)
    for layer in range(2):
        stem = f"bert.encoder.layer.{layer}.attention.self"
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{stem}.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"{stem}.Wqkv.{kind}"] = torch.cat(parts)
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    assert _same(load_model(path), model)


def test_hugging_face_folder_made_by_transformers(tmp_path: Path) -> None:
    peer = hugging_face_model(dataclasses.replace(VIT, text=dataclasses.replace(VIT.text, heads=4)), 1)
    peer.save_pretrained(tmp_path / "whole")
    peer.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in ("whole", "sharded"):
        weights = read_weights(str(tmp_path / folder))
        assert weights.format == "Hugging Face ChineseCLIP, safetensors"
        assert weights.config is not None
        assert (weights.config.name, weights.config.text.heads) == ("custom", 4)  # heads from config.json
    torch.save(peer.state_dict(), tmp_path / "whole" / "pytorch_model.bin")
    (tmp_path / "whole" / "model.safetensors").unlink()
    model = load_model(str(tmp_path / "whole"))
    image_BCHW, tokens_BL = torch.randn(2, 3, 32, 32), torch.tensor([[2, 5, 6, 3], [2, 9, 3, 0]])
    with torch.no_grad():
        theirs = peer(input_ids=tokens_BL, pixel_values=image_BCHW, attention_mask=tokens_BL.ne(0).long())
        image_BD, text_BD = model(image_BCHW, tokens_BL)
    torch.testing.assert_close(image_BD, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_BD, theirs.text_embeds, atol=1e-5, rtol=0)
    logits = model.logit_scale.exp() * image_BD @ text_BD.T
    torch.testing.assert_close(logits, theirs.logits_per_image, atol=1e-4, rtol=0)


def test_hugging_face_settings_that_are_not_chinese_clips_are_refused(tmp_path: Path) -> None:
    hugging_face_model(VIT, 1).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["vision_config"]["hidden_act"] = "gelu_new"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match=r"config\.json: vision_config\.hidden_act is 'gelu_new', but Chinese CLIP"
    ):
        load_model(str(tmp_path))


def _english(tmp_path: Path) -> dict[str, torch.Tensor]:
    """An image side as in OpenCLIP's state dicts, next to an English text tower."""
    state = state_for_file(_model(seed=3))
    image = {
        name: value for name, value in state.items() if name.startswith("visual.") or name == "logit_scale"
    }
    english = {"token_embedding.weight": torch.ones(9, 4), "text_projection": torch.ones(4, 32)}
    return image | english | {"transformer.resblocks.0.ln_1.weight": torch.ones(4)}


@pytest.mark.parametrize("kind", ["pt", "bin", "safetensors", "folder", "training"])
def test_open_clip_image_towers(kind: str, tmp_path: Path) -> None:
    state = _english(tmp_path)
    if kind in ("pt", "bin"):
        path = tmp_path / f"open_clip.{kind}"
        torch.save(state, path)
    elif kind == "training":
        path = tmp_path / "epoch_1.pt"
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        path = tmp_path / "open_clip_model.safetensors"
        save_file(state, path)
    model = _model(seed=4)
    source = str(tmp_path if kind == "folder" else path)
    projection = model.text_projection.detach().clone()
    provenance = initialise(model, image_weights=source)
    assert all(
        torch.equal(value, state[name])
        for name, value in state_for_file(model).items()
        if name.startswith("visual.") or name == "logit_scale"
    )
    assert torch.equal(model.text_projection, projection)
    outcomes = {item.tensor: item.outcome for item in provenance}
    assert outcomes["token_embedding.weight"] == "dropped"
    assert outcomes["logit_scale"] == outcomes["visual.proj"] == "taken"
    with pytest.raises(InputError, match=r"only an image tower \(of tiny-vit\); give a whole"):
        load_model(source)


def _bert_state(old_names: bool, prefix: str) -> dict[str, torch.Tensor]:
    """A Chinese BERT as HFL publishes it, with pooler and masked-language head."""
    state = {
        name.removeprefix("bert."): value
        for name, value in state_for_file(_model(seed=5)).items()
        if "bert." in name
    }
    if old_names:
        state = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for name, value in state.items()
        }
    state |= {"pooler.dense.weight": torch.ones(64, 64), "embeddings.position_ids": torch.arange(4)[None]}
    state = {prefix + name: value for name, value in state.items()}
    return state | {
        "cls.predictions.bias": torch.ones(1000),
        "cls.predictions.transform.LayerNorm.gamma": torch.ones(64),
    }


@pytest.mark.parametrize(("old_names", "prefix"), [(True, "bert."), (False, "bert."), (False, "")])
def test_bert_folders_with_old_and_new_names(old_names: bool, prefix: str, tmp_path: Path) -> None:
    torch.save(_bert_state(old_names, prefix), tmp_path / "pytorch_model.bin")
    settings = {"model_type": "bert", "num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model, source = _model(seed=6), _model(seed=5)
    provenance = initialise(model, text_weights=str(tmp_path))
    ours, theirs = model.bert.state_dict(), source.bert.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    outcomes = {item.tensor: item.outcome for item in provenance}
    assert outcomes[f"{prefix}pooler.dense.weight"] == outcomes["cls.predictions.bias"] == "dropped"
    assert outcomes["text_projection"] == outcomes["visual.proj"] == outcomes["logit_scale"] == "initialised"
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_attention_heads": 4}))
    with pytest.raises(
        InputError, match=r"its configuration has 4 attention heads, but tiny-vit's text tower has 2"
    ):
        initialise(model, text_weights=str(tmp_path))


def test_provenance_is_a_table(tmp_path: Path) -> None:
    torch.save(_english(tmp_path), tmp_path / "english.pt")
    write_provenance(
        str(tmp_path / "t.tsv"), initialise(_model(), image_weights=str(tmp_path / "english.pt"))
    )
    rows = [line.split("\t") for line in (tmp_path / "t.tsv").read_text().splitlines()]
    assert rows[0] == ["tensor", "outcome", "source"]
    assert ["visual.proj", "taken", str(tmp_path / "english.pt")] in rows
    assert ["text_projection", "initialised", ""] in rows


def test_position_embedding_is_interpolated_as_cn_clip_does(tmp_path: Path) -> None:
    model_of = pytest.importorskip("cn_clip.clip.model", reason="cn_clip is not installed")
    position_PW = torch.randn(1 + 16 * 16, 24)

    class Reference:
        visual = type("Visual", (), {"grid_size": 24})()

    state = {"visual.positional_embedding": position_PW.clone()}
    model_of.resize_pos_embed(state, Reference())
    torch.testing.assert_close(
        resize_positions(position_PW, 24), state["visual.positional_embedding"], atol=1e-6, rtol=0
    )
    assert resize_positions(position_PW, 16) is position_PW

    model, path = _model(), str(tmp_path / "model.safetensors")
    save_checkpoint(path, model, model.config, {})
    wide = load_model(path, image_size_px=48)
    assert wide.config.vision.image_size_px == 48
    expected = resize_positions(state_for_file(model)["visual.positional_embedding"], 6)
    assert torch.equal(state_for_file(wide)["visual.positional_embedding"], expected)
    assert wide.encode_image(torch.randn(1, 3, 48, 48)).shape == (1, 32)
    with pytest.raises(InputError, match="an image size of 50 is not a multiple of 8 pixels"):
        load_model(path, image_size_px=50)
    target = CLIP(wide.config)
    outcomes = {item.tensor: item.outcome for item in initialise(target, image_weights=path)}
    assert outcomes["visual.positional_embedding"] == "interpolated"
    assert torch.equal(state_for_file(target)["visual.positional_embedding"], expected)


def test_training_checkpoints_of_this_project(tmp_path: Path) -> None:
    """Module names, as training/checkpoint/checkpoint.py writes them; a checkpoint folder, and its file."""
    for name in ("tiny-vit", "tiny-rn"):
        model, folder = _model(name), tmp_path / name / "step_000000008"
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "weights.safetensors")
        save_file({"exp_avg.x": torch.ones(1)}, folder / "optimizer.safetensors")
        assert _same(load_model(str(folder)), model)
        assert _same(load_model(str(folder / "weights.safetensors")), model)


def test_every_misfit_is_listed_by_name(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in state_for_file(_model()).items()}
    del state["module.visual.ln_post.weight"], state["module.bert.encoder.layer.0.output.dense.bias"]
    state["module.visual.transformer.resblocks.1.mlp.c_fc.bias"] = torch.ones(7)
    state["module.bert.strange"] = torch.ones(2)
    torch.save({"state_dict": state}, tmp_path / "odd.pt")
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path / "odd.pt"))
    assert str(caught.value).startswith(
        f"{tmp_path}/odd.pt: does not fit the model: missing: bert.encoder.layer.0.output.dense.bias,"
        " visual.ln_post.weight; unexpected: bert.strange; of another shape:"
        " visual.transformer.resblocks.1.mlp.c_fc.bias is [7], not [256]"
    )
    problems = read_weights(str(tmp_path / "odd.pt")).problems()
    assert problems["missing"] == ["bert.encoder.layer.0.output.dense.bias", "visual.ln_post.weight"]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = state_for_file(_model())
    state["visual.ln_post.bias"][3] = float("nan")
    state["text_projection"][0, 0] = float("inf")
    torch.save({"state_dict": state}, tmp_path / "nan.pt")
    with pytest.raises(
        InputError, match=r"nan\.pt: NaN or infinite values in text_projection, visual\.ln_post\.bias"
    ):
        load_model(str(tmp_path / "nan.pt"))


class _Attack:
    def __init__(self, call: Any, *arguments: str) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return (self.call, self.arguments)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("call", ["open", "system"])
def test_a_pickle_that_would_run_code_runs_nothing(call: str, new_format: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "ran"
    attack = _Attack(open, str(mark), "w") if call == "open" else _Attack(os.system, f"touch {mark}")
    payload = {"state_dict": {"visual.proj": torch.ones(2)}, "x": attack}
    torch.save(payload, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(InputError, match=rf"evil\.pt: its pickle asks for \w+\.{call}, .* nothing was run"):
        load_model(str(path))
    path.write_bytes(pickle.dumps(attack))
    with pytest.raises(InputError, match=r"evil\.pt: .*nothing was run") as caught:
        load_model(str(path))
    assert "weights_only" not in str(caught.value)  # torch's advice to read it by unsafe means
    assert "\n" not in str(caught.value)
    assert not mark.exists()


BAD_FILES = {
    "empty": (b"", "empty: download it again"),
    "html": (b"<!DOCTYPE html><html>", "a web page"),
    "spaced html": (b"\n  <html>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    "text": (b"not found", "not a weights file: begins with b'not foun'"),
    "pickle": (pickle.dumps([1, 2]), "refuses|holds a list"),
    "zip": (b"PK\x03\x04rest", "cut or damaged"),
    "header": ((10**6).to_bytes(8, "little") + b'{"a"', "cut short: 12 bytes"),
    "json": ((4).to_bytes(8, "little") + b"{abc", "safetensors"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_files_that_are_no_weights_are_named_in_one_line(kind: str, tmp_path: Path) -> None:
    data, reason = BAD_FILES[kind]
    path = tmp_path / "file.pt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        load_model(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["pt", "old", "safetensors"])
def test_cut_files_are_named_in_one_line(kind: str, cut: float, tmp_path: Path) -> None:
    model, path = _model(), tmp_path / f"model.{kind}"
    if kind == "safetensors":
        save_checkpoint(str(path), model, model.config, {})
    else:
        torch.save({"state_dict": state_for_file(model)}, path, _use_new_zipfile_serialization=kind == "pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(InputError, match=r"(cut|damaged|safetensors).*download it again") as caught:
        load_model(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_states_of_no_known_layout_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    with pytest.raises(InputError, match="no such file or folder"):
        load_model(str(path))
    torch.save({"conv1.weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"tensors named like conv1\.weight: neither Chinese CLIP"):
        load_model(str(path))
    torch.save({"epoch": 3}, path)
    with pytest.raises(InputError, match=r"no tensors by name \(its keys: epoch\)"):
        load_model(str(path))
    torch.save(torch.ones(3), path)
    with pytest.raises(InputError, match="holds a Tensor, not tensors by name"):
        load_model(str(path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="it holds no weights"):
        load_model(str(tmp_path / "folder"))
    state = state_for_file(_model())
    torch.save({name: value for name, value in state.items() if name != "visual.conv1.weight"}, path)
    with pytest.raises(InputError, match=r"its sizes are unknown, because it lacks visual\.conv1\.weight"):
        load_model(str(path))


def test_weights_in_another_precision_come_as_float32(tmp_path: Path) -> None:
    state = state_for_file(_model())
    torch.save({"state_dict": {name: value.half() for name, value in state.items()}}, tmp_path / "half.pt")
    loaded = state_for_file(load_model(str(tmp_path / "half.pt")))
    assert all(value.dtype == torch.float32 for value in loaded.values())
    assert torch.equal(loaded["text_projection"], state["text_projection"].half().float())


def test_an_english_clip_in_hugging_face_names(tmp_path: Path) -> None:
    state = {
        name: value
        for name, value in to_hugging_face(state_for_file(_model(seed=3))).items()
        if not name.startswith(("text_model.", "text_projection"))
    }
    state["text_model.encoder.layers.0.self_attn.q_proj.weight"] = torch.ones(4, 4)
    state["text_projection.weight"] = torch.ones(32, 4)
    save_file(state, tmp_path / "model.safetensors")
    model = _model(seed=4)
    outcomes = {item.tensor: item.outcome for item in initialise(model, image_weights=str(tmp_path))}
    assert outcomes["text_projection.weight"] == "dropped"
    theirs = state_for_file(_model(seed=3))["visual.transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(state_for_file(model)["visual.transformer.resblocks.1.attn.in_proj_weight"], theirs)


def test_peers_state_is_read_whole(tmp_path: Path) -> None:
    pytest.importorskip("cn_clip.clip", reason="cn_clip is not installed")
    reference = cn_clip_of(RN, 7)
    path = str(tmp_path / "peer.pt")
    torch.save({"state_dict": reference.state_dict()}, path)
    loaded = state_for_file(load_model(path))
    theirs = reference.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.items())
    assert read_tensors(path).container == "torch"
