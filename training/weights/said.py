"""What the configuration next to weights says of them: heads and activation, which no shape shows."""

from collections.abc import Mapping
from typing import Any

from pipeline.core import store
from pipeline.core.files.foreign import foreign, parse_json
from pipeline.core.records import InputError
from training.weights.sizes import Said

_DAMAGED = "download the folder again"
# What has to be so in a Hugging Face config.json for the features to be Chinese CLIP's.
_FIXED_VISION = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_FIXED_TEXT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
_HUGGING_FACE_HEADS = 12  # of a tower whose config.json says nothing of them (transformers' default)
_OPEN_CLIP_HEAD_WIDTH = 64  # of a tower whose configuration says nothing of it (open_clip's default)


def read_object(path: str) -> dict[str, Any]:
    """Return the JSON object of a file; InputError if it holds anything else."""
    with foreign(path, "JSON file", _DAMAGED):
        value = parse_json(store.read_bytes(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object: {_DAMAGED}")
    return value


def read_said(folder: str, names: list[str]) -> Said:
    """Return what the configuration files of a folder say.

    Raises:
        InputError: if one of them cannot be read, or has settings that Chinese CLIP does not have.
    """
    if "open_clip_config.json" in names:
        return _of_open_clip(store.join(folder, "open_clip_config.json"))
    if "config.json" in names:
        return _of_hugging_face(store.join(folder, "config.json"))
    return Said()


def _of_hugging_face(path: str) -> Said:
    settings = read_object(path)
    kind = settings.get("model_type")
    if kind == "bert":
        _check(settings, _FIXED_TEXT, path, "")
        return Said(text_heads=_number(settings, "num_attention_heads", path, _HUGGING_FACE_HEADS))
    if kind not in ("chinese_clip", "clip"):
        return Said()
    vision, text = _part(settings, "vision_config", path), _part(settings, "text_config", path)
    image_heads = _number(vision, "num_attention_heads", path, _HUGGING_FACE_HEADS)
    if kind == "clip":  # English: its text tower is left out
        activation = vision.get("hidden_act", "quick_gelu")
        return Said(image_heads=image_heads, activation=str(activation)[:40])
    _check(vision, _FIXED_VISION, path, "vision_config.")
    _check(text, _FIXED_TEXT, path, "text_config.")
    text_heads = _number(text, "num_attention_heads", path, _HUGGING_FACE_HEADS)
    return Said(image_heads=image_heads, text_heads=text_heads, activation="quick_gelu")


def _of_open_clip(path: str) -> Said:
    settings = _part(read_object(path), "model_cfg", path)
    vision = _part(settings, "vision_cfg", path)
    if isinstance(vision.get("layers"), list) or not isinstance(vision.get("width"), int):
        return Said()  # a ResNet, or a tower of timm's
    head_width = _number(vision, "head_width", path, _OPEN_CLIP_HEAD_WIDTH)
    activation = "quick_gelu" if settings.get("quick_gelu") else "gelu"
    return Said(image_heads=vision["width"] // head_width, activation=activation)


def _part(settings: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    part = settings.get(key) or {}
    if not isinstance(part, Mapping):
        raise InputError(f"{path}: {key} is no object: {_DAMAGED}")
    return part


def _number(settings: Mapping[str, Any], key: str, path: str, default: int) -> int:
    number = settings.get(key, default)
    if type(number) is not int or not 0 < number < 10_000:
        raise InputError(f"{path}: {key} is {str(number)[:40]}, which is no number of them: {_DAMAGED}")
    return number


def _check(settings: Mapping[str, Any], fixed: Mapping[str, Any], path: str, prefix: str) -> None:
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise InputError(
                f"{path}: {prefix}{key} is {str(settings[key])[:80]!r}, but Chinese CLIP has {value!r}:"
                " features differ"
            )
