"""Names of tensors: every layout that weights come in, turned into Chinese CLIP's, and Hugging Face's back.

Chinese CLIP's layout is the one of its released `.pt` files: `visual.*` as in OpenAI CLIP, `bert.*` as in
Hugging Face's BERT, `text_projection`, `logit_scale`. The layout is told by these names, never by the file's.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pipeline.core.records import InputError
from training.model.config import (
    MODELS,
    ModelConfig,
    ModifiedResNetConfig,
    TextConfig,
    VisionConfig,
    VisionTransformerConfig,
)
from training.weights.weights import from_module_names, is_image_side

Layout = Literal["chinese_clip", "hugging_face", "image_tower", "hugging_face_english", "bert", "module"]

# Hugging Face's ChineseCLIP ↔ Chinese CLIP, the image tower; `pre_layrnorm` is spelt so in the library
_HUGGING_FACE = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.", "bert."),
)
_HUGGING_FACE_BLOCK = (
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_HUGGING_FACE_TRANSPOSED = (
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
)
_QKV = re.compile(r"(visual\.transformer\.resblocks\.\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_IN_PROJ = re.compile(r"(visual\.transformer\.resblocks\.\d+)\.attn\.in_proj_(weight|bias)")
_FLASH_TEXT = re.compile(r"(bert\.encoder\.layer\.\d+\.attention\.self)\.Wqkv\.(weight|bias)")
# What released files hold beside the weights: buffers, and heads that Chinese CLIP leaves out (A.2)
_LEFT_OUT = re.compile(
    r"(bert\.pooler\.|bert\.embeddings\.(position_ids|token_type_ids)$|cls\.|qa_outputs\.|classifier\."
    r"|vision_model\.embeddings\.position_ids$)"
)


@dataclass(frozen=True, slots=True)
class Renamed:
    """A state in Chinese CLIP's names, and the names in the file that have no place in it."""

    layout: Layout
    state: dict[str, torch.Tensor]
    dropped: tuple[str, ...]


def rename(tensors: Mapping[str, torch.Tensor], origin: str) -> Renamed:
    """Recognise the layout and translate it; InputError names `origin` where it is none of those known.

    Only what a layout is known to hold besides is dropped; any other tensor keeps its name, so that whoever
    fills a model reports it as unexpected.
    """
    layout = _recognise(tensors)
    if layout is None:
        examples = ", ".join(list(tensors)[:4])
        raise InputError(
            f"{origin}: tensors named like {examples}: neither Chinese CLIP, Hugging Face's ChineseCLIP,"
            " OpenAI CLIP, OpenCLIP nor BERT; give the weights of one of these"
        )
    if layout == "module":
        return Renamed(layout, from_module_names(tensors), ())
    if layout in ("hugging_face", "hugging_face_english"):
        return _from_hugging_face(layout, tensors)
    if layout == "image_tower":
        taken = {name: tensor for name, tensor in tensors.items() if is_image_side(name)}
        return Renamed(layout, taken, tuple(name for name in tensors if name not in taken))
    state: dict[str, torch.Tensor] = {}
    dropped = []
    for original, tensor in tensors.items():
        name = original
        if layout == "bert":
            name = name if name.startswith(("bert.", "cls.")) else f"bert.{name}"
            name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
            name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if _LEFT_OUT.match(name) or (layout == "bert" and re.match(r"bert\.(qa_outputs|classifier)\.", name)):
            dropped.append(original)
        elif match := _FLASH_TEXT.fullmatch(name):  # trained with flash attention: one tensor for three
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[f"{match[1]}.{part}.{match[2]}"] = third
        else:
            state[re.sub(r"\.attn\.Wqkv\.(weight|bias)$", r".attn.in_proj_\1", name)] = tensor
    return Renamed(layout, state, tuple(dropped))


def _recognise(names: Mapping[str, object]) -> Layout | None:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has("vision_model."):
        return "hugging_face_english" if has("text_model.encoder.layers.") else "hugging_face"
    if has("visual.patch_embed.") or has("visual.stem."):
        return "module"
    if has("visual."):
        return "chinese_clip" if has("bert.") else "image_tower"
    if has("bert.") or has("embeddings.word_embeddings.") or has("encoder.layer."):
        return "bert"
    return None


