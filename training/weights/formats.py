"""Weights in, whatever wrote them: a file or folder is recognised by its content.

Read are Chinese CLIP's `.pt`, Hugging Face's ChineseCLIP folder, OpenAI CLIP's TorchScript, OpenCLIP's and
LAION's state dicts, HFL's RoBERTa and RBT3 folders, this project's checkpoints, and DeepSpeed's folders.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec
import torch
from torch.nn import functional as F

from pipeline.core import store
from pipeline.core.records import InputError
from training.model.clip import CLIP
from training.model.config import MODELS, ModelConfig, VisionTransformerConfig
from training.weights.layouts import Layout, infer_config, matching_towers, rename
from training.weights.tensor_files import TensorFile, read_tensors
from training.weights.weights import METADATA_KEY, build_empty, fill, misfits, read_header, tensor_slots
from training.weights.zero_checkpoint import find_zero_checkpoint, read_zero_checkpoint

_FORMATS: Mapping[Layout, str] = {
    "chinese_clip": "Chinese CLIP",
    "hugging_face": "Hugging Face ChineseCLIP",
    "hugging_face_english": "Hugging Face CLIP (English)",
    "image_tower": "OpenCLIP",
    "bert": "BERT",
    "module": "training checkpoint of this project",
}
_OWN = "checkpoint of this project"
# Names under which libraries put weights into a folder, in the order of preference.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "weights.safetensors",
)
_WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
_POSITIONS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
# What has to be so in a Hugging Face config.json for the features to be Chinese CLIP's.
_FIXED_VISION = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_FIXED_TEXT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}


@dataclass(frozen=True, slots=True)
class Weights:
    """What a file or folder holds, in Chinese CLIP's names."""

    path: str
    format: str  # for people
    state: dict[str, torch.Tensor]
    dropped: tuple[str, ...]  # names of the file's tensors that have no place in a model
    config: ModelConfig | None  # sizes, where both towers are there and the sizes can be told
    facts: Mapping[str, str] = field(default_factory=dict)  # what the file says about itself

    @property
    def has_image_tower(self) -> bool:
        return any(name.startswith("visual.") for name in self.state)

    @property
    def has_text_tower(self) -> bool:
        return any(name.startswith("bert.") for name in self.state)

    def problems(self) -> dict[str, list[str]]:
        """Missing, unexpected and misshapen tensors by kind; of a file with one tower, of that tower."""
        config = self.config or self._likely_config()
        if config is None:
            return {}
        with torch.device("meta"):
            slots = tensor_slots(CLIP(config))
        if self.config is None:
            prefixes = ("visual.", "logit_scale") if self.has_image_tower else ("bert.",)
            slots = {name: slot for name, slot in slots.items() if name.startswith(prefixes)}
        return misfits(slots, self.state)

    def _likely_config(self) -> ModelConfig | None:
        towers = matching_towers(self.state)
        names = towers["image"] if self.has_image_tower else towers["text"]
        if not names:
            return None
        known = MODELS[names[0]]
        words = self.state.get("bert.embeddings.word_embeddings.weight")
        return known if words is None else replace(known, text=replace(known.text, vocab_size=len(words)))


def read_weights(path: str) -> Weights:
    """Read a file or folder of any known format; tensors of large files are mapped, not copied.

    InputError names the path: absent, damaged, of no known layout, or of settings that Chinese CLIP does not
    have.
    """
    if not store.exists(path):
        raise InputError(f"{path}: no such file or folder: give the path of weights")
    if not _is_folder(path):
        return _of_file(path, read_tensors(path))
    if (zero := find_zero_checkpoint(path)) is not None:
        renamed = rename(read_zero_checkpoint(zero), zero)
        sizes = _config_of(renamed.state, zero)
        return Weights(path, "DeepSpeed checkpoint", renamed.state, renamed.dropped, sizes)
    names = store.list_files(path)
    chosen = next((name for name in _WEIGHT_FILES if name in names), None)
    if chosen is None:
        others = [name for name in names if name.endswith(_WEIGHT_ENDINGS)]
        if len(others) != 1:
            found = (
                f"it holds {', '.join(others)}: give one of them"
                if others
                else "it holds no weights: give the folder that does"
            )
            raise InputError(
                f"{path}: no {_WEIGHT_FILES[0]}, {_WEIGHT_FILES[2]} or DeepSpeed checkpoint; {found}"
            )
        chosen = others[0]
    weights = _of_file(path, _read_shards(path, chosen), store.join(path, chosen))
    if "config.json" in names and weights.format != _OWN:
        weights = _with_hugging_face_config(weights, store.join(path, "config.json"))
    return weights


def load_model(path: str, *, image_size_px: int | None = None) -> CLIP:
    """A whole model from a file or folder of any known format: float32, on the CPU, in evaluation mode.

    `image_size_px` asks for another resolution than the weights'; position embeddings are then interpolated.
    InputError names the path and every tensor that is missing, unexpected or of another shape, NaN weights,
    and files that hold one tower only.
    """
    weights = read_weights(path)
    if weights.config is None:
        raise InputError(f"{path}: {_describe_part(weights)}; give a whole Chinese CLIP model")
    config, state = weights.config, weights.state
    if image_size_px is not None and image_size_px != config.vision.image_size_px:
        config = resized(config, image_size_px, path)
        state = with_resized_positions(state, config)
    model = build_empty(config)
    fill(tensor_slots(model), state, path, "Give a whole Chinese CLIP model")
    return model.eval()


