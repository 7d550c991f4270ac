"""The model's tensors under the names that files give them; our checkpoints, and OpenAI CLIP's archives.

Files name the image tower's tensors as OpenAI CLIP and Chinese CLIP do (`visual.*`); the model names them as
timm does. The two tables below are the whole translation, in both directions.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.core import store
from pipeline.core.files.foreign import foreign, parse_json
from pipeline.core.files.written import check_safetensors, naming
from pipeline.core.records import InputError
from training.model.clip import CLIP
from training.model.config import ModelConfig, VisionTransformerConfig
from training.weights.tensor_files import METADATA_KEY
from training.weights.torchscript import write_torchscript
from training.weights.unpickle import local_copy

# timm's name (a pattern) → OpenAI's, first match wins
_VIT_NAMES = (
    (r"patch_embed\.proj\.", r"conv1."),
    (r"cls_token", r"class_embedding"),
    (r"pos_embed", r"positional_embedding"),
    (r"norm_pre\.", r"ln_pre."),
    (r"blocks\.(\d+)\.norm([12])\.", r"transformer.resblocks.\1.ln_\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"transformer.resblocks.\1.attn.in_proj_"),
    (r"blocks\.(\d+)\.attn\.proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"norm\.", r"ln_post."),
    (r"head\.weight", r"proj"),
)
_RESNET_NAMES = (
    (r"stem\.conv(\d)\.(conv|bn)\.", r"\2\1."),
    *(
        rule
        for stage in range(4)  # timm counts stages from 0, OpenAI layers from 1
        for rule in (
            (rf"stages\.{stage}\.(\d+)\.conv(\d)_(?:1x1|kxk)\.(conv|bn)\.", rf"layer{stage + 1}.\1.\3\2."),
            (rf"stages\.{stage}\.(\d+)\.shortcut\.conv\.conv\.", rf"layer{stage + 1}.\1.downsample.0."),
            (rf"stages\.{stage}\.(\d+)\.shortcut\.conv\.bn\.", rf"layer{stage + 1}.\1.downsample.1."),
        )
    ),
    (r"head\.pos_embed", r"attnpool.positional_embedding"),
    (r"head\.([qkv])\.", r"attnpool.\1_proj."),
    (r"head\.proj\.", r"attnpool.c_proj."),
)

# Tensors that OpenAI lays out otherwise than timm: timm's name → (to OpenAI's layout, to timm's)
_Layout = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]
_VIT_LAYOUTS: dict[str, _Layout] = {
    "cls_token": (lambda tensor_11W: tensor_11W[0, 0], lambda tensor_W: tensor_W[None, None]),
    "pos_embed": (lambda tensor_1PW: tensor_1PW[0], lambda tensor_PW: tensor_PW[None]),
    "head.weight": (lambda tensor_DW: tensor_DW.T, lambda tensor_WD: tensor_WD.T),
}

LOGIT_BIAS = "logit_bias"  # only weights that the sigmoid loss trained have it

MOST_LAYERS = 200  # of a tower, or of a stage of it: a name with more is no layer's
_MOST_OF_A_SIZE = 1 << 24  # width, positions, pixels, words: of a header from elsewhere


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a file's tensor in the model, and the difference in layout."""

    target: torch.Tensor
    to_file: Callable[[torch.Tensor], torch.Tensor]
    to_model: Callable[[torch.Tensor], torch.Tensor]


def tensor_slots(model: CLIP) -> dict[str, Slot]:
    """Yield every tensor of the model by its name in Chinese CLIP's layout."""
    is_vit = isinstance(model.config.vision, VisionTransformerConfig)
    rules = _VIT_NAMES if is_vit else _RESNET_NAMES
    layouts = _VIT_LAYOUTS if is_vit else {}
    slots: dict[str, Slot] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in ("logit_scale", LOGIT_BIAS):
            slots[name] = Slot(tensor, lambda tensor_1: tensor_1[0], lambda tensor_: tensor_.reshape(1))
        elif name.startswith("visual."):
            timm_name = name.removeprefix("visual.")
            slots[f"visual.{_rename(timm_name, rules)}"] = Slot(
                tensor, *layouts.get(timm_name, (_unchanged, _unchanged))
            )
        else:
            slots[name] = Slot(tensor, _unchanged, _unchanged)
    return slots


