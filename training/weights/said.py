"""What the configuration next to weights says of them: heads and activation, which no shape shows."""

from collections.abc import Mapping
from typing import Any, cast, get_args

from pipeline.core import store
from pipeline.core.files.foreign import foreign, parse_json
from pipeline.core.records import InputError
from training.model.config import Activation
from training.weights.sizes import Said

RESNET_TYPE = "chinese_clip_resnet"  # as training.model.modeling_chinese_clip_resnet has it
_DAMAGED = "download the folder again"
# What has to be so in a Hugging Face config.json for the features to be Chinese CLIP's.
_FIXED_VISION = {"layer_norm_eps": 1e-5}
_FIXED_TEXT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
# Of a tower whose config.json says nothing of them: transformers' defaults, of all three classes.
_HUGGING_FACE_HEADS, _HUGGING_FACE_WIDTH = 12, 768
_RESNET_SIZE_PX = 224  # of one whose config.json says nothing of it, as the class of RESNET_TYPE has it
_OPEN_CLIP_HEAD_WIDTH = 64  # of a tower whose configuration says nothing of it (open_clip's default)


def read_object(path: str) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        InputError: if it holds anything else.
    """
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
        heads, width = _heads(settings, path, "")
        return Said(text_heads=heads, text_width=width)
    if kind not in ("chinese_clip", RESNET_TYPE, "clip"):
        return Said()
    vision = _tower(settings, "vision_config", path)
    if kind == RESNET_TYPE:
        text_heads, text_width = _text_heads(settings, path)
        size = _number(vision, "image_size", path, _RESNET_SIZE_PX)
        return Said(text_heads=text_heads, text_width=text_width, image_size_px=size)
    image_heads, image_width = _heads(vision, path, "vision_config.")
    if kind == "clip":  # English: its text tower is left out
        activation = _activation(vision, path, "English CLIPs have")
        return Said(image_heads=image_heads, image_width=image_width, activation=activation)
    _check(vision, _FIXED_VISION, path, "vision_config.")
    text_heads, text_width = _text_heads(settings, path)
    return Said(
        image_heads=image_heads,
        image_width=image_width,
        text_heads=text_heads,
        text_width=text_width,
        activation=_activation(vision, path, "Chinese CLIP has"),
    )


def _activation(vision: Mapping[str, Any], path: str, who: str) -> Activation:
    found = vision.get("hidden_act", "quick_gelu")
    for known in get_args(Activation):
        if found == known:
            return cast(Activation, known)
    raise InputError(
        f"{path}: vision_config.hidden_act is {str(found)[:80]!r}, but {who}"
        f" {' or '.join(map(repr, get_args(Activation)))}: features differ"
    )


def _text_heads(settings: Mapping[str, Any], path: str) -> tuple[int, int | None]:
    """Return what `_heads` does, of a Chinese CLIP's text tower."""
    text = _tower(settings, "text_config", path)
    _check(text, _FIXED_TEXT, path, "text_config.")
    return _heads(text, path, "text_config.")


def _of_open_clip(path: str) -> Said:
    settings = _part(read_object(path), "model_cfg", path)
    vision = _part(settings, "vision_cfg", path)
    if isinstance(vision.get("layers"), list) or type(vision.get("width")) is not int:
        return Said()  # a ResNet, or a tower of timm's
    width = _number(vision, "width", path, 0)
    head_width = _number(vision, "head_width", path, _OPEN_CLIP_HEAD_WIDTH)
    if width % head_width:
        raise InputError(
            f"{path}: head_width {head_width} does not divide width {width}: the number of attention"
            f" heads of the image tower is unknown; {_DAMAGED}"
        )
    activation: Activation = "quick_gelu" if settings.get("quick_gelu") else "gelu"
    return Said(image_heads=width // head_width, image_width=width, activation=activation)


def _tower(settings: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    """Return a tower's settings as transformers takes them: `<key>_dict`, if there is one, replaces all."""
    part = _part(settings, key, path)
    return part if settings.get(f"{key}_dict") is None else _part(settings, f"{key}_dict", path)


def _heads(settings: Mapping[str, Any], path: str, prefix: str) -> tuple[int, int | None]:
    """Return a tower's heads, and the width that they belong to.

    transformers has 12 heads for every width if the file gives none. That is only what a tower was
    trained with if its heads are 64 wide, as they are in every published one of 12.
    """
    width = settings.get("hidden_size")
    if width is not None:
        width = _number(settings, "hidden_size", path, 0)
    if "num_attention_heads" in settings:
        return _number(settings, "num_attention_heads", path, 0), width
    width = _HUGGING_FACE_WIDTH if width is None else width
    if width != _HUGGING_FACE_WIDTH:
        raise InputError(
            f"{path}: {prefix}num_attention_heads is absent, and its default of {_HUGGING_FACE_HEADS} is that"
            f" of width {_HUGGING_FACE_WIDTH}, not of {width}: {_DAMAGED}, or write it into the file"
        )
    return _HUGGING_FACE_HEADS, width


def _part(settings: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    part = settings.get(key)
    part = {} if part is None else part
    if not isinstance(part, Mapping):
        raise InputError(f"{path}: {key} is not an object: {_DAMAGED}")
    return part


def _number(settings: Mapping[str, Any], key: str, path: str, default: int) -> int:
    number = settings.get(key, default)
    if type(number) is not int or not 0 < number < 10_000:
        raise InputError(f"{path}: {key} is {str(number)[:40]}, which is not a number of them: {_DAMAGED}")
    return number


def _check(settings: Mapping[str, Any], fixed: Mapping[str, Any], path: str, prefix: str) -> None:
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise InputError(
                f"{path}: {prefix}{key} is {str(settings[key])[:80]!r}, but Chinese CLIP has {value!r}:"
                " features differ"
            )