def resized(config: ModelConfig, image_size_px: int, origin: str) -> ModelConfig:
    """The configuration at another resolution; InputError where patches do not divide it."""
    vision = config.vision
    cell = vision.patch_size_px if isinstance(vision, VisionTransformerConfig) else 32
    if image_size_px < cell or image_size_px % cell:
        raise InputError(
            f"{origin}: an image size of {image_size_px} is no multiple of {cell} pixels: choose one"
        )
    return replace(config, vision=replace(vision, image_size_px=image_size_px))


def with_resized_positions(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The state with the image tower's position embedding interpolated to the configuration's grid."""
    vision = config.vision
    cell = vision.patch_size_px if isinstance(vision, VisionTransformerConfig) else 32
    side = vision.image_size_px // cell
    return {
        name: resize_positions(tensor, side) if name in _POSITIONS else tensor
        for name, tensor in state.items()
    }


def resize_positions(position_PW: torch.Tensor, side: int) -> torch.Tensor:
    """A position embedding [1 + n², width] as [1 + side², width]: the class token's kept, the grid bicubic.

    As Chinese CLIP does it, with `align_corners=True`. Unchanged where the grid has that size already, or is
    no square.
    """
    old = round((position_PW.shape[0] - 1) ** 0.5)
    if old == side or old * old + 1 != position_PW.shape[0]:
        return position_PW
    token_1W, grid_GW = position_PW[:1].float(), position_PW[1:].float()
    grid_1WSS = grid_GW.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid_1WSS = F.interpolate(grid_1WSS, size=(side, side), mode="bicubic", align_corners=True)
    return torch.cat([token_1W, grid_1WSS.permute(0, 2, 3, 1).reshape(side * side, -1)])


def _is_folder(path: str) -> bool:
    if store.is_local(path):
        return os.path.isdir(path)
    fs, name = fsspec.core.url_to_fs(path)
    return bool(fs.isdir(name))


def _of_file(path: str, file: TensorFile, origin: str | None = None) -> Weights:
    origin = origin or path
    if METADATA_KEY in file.facts:
        own_config, metadata = read_header(origin, file.facts)
        return Weights(path, _OWN, file.tensors, (), own_config, metadata)
    renamed = rename(file.tensors, origin)
    name = _FORMATS[renamed.layout]
    if file.container == "torchscript":
        name = "OpenAI CLIP" if renamed.layout == "image_tower" else name
    container = {"torch": "torch.save", "torchscript": "TorchScript", "safetensors": "safetensors"}[
        file.container
    ]
    config = _config_of(renamed.state, origin)
    return Weights(path, f"{name}, {container}", renamed.state, renamed.dropped, config, file.facts)


def _config_of(state: Mapping[str, torch.Tensor], origin: str) -> ModelConfig | None:
    """Sizes of a whole model; None where it has one tower."""
    has_image = any(name.startswith("visual.") for name in state)
    has_text = any(name.startswith("bert.") for name in state)
    return infer_config(state, origin) if has_image and has_text else None


def _read_shards(folder: str, name: str) -> TensorFile:
    if not name.endswith(".index.json"):
        return read_tensors(store.join(folder, name))
    index = _read_json(store.join(folder, name))
    try:
        shards = sorted(set(index["weight_map"].values()))
        assert all(shard == os.path.basename(shard) for shard in shards)
    except (KeyError, TypeError, AttributeError, AssertionError):
        raise InputError(
            f"{store.join(folder, name)}: no weight_map of file names: {_DAMAGED_INDEX}"
        ) from None
    files = [read_tensors(store.join(folder, shard)) for shard in shards]
    return TensorFile(files[0].container, {k: v for file in files for k, v in file.tensors.items()}, {})


_DAMAGED_INDEX = "download the folder again"


def _read_json(path: str) -> dict[str, Any]:
    try:
        value = json.loads(store.read_text(path))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable JSON ({error}): {_DAMAGED_INDEX}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object: {_DAMAGED_INDEX}")
    return value


def _with_hugging_face_config(weights: Weights, path: str) -> Weights:
    """Check config.json against what Chinese CLIP is, and take the numbers of heads from it."""
    settings = _read_json(path)
    if settings.get("model_type") == "bert":
        _check(settings, _FIXED_TEXT, path, "")
        heads = settings.get("num_attention_heads")
        return replace(weights, facts={**weights.facts, "text heads": str(heads)})
    if settings.get("model_type") != "chinese_clip" or weights.config is None:
        return weights
    vision, text = settings.get("vision_config") or {}, settings.get("text_config") or {}
    _check(vision, _FIXED_VISION, path, "vision_config.")
    _check(text, _FIXED_TEXT, path, "text_config.")
    text_heads = int(text.get("num_attention_heads", weights.config.text.heads))
    config: ModelConfig = replace(weights.config, text=replace(weights.config.text, heads=text_heads))
    if isinstance(config.vision, VisionTransformerConfig):
        heads = int(vision.get("num_attention_heads", config.vision.heads))
        config = replace(config, vision=replace(config.vision, heads=heads))
    if config != weights.config:  # heads of none of the known sizes
        config = replace(config, name="custom")
    return replace(weights, config=config)


def _check(settings: Mapping[str, Any], fixed: Mapping[str, Any], path: str, prefix: str) -> None:
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise InputError(
                f"{path}: {prefix}{key} is {settings[key]!r}, but Chinese CLIP has {value!r}: features differ"
            )


def _describe_part(weights: Weights) -> str:
    towers = matching_towers(weights.state)
    if weights.has_image_tower:
        return f"{weights.format}: only an image tower (of {', '.join(towers['image']) or 'no known model'})"
    return f"{weights.format}: only a text tower (of {', '.join(towers['text']) or 'no known model'})"