def from_module_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state with the names of `CLIP.state_dict`, as in checkpoints, in Chinese CLIP's layout.

    A tensor of the image tower that has no name there keeps its own.
    """
    is_vit = any(name.startswith("visual.patch_embed.") for name in tensors)
    rules, layouts = (_VIT_NAMES, _VIT_LAYOUTS) if is_vit else (_RESNET_NAMES, {})
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name == "logit_scale":
            state[name] = tensor.reshape(())
        elif name.startswith("visual."):
            timm_name = name.removeprefix("visual.")
            try:
                renamed = f"visual.{_rename(timm_name, rules)}"
            except ValueError:
                renamed = name
            state[renamed] = layouts.get(timm_name, (_unchanged, _unchanged))[0](tensor)
        else:
            state[name] = tensor
    return state


def _rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        renamed, hits = re.subn(f"^{pattern}", replacement, name)
        if hits:
            return renamed
    raise ValueError(f"no name in OpenAI CLIP's layout for the tensor {name}")


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def state_for_file(model: CLIP) -> dict[str, torch.Tensor]:
    """Return the model's tensors in Chinese CLIP's names and layout, on the CPU; `logit_scale` has shape
    [].
    """
    return {
        name: slot.to_file(slot.target.detach()).cpu().contiguous()
        for name, slot in tensor_slots(model).items()
    }


def misfits(slots: Mapping[str, Slot], state: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Return names of tensors that only the file or only the model has, by kind; empty if all fit."""
    missing = [name for name in slots if name not in state and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in state if name not in slots]
    misshapen = [
        f"{name} is {list(state[name].shape)}, not {list(slot.to_file(slot.target).shape)}"
        for name, slot in slots.items()
        if name in state and state[name].shape != slot.to_file(slot.target).shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    return {kind: sorted(names) for kind, names in kinds.items() if names}


def fill(slots: Mapping[str, Slot], state: Mapping[str, torch.Tensor], origin: str, remedy: str) -> None:
    """Copy a file's tensors into the model, all or none.

    Raises:
        InputError: for misfits, all of which it names, and if a tensor holds NaN or infinity: such weights
            give nothing but NaN.
    """
    require_fit(slots, state, origin, remedy)
    if broken := not_finite(state):
        raise InputError(
            f"{origin}: NaN or infinite values in {', '.join(sorted(broken))}: the training that wrote it"
            " went wrong, or the file is damaged; take an earlier checkpoint or download it again"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            slots[name].target.copy_(slots[name].to_model(tensor))


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity; of any type of number, 8-bit floats included."""
    return [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point()
        and not bool((tensor.float() if tensor.itemsize < 2 else tensor).isfinite().all())
    ]


def require_fit(
    slots: Mapping[str, Slot], state: Mapping[str, torch.Tensor], origin: str, remedy: str
) -> None:
    """Check that a file's tensors are those of the model.

    Raises:
        InputError: if they are not; it names every misfit.
    """
    if found := misfits(slots, state):
        problems = "; ".join(f"{kind}: {_listed(names)}" for kind, names in found.items())
        raise InputError(f"{origin}: does not fit the model: {problems}. {remedy}")


def _listed(names: Sequence[str], most: int = 24) -> str:
    shown = ", ".join(name[:120] for name in names[:most])
    return f"{shown} … ({len(names)} in all)" if len(names) > most else shown


# Our checkpoints: safetensors


def save_checkpoint(path: str, model: CLIP, config: ModelConfig, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in Chinese CLIP's names, with the configuration in its header.

    The same weights, configuration and metadata give the same bytes.

    Raises:
        ValueError: if `config` is not the model's own (`model.config`, which has the size of the vocabulary
            that it was built with).
    """
    _require_own_config(model, config)
    with store.publish(path) as temporary, naming(path):
        save_file(state_for_file(model), temporary, metadata={METADATA_KEY: header_of(config, metadata)})
        check_safetensors(temporary, path)


def header_of(config: ModelConfig, metadata: Mapping[str, str]) -> str:
    """Return the JSON under METADATA_KEY in this project's files: configuration and metadata."""
    sizes = dataclasses.asdict(config)
    for key, paper in (("feed_forward", None), ("activation", "quick_gelu")):
        if sizes["vision"].get(key) == paper:  # so that files of the paper's models keep their bytes
            sizes["vision"].pop(key, None)
    header = {"config": sizes, "metadata": dict(metadata)}
    return json.dumps(header, sort_keys=True, ensure_ascii=False)


def _require_own_config(model: CLIP, config: ModelConfig) -> None:
    if config != model.config:
        raise ValueError(f"the model was built from {model.config}, not from {config}: pass model.config")


def load_checkpoint(path: str, *, expected: ModelConfig | None = None) -> CLIP:
    """Rebuild the model that `save_checkpoint` wrote, in training mode, float32 on the CPU.

    Raises:
        InputError: if the file is not a checkpoint of ours, is damaged, holds tensors that its configuration
            does not have (by name), or is another model than `expected`.
    """
    with _open_safetensors(path) as file:
        config, _ = read_header(path, file.metadata() or {})
        if expected is not None:
            require_same_model(config, expected, path)
        with foreign(path, "safetensors file"):
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    remedy = "The file was not written by this version: train again"
    with torch.device("meta"):  # before memory is taken for sizes that a damaged header makes up
        require_fit(tensor_slots(_empty_for(config, state)), state, path, remedy)
    model = _empty_for(config, state)
    fill(tensor_slots(model), state, path, remedy)
    return model


def _empty_for(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> CLIP:
    model = build_empty(config)
    if LOGIT_BIAS in state:
        model.add_logit_bias()
    return model


def require_same_model(found: ModelConfig, expected: ModelConfig, path: str) -> None:
    """Check that a file's model has the name, size and vocabulary that are asked for.

    Raises:
        InputError: if one of them differs.
    """
    if found != expected:
        raise InputError(f"{path}: holds another model than asked for: {_differences(found, expected)}")


def build_empty(config: ModelConfig) -> CLIP:
    """Build a model to be filled: its random weights cost the global generator no draws."""
    with torch.random.fork_rng(devices=[]):
        return CLIP(config)


def _open_safetensors(path: str) -> Any:
    with foreign(path, "safetensors file"):
        return safe_open(local_copy(path), framework="pt")


def read_header(path: str, header: Mapping[str, str]) -> tuple[ModelConfig, dict[str, str]]:
    """Return configuration and metadata from a safetensors file's metadata.

    Raises:
        InputError: if they are not ours.
    """
    text = header.get(METADATA_KEY)
    if text is None:
        raise InputError(
            f"{path}: a safetensors file without the metadata key {METADATA_KEY!r}: not our checkpoint"
        )
    try:
        ours = parse_json(text)
        config = TypeAdapter(ModelConfig).validate_python(ours["config"])
        _require_sane(config)
        return config, dict(ours["metadata"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: the metadata key {METADATA_KEY!r} cannot be read: {reason}") from None


def _require_sane(config: ModelConfig) -> None:
    """Refuse sizes that no model has, before one is built of them.

    Raises:
        ValueError: for such sizes.
    """
    for side, tower in (("vision", config.vision), ("text", config.text)):
        for key, value in dataclasses.asdict(tower).items():
            numbers = value if isinstance(value, list | tuple) else (value,)
            most = MOST_LAYERS if key in ("layers", "blocks") else _MOST_OF_A_SIZE
            if any(isinstance(one, int) and not 0 < one <= most for one in numbers):
                raise ValueError(f"{side}.{key} is {value}")


def _differences(found: ModelConfig, expected: ModelConfig) -> str:
    found_fields, expected_fields = _flat(dataclasses.asdict(found)), _flat(dataclasses.asdict(expected))
    return ", ".join(
        f"{key} is {found_fields.get(key)}, not {expected_fields.get(key)}"
        for key in sorted(found_fields.keys() | expected_fields.keys())
        if found_fields.get(key) != expected_fields.get(key)
    )


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


# OpenAI CLIP's archives: TorchScript


def is_image_side(name: str) -> bool:
    """Return whether a Chinese model takes this from an English CLIP: image tower, projection,
    temperature.
    """
    return name.startswith("visual.") or name == "logit_scale"


def save_openai(path: str, model: CLIP, config: ModelConfig) -> None:
    """Write image tower, visual projection and temperature as OpenAI CLIP's archives, but in float32.

    `torch.jit.load(path).state_dict()` gives OpenAI's names and shapes, and next to them the numbers
    `input_resolution`, `context_length` and `vocab_size`. There is no text tower: OpenAI's layout has no
    names for BERT. OpenAI's own code takes a 64th of the width for the heads, which are not ViT-H/14's. The
    same weights give the same bytes.

    Raises:
        ValueError: if `config` is not the model's own.
    """
    _require_own_config(model, config)
    state = {name: tensor for name, tensor in state_for_file(model).items() if is_image_side(name)}
    statistics = {
        name for name in state if re.search(r"\.(running_mean|running_var|num_batches_tracked)$", name)
    }
    numbers = {
        "input_resolution": config.vision.image_size_px,
        "context_length": config.text.max_positions,
        "vocab_size": config.text.vocab_size,
    }
    write_torchscript(
        path,
        parameters={name: tensor for name, tensor in state.items() if name not in statistics},
        buffers={name: state[name] for name in state if name in statistics}
        | {name: torch.tensor(number) for name, number in numbers.items()},
    )