def _from_hugging_face(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Renamed:
    state: dict[str, torch.Tensor] = {}
    thirds: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    dropped = []
    for old, tensor in tensors.items():
        name = old
        for theirs, ours in _HUGGING_FACE:
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        for theirs, ours in _HUGGING_FACE_BLOCK if name.startswith("visual.") else ():
            name = name.replace(theirs, ours)
        english = layout == "hugging_face_english" and (
            name.startswith("bert.") or old == "text_projection.weight"
        )
        if english or _LEFT_OUT.match(name):
            dropped.append(old)
        elif match := _QKV.fullmatch(name):
            thirds.setdefault((match[1], match[3]), {})[match[2]] = tensor
        elif old in dict(_HUGGING_FACE_TRANSPOSED):
            state[dict(_HUGGING_FACE_TRANSPOSED)[old]] = tensor.T
        else:
            state[name] = tensor
    for (block, kind), parts in thirds.items():
        if len(parts) == 3:  # else the joined tensor is reported as missing
            state[f"{block}.attn.in_proj_{kind}"] = torch.cat([parts[one] for one in "qkv"])
    return Renamed(layout, state, tuple(dropped))


def to_hugging_face(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state in Chinese CLIP's names as Hugging Face's ChineseCLIP names it; ViT only."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if match := _IN_PROJ.fullmatch(name):
            block = match[1].replace("visual.transformer.resblocks.", "vision_model.encoder.layers.")
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{block}.self_attn.{part}_proj.{match[2]}"] = third.contiguous()
            continue
        transposed = {ours: theirs for theirs, ours in _HUGGING_FACE_TRANSPOSED}
        if name in transposed:
            renamed[transposed[name]] = tensor.T.contiguous()
            continue
        new = name
        for theirs, ours in _HUGGING_FACE_BLOCK if name.startswith("visual.") else ():
            new = new.replace(ours, theirs)
        for theirs, ours in _HUGGING_FACE:
            new = theirs + new.removeprefix(ours) if new.startswith(ours) else new
        renamed[new] = tensor
    return renamed


# Sizes, from the shapes alone


def infer_config(state: Mapping[str, torch.Tensor], origin: str) -> ModelConfig:
    """The sizes of a state in Chinese CLIP's names: one of MODELS where it fits, with the state's vocabulary.

    Shapes do not show the number of heads: for a size that is none of MODELS it is a 64th of the width, as
    OpenAI's and Hugging Face's code assume. InputError where sizes cannot be told.
    """
    vision, text = infer_vision(state), infer_text(state)
    projection = state.get("text_projection")
    if vision is None or text is None or projection is None or projection.ndim != 2:
        raise InputError(
            f"{origin}: its sizes cannot be told, since {_what_is_lacking(state)}; give a whole model"
        )
    for known in MODELS.values():
        same_text = replace(known.text, vocab_size=text.vocab_size)
        if (
            _as_shapes_show(known.vision) == _as_shapes_show(vision)
            and (same_text.layers, same_text.width, same_text.max_positions)
            == (text.layers, text.width, text.max_positions)
            and known.embed_dim == projection.shape[1]
        ):
            return replace(known, text=same_text)
    return ModelConfig(name="custom", embed_dim=int(projection.shape[1]), vision=vision, text=text)


def matching_towers(state: Mapping[str, torch.Tensor]) -> dict[Literal["image", "text"], list[str]]:
    """Names of the models whose image tower, and whose text tower, has the sizes of the state's."""
    vision, text = infer_vision(state), infer_text(state)
    return {
        "image": [
            name
            for name, known in MODELS.items()
            if vision is not None and _as_shapes_show(known.vision) == _as_shapes_show(vision)
        ],
        "text": [
            name
            for name, known in MODELS.items()
            if text is not None and (known.text.layers, known.text.width) == (text.layers, text.width)
        ],
    }


def infer_vision(state: Mapping[str, torch.Tensor]) -> VisionConfig | None:
    """Sizes of the image tower; None where there is none, or what tells them is missing."""
    conv = state.get("visual.conv1.weight")
    if conv is None or conv.ndim != 4:
        return None
    positions = state.get("visual.positional_embedding", state.get("visual.attnpool.positional_embedding"))
    if positions is None or positions.ndim != 2:
        return None
    side = math.isqrt(positions.shape[0] - 1)
    if "visual.positional_embedding" in state:
        width, patch = int(conv.shape[0]), int(conv.shape[-1])
        layers = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
        return VisionTransformerConfig(
            image_size_px=side * patch,
            patch_size_px=patch,
            layers=layers,
            width=width,
            heads=max(1, width // 64),
        )
    one, two, three, four = (_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    width = int(positions.shape[1])
    return ModifiedResNetConfig(image_size_px=side * 32, blocks=(one, two, three, four), width=width)


def infer_text(state: Mapping[str, torch.Tensor]) -> TextConfig | None:
    """Sizes of the text tower; None where there is none."""
    words = state.get("bert.embeddings.word_embeddings.weight")
    positions = state.get("bert.embeddings.position_embeddings.weight")
    if words is None or positions is None or words.ndim != 2 or positions.ndim != 2:
        return None
    width = int(words.shape[1])
    return TextConfig(
        layers=_count(state, r"bert\.encoder\.layer\.(\d+)\."),
        width=width,
        heads=max(1, width // 64),
        vocab_size=int(words.shape[0]),
        max_positions=int(positions.shape[0]),
    )


def _as_shapes_show(config: VisionConfig) -> VisionConfig:
    """Without the number of heads; a ResNet's resolution down to what fills its grid of 32-pixel cells."""
    if isinstance(config, VisionTransformerConfig):
        return replace(config, heads=0)
    return replace(config, image_size_px=config.image_size_px // 32 * 32)


def _count(names: Mapping[str, object], pattern: str) -> int:
    """One more than the highest number that the pattern finds in the names."""
    numbers = (int(match[1]) for name in names if (match := re.match(pattern, name)))
    return 1 + max(numbers, default=-1)


def _what_is_lacking(state: Mapping[str, torch.Tensor]) -> str:
    needed = ["text_projection", "visual.conv1.weight", "bert.embeddings.word_embeddings.weight"]
    needed += ["bert.embeddings.position_embeddings.weight"]
    lacking = [name for name in needed if name not in state]
    if not any(name.endswith("positional_embedding") for name in state):
        lacking.append("visual.positional_embedding")
    return f"it lacks {', '.join(lacking)}" if lacking else "tensors have unusual shapes"
