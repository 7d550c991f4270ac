"""Read weights of any known format, which the content of the file or folder tells.

The formats are Chinese CLIP's `.pt`, Hugging Face's ChineseCLIP folder, OpenAI CLIP's TorchScript, OpenCLIP's
and LAION's state dicts, HFL's RoBERTa and RBT3 folders, this project's checkpoints, and DeepSpeed's folders.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from pipeline.core import store
from pipeline.core.files.foreign import foreign
from pipeline.core.processes import say
from pipeline.core.records import InputError
from training.model.clip import CLIP
from training.model.config import MODELS, ModelConfig, VisionTransformerConfig, at_size
from training.weights.hub.cache import is_snapshot
from training.weights.hub.locate import local_path
from training.weights.layouts import Layout, rename
from training.weights.said import read_object, read_said
from training.weights.sizes import Said, infer_config, matching_towers
from training.weights.tensor_files import METADATA_KEY, TensorFile, read_tensors
from training.weights.weights import (
    LOGIT_BIAS,
    build_empty,
    fill,
    misfits,
    read_header,
    require_fit,
    tensor_slots,
)
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
_GIVE_WHOLE = "Give a whole Chinese CLIP model"
MAX_FACTOR = 100  # on cosines: training clamps the temperature there (section 2.2 of CLIP's paper)
_LARGEST_LOGIT_SCALE = 88.0  # its exponential is the largest of float32
_WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
_POSITIONS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")


@dataclass(frozen=True, slots=True)
class Weights:
    """What a file or folder holds, in Chinese CLIP's names."""

    path: str
    format: str  # for people
    state: dict[str, torch.Tensor]
    dropped: tuple[str, ...]  # names of the file's tensors that have no place in a model
    config: ModelConfig | None  # sizes, if both towers are there and their sizes are known
    facts: Mapping[str, str] = field(default_factory=dict)  # what the file says about itself
    said: Said = field(default_factory=Said)  # what it says of its towers, beyond the shapes of tensors
    remarks: tuple[str, ...] = ()  # what a user of these weights should know

    @property
    def has_image_tower(self) -> bool:
        return any(name.startswith("visual.") for name in self.state)

    @property
    def has_text_tower(self) -> bool:
        return any(name.startswith("bert.") for name in self.state)

    def problems(self) -> dict[str, list[str]]:
        """Return missing, unexpected and misshapen tensors by kind; of a file with one tower, of that
        tower.
        """
        config = self.config or self._likely_config()
        if config is None:
            return {}
        with foreign(self.path, "model", "give a whole Chinese CLIP model"), torch.device("meta"):
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

    `path` may also be the name of published weights or a hub's id (`training.weights.hub.names`).

    Raises:
        InputError: names the path: absent, damaged, of no known layout, or of settings that Chinese CLIP does
            not have.
    """
    path = local_path(path)
    if not store.exists(path):
        raise InputError(f"{path}: no such file or folder: give the path of weights")
    if not _is_folder(path):
        if is_snapshot(path) and os.path.basename(path) in _WEIGHT_FILES:
            return _of_library(path, os.path.dirname(path), os.path.basename(path))
        return _of_file(path, read_tensors(path))
    if (zero := find_zero_checkpoint(path)) is not None:
        file = TensorFile("torch", read_zero_checkpoint(zero))
        return _of_file(path, file, zero, kind="DeepSpeed checkpoint")
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
    return _of_library(path, path, chosen)


def load_model(path: str, *, image_size_px: int | None = None) -> CLIP:
    """Load a whole model of any known format: float32, on the CPU, in evaluation mode.

    `image_size_px` asks for another resolution than the weights'; position embeddings are then interpolated.

    Raises:
        InputError: for missing, unexpected or misshapen tensors, which it names, NaN weights, and files with
            one tower.
    """
    return build_model(read_weights(path), image_size_px=image_size_px)


def build_model(weights: Weights, *, image_size_px: int | None = None) -> CLIP:
    """Return the model of weights that were read, as `load_model` does; warns of the weights' remarks."""
    path = weights.path
    if weights.config is None:
        raise InputError(f"{path}: {_describe_part(weights)}; give a whole Chinese CLIP model")
    for remark in weights.remarks:
        say(f"{path}: {remark}")
    config, state = weights.config, weights.state
    if image_size_px is not None and image_size_px != config.vision.image_size_px:
        config = resized(config, image_size_px, path)
        state = with_resized_positions(state, config)
    with foreign(path, "model", "give a whole Chinese CLIP model"):
        with torch.device("meta"):  # before memory is taken for sizes that a damaged file makes up
            require_fit(tensor_slots(CLIP(config)), state, path, _GIVE_WHOLE)
        model = build_empty(config)
        fill(tensor_slots(model), state, path, _GIVE_WHOLE)
    return model.eval()


def resized(config: ModelConfig, image_size_px: int, origin: str) -> ModelConfig:
    """Return the configuration at another resolution.

    Raises:
        InputError: if patches do not divide it.
    """
    try:
        return at_size(config, image_size_px)
    except ValueError as error:
        raise InputError(f"{origin}: {error}") from None


