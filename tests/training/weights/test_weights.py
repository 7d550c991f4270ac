"""Weights in and out: our checkpoints, OpenAI CLIP's archives, and the errors for files that do not fit."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.core.records import InputError
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS
from training.weights.initialise import initialise
from training.weights.torchscript import read_torchscript, write_torchscript
from training.weights.weights import (
    METADATA_KEY,
    load_checkpoint,
    read_header,
    save_checkpoint,
    save_openai,
    state_for_file,
)

# One name of each kind as OpenAI CLIP and Chinese CLIP write them, with the shape it has there.
OPENAI_NAMES = {
    "tiny-rn": {
        "visual.conv1.weight": [16, 3, 3, 3],
        "visual.bn3.running_var": [32],
        "visual.layer1.0.conv1.weight": [32, 32, 1, 1],
        "visual.layer2.0.bn2.bias": [64],
        "visual.layer3.0.downsample.0.weight": [512, 256, 1, 1],
        "visual.layer4.0.downsample.1.num_batches_tracked": [],
        "visual.attnpool.positional_embedding": [2, 1024],
        "visual.attnpool.k_proj.weight": [1024, 1024],
        "visual.attnpool.c_proj.bias": [128],
    },
    "tiny-vit": {
        "visual.class_embedding": [64],
        "visual.positional_embedding": [17, 64],
        "visual.conv1.weight": [64, 3, 8, 8],
        "visual.ln_pre.weight": [64],
        "visual.transformer.resblocks.1.ln_1.bias": [64],
        "visual.transformer.resblocks.0.attn.in_proj_weight": [192, 64],
        "visual.transformer.resblocks.0.attn.in_proj_bias": [192],
        "visual.transformer.resblocks.0.attn.out_proj.weight": [64, 64],
        "visual.transformer.resblocks.1.mlp.c_fc.weight": [256, 64],
        "visual.transformer.resblocks.1.mlp.c_proj.bias": [64],
        "visual.ln_post.weight": [64],
        "visual.proj": [64, 32],
    },
}
TEXT_NAMES = {
    "bert.embeddings.LayerNorm.weight",
    "bert.encoder.layer.1.attention.self.query.weight",
    "bert.encoder.layer.0.attention.output.dense.bias",
    "bert.encoder.layer.0.intermediate.dense.weight",
    "text_projection",
}


def _model(name: str, seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return build_clip(MODELS[name], vocab_size=30)


def _equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", OPENAI_NAMES)
def test_files_have_the_names_and_shapes_of_openai_and_chinese_clip(name: str) -> None:
    state = state_for_file(_model(name))
    assert {key: list(state[key].shape) for key in OPENAI_NAMES[name]} == OPENAI_NAMES[name]
    assert state.keys() >= TEXT_NAMES
    assert state["logit_scale"].shape == ()
    assert not any("pooler" in key or "position_ids" in key for key in state)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("tiny")])
def test_every_tensor_of_the_paper_models_has_a_name_of_its_own(name: str) -> None:
    with torch.device("meta"):
        model = build_clip(MODELS[name])
    pattern = (
        r"(visual\.(class_embedding|positional_embedding|proj|conv[123]\.|bn[123]\.|ln_(pre|post)\.|"
        r"layer[1-4]\.\d+\.(conv|bn|downsample\.)|attnpool\.|transformer\.resblocks\.\d+\.(ln_|attn\.|mlp\.c_))"
        r"|bert\.|text_projection$|logit_scale$)"
    )
    keep = model.state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)  # meta tensors have no bytes to move
        names = state_for_file(model)
    assert len(names) == len(keep)
    assert all(re.match(pattern, key) for key in names)


@pytest.mark.parametrize("name", OPENAI_NAMES)
def test_checkpoint_round_trip(name: str, tmp_path: Path) -> None:
    model, path = _model(name), str(tmp_path / "model.safetensors")
    save_checkpoint(path, model, model.config, {"stage": "第一", "a": "b"})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = load_checkpoint(path, expected=model.config)
    assert torch.equal(torch.get_rng_state(), before)
    assert _equal(loaded, model)
    assert loaded.config == model.config
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert read_header(path, header) == (model.config, {"stage": "第一", "a": "b"})


def test_checkpoint_bytes_depend_on_contents_alone(tmp_path: Path) -> None:
    digests = set()
    for number, metadata in enumerate(({"a": "1", "b": "2"}, {"b": "2", "a": "1"})):
        path = tmp_path / f"{number}.safetensors"
        model = _model("tiny-vit")
        save_checkpoint(str(path), model, model.config, metadata)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_checkpoint_on_an_object_store() -> None:
    model = _model("tiny-vit")
    save_checkpoint("memory://weights/model.safetensors", model, model.config, {})
    assert fsspec.filesystem("memory").exists("/weights/model.safetensors")
    assert _equal(load_checkpoint("memory://weights/model.safetensors"), model)


def test_another_configuration_than_the_models_own_is_refused(tmp_path: Path) -> None:
    model, path = _model("tiny-vit"), tmp_path / "file"
    with pytest.raises(ValueError, match=r"pass model\.config"):
        save_checkpoint(str(path), model, MODELS["tiny-vit"], {})
    with pytest.raises(ValueError, match=r"pass model\.config"):
        save_openai(str(path), model, MODELS["tiny-vit"])
    assert not path.exists()


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model, path = _model("tiny-vit"), str(tmp_path / "model.safetensors")
    save_checkpoint(path, model, model.config, {})
    with pytest.raises(InputError) as caught:
        load_checkpoint(path, expected=MODELS["tiny-rn"])
    assert str(caught.value).startswith(f"{path}: holds another model than asked for: ")
    assert "name is tiny-vit, not tiny-rn" in str(caught.value)
    assert "text.vocab_size is 30, not 3000" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_misfits_in_a_checkpoint_are_named(tmp_path: Path) -> None:
    model, path = _model("tiny-vit"), str(tmp_path / "model.safetensors")
    save_checkpoint(path, model, model.config, {})
    state = load_file(path)
    state["text_projection"] = state["text_projection"][:, :16].contiguous()
    state["bert.pooler.dense.bias"] = torch.zeros(64)
    del state["visual.ln_post.weight"]
    header = json.dumps({"config": dataclasses.asdict(model.config), "metadata": {}})
    save_file(state, path, metadata={"cnclip": header})
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(
        f"{path}: does not fit the model: missing: visual.ln_post.weight; "
        "unexpected: bert.pooler.dense.bias; of another shape: text_projection is [64, 16], not [64, 32]."
    )


def test_damaged_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read: No such file"):
        load_checkpoint(str(path))
    model = _model("tiny-vit")
    save_checkpoint(str(path), model, model.config, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
        load_checkpoint(str(path))
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match="not our checkpoint"):
        load_checkpoint(str(path))
    save_file({"a": torch.ones(1)}, path, metadata={"cnclip": '{"config": {"name": "x"}, "metadata": {}}'})
    with pytest.raises(InputError, match="metadata key 'cnclip' cannot be read"):
        load_checkpoint(str(path))


@pytest.mark.parametrize("name", OPENAI_NAMES)
def test_image_tower_travels_through_an_openai_archive(name: str, tmp_path: Path) -> None:
    source, target, path = _model(name, seed=1), _model(name, seed=2), str(tmp_path / "english.pt")
    with torch.no_grad():
        source.logit_scale.fill_(3.25)
    source.encode_image(torch.randn(2, 3, 48, 48)) if name == "tiny-rn" else None  # other running statistics
    text_before = {key: tensor.clone() for key, tensor in target.bert.state_dict().items()}
    projection_before = target.text_projection.detach().clone()
    save_openai(path, source, source.config)
    provenance = initialise(target, image_weights=path)

    assert _equal(target.visual, source.visual)
    assert target.logit_scale.item() == 3.25
    assert torch.equal(target.text_projection, projection_before)
    assert all(torch.equal(tensor, text_before[key]) for key, tensor in target.bert.state_dict().items())
    outcomes = {item.tensor: item.outcome for item in provenance}
    assert len(outcomes) == len(provenance)
    assert {key for key, outcome in outcomes.items() if outcome == "taken"} == {
        key for key in state_for_file(target) if key.startswith("visual.") or key == "logit_scale"
    }
    assert outcomes["text_projection"] == "initialised"
    assert outcomes["input_resolution"] == "dropped"


def test_openai_archive_has_openai_numbers(tmp_path: Path) -> None:
    model, path = _model("tiny-rn"), str(tmp_path / "english.pt")
    save_openai(path, model, model.config)
    state = read_torchscript(path)
    assert (int(state["input_resolution"]), int(state["context_length"]), int(state["vocab_size"])) == (
        48,
        64,
        30,
    )
    first = Path(path).read_bytes()
    save_openai(path, model, model.config)
    assert Path(path).read_bytes() == first


def test_half_precision_and_text_tower_of_an_archive(tmp_path: Path) -> None:
    """OpenAI's files are float16, have a text tower, and some lack the batch norms' counters."""
    source, target, path = _model("tiny-rn", seed=1), _model("tiny-rn", seed=2), str(tmp_path / "half.pt")
    state = {
        name: tensor.half()
        for name, tensor in state_for_file(source).items()
        if not name.startswith(("bert.", "text_projection")) and not name.endswith(".num_batches_tracked")
    }
    english = {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "text_projection": torch.ones(8, 128)}
    write_torchscript(path, state | english, {"vocab_size": torch.tensor(49408)})
    projection_before = target.text_projection.detach().clone()
    provenance = initialise(target, image_weights=path)
    taken = target.visual.get_parameter("stem.conv1.conv.weight")
    assert taken.dtype == torch.float32
    assert torch.equal(taken, source.visual.get_parameter("stem.conv1.conv.weight").half().float())
    assert torch.equal(target.text_projection, projection_before)
    outcomes = [(item.tensor, item.outcome) for item in provenance]
    assert ("visual.bn1.num_batches_tracked", "initialised") in outcomes
    assert ("transformer.resblocks.0.ln_1.weight", "dropped") in outcomes


def test_an_archive_of_another_image_tower_is_refused_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "english.pt")
    narrow = dataclasses.replace(MODELS["tiny-vit"], embed_dim=16)
    source = build_clip(narrow, vocab_size=30)
    state = state_for_file(source)
    del state["visual.ln_pre.bias"]
    write_torchscript(path, state | {"visual.extra": torch.ones(1)}, {})
    target = _model("tiny-vit")
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(InputError) as caught:
        initialise(target, image_weights=path)
    assert str(caught.value).startswith(
        f"{path}: does not fit the model: missing: visual.ln_pre.bias; unexpected: visual.extra; "
        "of another shape: visual.proj is [64, 16], not [64, 32]. Give the weights of tiny-vit"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_sizes_that_only_the_header_has_take_no_memory(tmp_path: Path) -> None:
    import resource

    model = CLIP(MODELS["tiny-vit"])
    wide = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, vocab_size=1 << 24))
    header = json.dumps({"config": dataclasses.asdict(wide), "metadata": {}})
    path = str(tmp_path / "a.safetensors")
    save_file(state_for_file(model), path, metadata={METADATA_KEY: header})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"does not fit the model: of another shape: .*16777216"):
        load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10  # KiB; it would be 4 GiB
