"""A ResNet's folder for transformers: it loads without this project, computes the same, and is read back."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import cnclip
from pipeline.cli import main
from pipeline.core.records import InputError
from tests.helpers.evaluation_files import small_evaluation
from tests.helpers.pages import blocks, read
from tests.helpers.train_jobs import make_job
from training.model import modeling_chinese_clip_resnet as shipped
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS, ModelConfig, ModifiedResNetConfig
from training.model.tokenizer import SPECIAL_TOKENS, Tokenizer
from training.model.vision import build_image_tower
from training.pretrain import build_model
from training.weights.convert import convert, inspect
from training.weights.export import save_hugging_face
from training.weights.formats import load_model
from training.weights.layouts import to_hugging_face
from training.weights.model_card import RESNET_CODE, RESNET_CODE_LICENCE
from training.weights.said import RESNET_TYPE
from training.weights.weights import save_checkpoint, state_for_file

PROGRAM = Path(__file__).parents[2] / "helpers" / "load_with_transformers.py"
WORDS = [
    *SPECIAL_TOKENS,
    *"红蓝黄绿色的猫狗鸟圆方形一只二三第张图片零123456789!",
    *"abcdefghijklmnopqrstuvwxyz",
]
TEXTS = ["一只红色的猫", "蓝色的狗!", "big red cat", "图" * 60]  # the last is cut to 52 tokens


def _lively(config: ModelConfig) -> CLIP:
    """A model whose every weight and statistic counts."""
    torch.manual_seed(0)
    model = build_clip(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) if name.endswith("running_var") else
                            0.1 * torch.randn_like(tensor) * (1 if tensor.ndim == 1 else 0.1))  # fmt: skip
    return model


@dataclass(frozen=True)
class Exported:
    """A model, its checkpoint, its folder, what transformers saved of that, and what it computed."""

    model: CLIP
    source: str
    folder: Path
    copy: Path
    pixels: Any
    found: Mapping[str, Any]


def _export(place: Path, config: ModelConfig) -> Exported:
    model = _lively(config)
    (place / "in").mkdir()
    source, folder, copy = str(place / "in" / "model.safetensors"), place / "folder", place / "copy"
    save_checkpoint(source, model, model.config, {})
    words = [*WORDS, *(f"[unused{number}]" for number in range(config.text.vocab_size - len(WORDS)))]
    Tokenizer(words).save_vocabulary(str(place / "in" / "vocab.txt"))
    assert main(["convert", source, str(folder)]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 70, 3), dtype=np.uint8)
    side = config.vision.image_size_px
    np.savez(place / "inputs.npz", texts=TEXTS, pixels=pixels, side=side)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), str(copy), "inputs.npz", "outputs.npz"],
        cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Do you wish to run" not in done.stdout + done.stderr  # all that asks for it got its consent
    with np.load(place / "outputs.npz") as outputs:
        return Exported(model, source, folder, copy, pixels, dict(outputs))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    text = dataclasses.replace(MODELS["tiny-rn"].text, vocab_size=len(WORDS))
    return _export(tmp_path_factory.mktemp("rn"), dataclasses.replace(MODELS["tiny-rn"], text=text))


def _equal_features(exported: Exported) -> None:
    for place in ("first", "again"):  # the exported folder, and what transformers saved of it
        found = {
            name.partition("_")[2]: torch.from_numpy(value)
            for name, value in exported.found.items()
            if name.startswith(place)
        }
        with torch.no_grad():
            image_BD, text_BD = exported.model(found["pixels"], found["ids"])
            scale = exported.model.logit_scale.exp()
        for theirs, ours in (("image", image_BD), ("text", text_BD)):
            torch.testing.assert_close(found[f"{theirs}_embeds"], ours, atol=1e-6, rtol=0)
            torch.testing.assert_close(F.normalize(found[theirs], dim=-1), ours, atol=1e-6, rtol=0)
        logits_MN = scale * found["image_embeds"] @ found["text_embeds"].T
        torch.testing.assert_close(found["logits_per_image"], logits_MN, atol=1e-5, rtol=1e-5)


def test_features_of_a_program_without_the_project_equal_ours(exported: Exported) -> None:
    _equal_features(exported)
    found = exported.found
    assert found["first_ids"].shape == (4, 52)
    assert found["first_cells"].shape == (4, 4, 1024)
    np.testing.assert_allclose(found["scores"].sum(), 1, rtol=1e-5)
    chances = torch.from_numpy(found["first_logits_per_image"]).softmax(-1)[0].numpy()
    # The pipeline's images are resized by torchvision, whose pixels differ on noise.
    np.testing.assert_allclose(found["scores"], chances, atol=0.05)
    assert np.isfinite(found["first_loss"])
    assert len(set(np.round(found["first_logits_per_image"], 3).ravel())) > 6  # not all alike


@pytest.mark.slow
def test_rn50_at_full_size(tmp_path: Path) -> None:
    _equal_features(_export(tmp_path, MODELS["RN50"]))


def test_the_folder_is_read_back_as_the_same_model(exported: Exported, tmp_path: Path) -> None:
    folder = str(exported.folder)
    text = "\n".join(inspect(folder))
    assert "Hugging Face ChineseCLIP, safetensors" in text
    assert "tiny-rn: 48 px, 128 dimensions" in text
    assert "missing     nothing" in text
    assert "unexpected  nothing" in text
    ours = exported.model.state_dict()
    convert(folder, str(tmp_path / "back.safetensors"))
    convert(folder, str(tmp_path / "again"))
    old = {
        re.sub(
            r"(?<=LayerNorm\.)(weight|bias)$",
            lambda match: {"weight": "gamma", "bias": "beta"}[match[1]],
            name,
        ): one
        for name, one in load_file(exported.copy / "model.safetensors").items()
    }
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")  # as transformers 5.0 saves it
    (tmp_path / "old" / "config.json").write_bytes((exported.copy / "config.json").read_bytes())
    exact = (folder, str(tmp_path / "back.safetensors"), str(tmp_path / "again"))
    for path in (*exact, str(exported.copy), str(tmp_path / "old")):
        loaded = load_model(path)
        assert loaded.config == exported.model.config
        for name, tensor in loaded.state_dict().items():
            expected = ours[name]
            if path not in exact and name == "bert.embeddings.word_embeddings.weight":
                # transformers puts zeros into the row of [PAD], which no feature comes from
                tensor, expected = tensor[1:], expected[1:]
            assert torch.equal(tensor, expected), (path, name)
    for file in ("config.json", "model.safetensors", RESNET_CODE):
        assert (tmp_path / "again" / file).read_bytes() == (exported.folder / file).read_bytes()


def test_python_training_and_eval_take_the_folder(exported: Exported, tmp_path: Path) -> None:
    own, theirs = cnclip.load(exported.source), cnclip.load(str(exported.folder))
    np.testing.assert_array_equal(own.embed_texts(TEXTS[:3]), theirs.embed_texts(TEXTS[:3]))
    np.testing.assert_allclose(
        theirs.embed_texts(TEXTS[:3]), exported.found["first_text_embeds"][:3], atol=1e-6
    )
    job = dataclasses.replace(
        make_job(tmp_path, "run", sizes=(2,)), model="tiny-rn", start_weights=str(exported.folder)
    )
    start = build_model(job, Tokenizer.load(str(exported.folder)))
    assert all(
        torch.equal(start.state_dict()[name], one) for name, one in exported.model.state_dict().items()
    )
    sets = tmp_path / "sets"
    small_evaluation(sets / "mine", "valid")
    scores = []
    for number, weights in enumerate((exported.source, str(exported.folder))):
        out = tmp_path / f"scores{number}"
        assert main(["eval", weights, "--sets", str(sets), "--out", str(out)]) == 0
        tables = json.loads((out / "eval.json").read_text())["tables"]
        scores.append([line["ours"] for table in tables for line in table["lines"]])
    assert len(scores[0]) >= 6
    assert scores[0] == scores[1]


def test_reading_the_folder_runs_nothing_of_it(exported: Exported, tmp_path: Path) -> None:
    folder, mark = tmp_path / "folder", tmp_path / "ran"
    folder.mkdir()
    for file in exported.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / RESNET_CODE).write_text(f"open({str(mark)!r}, 'w')\n", encoding="utf-8")
    cnclip.load(str(folder)).embed_texts(TEXTS[:1])
    inspect(str(folder))
    convert(str(folder), str(tmp_path / "again"))
    assert not mark.exists()
    # What is written has the code of this project, not the folder's.
    assert (tmp_path / "again" / RESNET_CODE).read_bytes() == (exported.folder / RESNET_CODE).read_bytes()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("image_size", 224, "positions of 1 × 1 cells of 32 pixels, but the configuration next to it is of"),
        ("image_size", None, "configuration next to it is of one for 224 pixels"),  # the class's default
        ("image_size", "48", "image_size is 48, which is not a number of them"),
    ],
)
def test_a_config_of_another_size_is_refused(
    exported: Exported, tmp_path: Path, key: str, value: object, said: str
) -> None:
    settings = json.loads((exported.folder / "config.json").read_text())
    if value is None:
        del settings["vision_config"][key]
    else:
        settings["vision_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").symlink_to(exported.folder / "model.safetensors")
    with pytest.raises(InputError, match=said):
        load_model(str(tmp_path))


def test_an_unknown_size_comes_from_the_config(tmp_path: Path) -> None:
    text = dataclasses.replace(MODELS["tiny-vit"].text, vocab_size=len(WORDS))
    vision = ModifiedResNetConfig(image_size_px=80, blocks=(2, 1, 1, 1), width=256)
    model = _lively(ModelConfig(name="custom", embed_dim=16, vision=vision, text=text))
    save_hugging_face(str(tmp_path), model, Tokenizer(WORDS), {})
    assert load_model(str(tmp_path)).config.vision == vision


@pytest.mark.parametrize(("side", "other"), [(32, 64), (48, 32), (64, 48)])  # of 48 pixels 3 cells become 2
def test_the_shipped_tower_equals_ours_at_odd_sizes_too(side: int, other: int) -> None:
    config = ModifiedResNetConfig(image_size_px=side, blocks=(2, 1, 2, 1), width=256)
    full = ModelConfig(name="custom", embed_dim=16, vision=config, text=MODELS["tiny-vit"].text)
    model = _lively(full)
    settings = shipped.ChineseCLIPResNetConfig(
        text_config={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "intermediate_size": 256, "vocab_size": 1000, "max_position_embeddings": 64},
        vision_config={"image_size": side, "depths": config.blocks, "hidden_size": 256},
        projection_dim=16,
    )  # fmt: skip
    peer = shipped.ChineseCLIPResNetModel(settings).eval()
    peer.load_state_dict(to_hugging_face(state_for_file(model)))
    for size in (side, other):
        image_BCHW = torch.randn(2, 3, size, size)
        with torch.no_grad():
            theirs = peer.get_image_features(image_BCHW, interpolate_pos_encoding=size != side)
            ours = model.encode_image(image_BCHW)
        torch.testing.assert_close(F.normalize(theirs.pooler_output, dim=-1), ours, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=f"the model takes {side} × {side}: resize them, or set interp"):
        peer.get_image_features(image_BCHW)


def test_a_new_model_is_initialised_and_names_what_devices_must_not_split() -> None:
    settings = shipped.ChineseCLIPResNetConfig(
        text_config={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 50},
        vision_config={"image_size": 32, "depths": [1, 1, 1, 1], "hidden_size": 256},
        projection_dim=8,
    )
    peer = shipped.ChineseCLIPResNetModel(settings)
    positions = peer.vision_model.attnpool.positional_embedding
    assert 0.04 < float(positions.std()) < 0.09  # 1 / √256 = 0.06
    names = {type(module).__name__ for module in peer.modules()}
    assert names >= set(shipped.ChineseCLIPResNetModel._no_split_modules)
    tower = build_image_tower(ModifiedResNetConfig(image_size_px=32, blocks=(1, 1, 1, 1), width=256), 8)
    assert sum(one.numel() for one in tower.parameters()) == sum(
        one.numel() for part in (peer.vision_model, peer.visual_projection) for one in part.parameters()
    )


def test_names_and_licence_are_those_of_the_file(exported: Exported) -> None:
    assert shipped.ChineseCLIPResNetConfig.model_type == RESNET_TYPE
    assert Path(shipped.__file__).name == RESNET_CODE
    first, *_ = (exported.folder / RESNET_CODE).read_text(encoding="utf-8").splitlines()
    assert first.startswith(f"# License: {RESNET_CODE_LICENCE} ")
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    assert "AutoModel.from_pretrained(FOLDER, trust_remote_code=True)" in card
    assert f"under the license {RESNET_CODE_LICENCE}" in card
    assert "library_name: transformers" in card
    page = read("docs/guides/convert.md")
    (lines,) = (
        block.text for block in blocks(page) if "demo-clip" in block.text and block.language == "python"
    )
    assert lines.replace('"demo-clip"', "FOLDER") in card