def with_resized_positions(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return the state with the image tower's positions interpolated to the configuration's grid."""
    vision = config.vision
    cell = vision.patch_size_px if isinstance(vision, VisionTransformerConfig) else 32
    side = vision.image_size_px // cell
    return {
        name: resize_positions(tensor, side) if name in _POSITIONS else tensor
        for name, tensor in state.items()
    }


def resize_positions(position_PW: torch.Tensor, side: int) -> torch.Tensor:
    """Resize a position embedding [1 + n², width] to [1 + side², width].

    The class token's row stays; the grid is interpolated bicubically.

    As Chinese CLIP does it, with `align_corners=True`. It stays unchanged if the grid has that size already
    or is not square.
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
    fs, name = store.remote(path)
    return bool(fs.isdir(name))


def _of_library(path: str, folder: str, name: str) -> Weights:
    """Read a file that a library wrote into a folder, with the configuration next to it."""
    file = _read_shards(folder, name)
    said = Said() if METADATA_KEY in file.facts else read_said(folder, store.list_files(folder))
    return _of_file(path, file, store.join(folder, name), said)


def _of_file(
    path: str, file: TensorFile, origin: str | None = None, said: Said | None = None, kind: str | None = None
) -> Weights:
    origin = origin or path
    facts = dict(file.facts)
    own_config: ModelConfig | None = None
    if METADATA_KEY in facts:
        own_config, metadata = read_header(origin, facts)
        said = said_of(own_config)
        if file.container == "safetensors":
            state = {name: tensor for name, tensor in file.tensors.items() if name != LOGIT_BIAS}
            dropped = tuple(name for name in file.tensors if name not in state)
            return _checked(Weights(path, _OWN, state, dropped, own_config, metadata, said))
        del facts[METADATA_KEY]  # in a .pt that this project wrote
    renamed = rename(file.tensors, origin)
    name = _FORMATS[renamed.layout]
    if file.container == "torchscript":
        name = "OpenAI CLIP" if renamed.layout == "image_tower" else name
    container = {"torch": "torch.save", "torchscript": "TorchScript", "safetensors": "safetensors"}[
        file.container
    ]
    if said is None:
        said = Said(name=facts.get("name", ""))
    if said.text_heads is not None and renamed.layout == "bert":
        facts["text heads"] = str(said.text_heads)
    if renamed.prefixes:
        facts["prefix"] = ", ".join(renamed.prefixes)
    config = own_config or _config_of(renamed.state, origin, said)
    kind = kind or f"{name}, {container}"
    return _checked(Weights(path, kind, renamed.state, renamed.dropped, config, facts, said))


def _checked(weights: Weights) -> Weights:
    """Return the weights with a temperature of shape [] and with remarks.

    Raises:
        InputError: if the temperature is out of all bounds.
    """
    remarks = []
    scale = weights.state.get("logit_scale")
    if scale is not None and scale.numel() == 1:
        weights.state["logit_scale"] = scale = scale.reshape(())
        value = float(scale)
        if value > _LARGEST_LOGIT_SCALE:
            raise InputError(
                f"{weights.path}: logit_scale is {value:g}, whose exponential is beyond float32: it is the"
                " logarithm of the factor on cosines; store that"
            )
        if math.exp(value) > MAX_FACTOR * 1.001:
            remarks.append(
                f"logit_scale is {value:g}, a factor of {math.exp(value):,.0f} on cosines: above"
                f" {MAX_FACTOR}, to which training clamps it; probabilities are"
                " sharper than a Chinese CLIP's"
            )
    if LOGIT_BIAS in weights.dropped:
        remarks.append(
            f"{LOGIT_BIAS} is left out: these weights were trained with SigLIP's loss, whose bias changes no"
            " ranking; probabilities by softmax are not those of its training"
        )
    return replace(weights, remarks=tuple(remarks))


def said_of(config: ModelConfig) -> Said:
    """Return what a whole configuration says of the towers."""
    vision = config.vision
    if isinstance(vision, VisionTransformerConfig):
        return Said(config.name, vision.heads, config.text.heads, activation=vision.activation)
    return Said(config.name, None, config.text.heads)


def _config_of(state: Mapping[str, torch.Tensor], origin: str, said: Said) -> ModelConfig | None:
    """Return the sizes of a whole model; None if it has one tower."""
    has_image = any(name.startswith("visual.") for name in state)
    has_text = any(name.startswith("bert.") for name in state)
    return infer_config(state, origin, said) if has_image and has_text else None


def _read_shards(folder: str, name: str) -> TensorFile:
    if not name.endswith(".index.json"):
        return read_tensors(store.join(folder, name))
    index = read_object(store.join(folder, name))
    try:
        shards = sorted(set(index["weight_map"].values()))
        if not shards or any(shard != os.path.basename(shard) for shard in shards):
            raise ValueError("no names, or names of files elsewhere")
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError(
            f"{store.join(folder, name)}: no weight_map of file names: download the folder again"
        ) from None
    files = [read_tensors(store.join(folder, shard)) for shard in shards]
    return TensorFile(files[0].container, {k: v for file in files for k, v in file.tensors.items()}, {})


def _describe_part(weights: Weights) -> str:
    towers = matching_towers(weights.state)
    if weights.has_image_tower:
        return f"{weights.format}: only an image tower (of {', '.join(towers['image']) or 'no known model'})"
    return f"{weights.format}: only a text tower (of {', '.join(towers['text']) or 'no known model'})"
