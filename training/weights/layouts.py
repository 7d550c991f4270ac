"""Names of tensors: every layout that weights come in, turned into Chinese CLIP's, and Hugging Face's back.

Chinese CLIP's layout is the one of its released `.pt` files: `visual.*` as in OpenAI CLIP, `bert.*` as in
Hugging Face's BERT, `text_projection`, `logit_scale`. cnclip tells the layout by
these names, never by the file's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pipeline.core.records import InputError
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
# The same for a ResNet, as training.model.modeling_chinese_clip_resnet names it; OpenAI's names below
# `vision_model`
_HUGGING_FACE_RESNET = (
    ("visual_projection.", "visual.attnpool.c_proj."),
    ("vision_model.", "visual."),
    ("text_model.", "bert."),
)
_HUGGING_FACE_BLOCK = (
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_HUGGING_FACE_TRANSPOSED = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}
_HUGGING_FACE_RESNET_TRANSPOSED = {"text_projection.weight": "text_projection"}
_QKV = re.compile(r"(visual\.transformer\.resblocks\.\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_IN_PROJ = re.compile(r"(visual\.transformer\.resblocks\.\d+)\.attn\.in_proj_(weight|bias)")
_FLASH_TEXT = re.compile(r"(bert\.encoder\.layer\.\d+\.attention\.self)\.Wqkv\.(weight|bias)")
# What released files hold in addition to the weights: buffers, and heads that Chinese CLIP leaves out (A.2)
_LEFT_OUT = re.compile(
    r"(logit_bias$|bert\.pooler\.|bert\.embeddings\.(position_ids|token_type_ids)$|cls\.|qa_outputs\.|classifier\."
    r"|vision_model\.embeddings\.position_ids$)"
)


@dataclass(frozen=True, slots=True)
class Renamed:
    """A state in Chinese CLIP's names, and the names in the file that have no place in it."""

    layout: Layout
    state: dict[str, torch.Tensor]
    dropped: tuple[str, ...]
    prefixes: tuple[str, ...] = ()  # of wrappers, taken off names


def rename(tensors: Mapping[str, torch.Tensor], origin: str) -> Renamed:
    """Recognise the layout and translate it.

    Only what a layout is known to hold besides is dropped; any other tensor keeps its name, so that whoever
    fills a model reports it as unexpected.

    Raises:
        InputError: if it is none of those known; it names `origin`.
    """
    tensors, prefixes = unwrap(tensors, origin)
    return replace(_rename(tensors, origin), prefixes=prefixes)


# Where a model's own names begin, after the prefix of a wrapper in which the model was saved.
_ROOT = re.compile(
    r"(?:^|\.)(?=(?:visual|bert|vision_model|text_model|visual_projection)\."
    r"|(?:text_projection|logit_scale|logit_bias)(?:\.weight)?$)"
)
_ADAPTER = re.compile(r"\.(lora_[A-Za-z]+|base_layer|modules_to_save|lora_magnitude_vector)\.")


def unwrap(
    tensors: Mapping[str, torch.Tensor], origin: str
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Take a wrapper's prefix (`model.`, `clip_model.`, Lightning's, PEFT's) off the names that have one.

    Returns the tensors and the prefixes that were taken off.

    Raises:
        InputError: if the names are those of adapters (LoRA), or of several models in one file.
    """
    if adapted := next((name for name in tensors if _ADAPTER.search(f".{name}.")), None):
        raise InputError(
            f"{origin}: holds adapters ({adapted[:120]}), not whole weights: merge them"
            " (PEFT's merge_and_unload()), and save the merged model's state_dict()"
        )
    unwrapped: dict[str, torch.Tensor] = {}
    prefixes: dict[str, str] = {}  # prefix → one of its names
    for name, tensor in tensors.items():
        root = _ROOT.search(name)
        prefix = name[: root.end()] if root else ""
        inner = name[len(prefix) :]
        if inner in unwrapped:
            other = next(one for one in (*prefixes, "") if f"{one}{inner}" in tensors and one != prefix)
            places = " and ".join(one or "no prefix" for one in (other, prefix))
            raise InputError(
                f"{origin}: holds {inner[:120]} twice, below {places}: two models in one file; save the"
                " state_dict() of the one you want"
            )
        unwrapped[inner] = tensor
        if prefix:
            prefixes.setdefault(prefix, name)
    return unwrapped, tuple(prefixes)


def _rename(tensors: Mapping[str, torch.Tensor], origin: str) -> Renamed:
    layout = _recognise(tensors)
    if layout is None:
        examples = ", ".join(name[:120] for name in list(tensors)[:4])
        raise InputError(
            f"{origin}: tensors named like {examples}: neither Chinese CLIP, Hugging Face's ChineseCLIP,"
            " OpenAI CLIP, OpenCLIP nor BERT; give the weights of one of these"
        )
    if layout == "module":
        kept = {name: tensor for name, tensor in tensors.items() if not _LEFT_OUT.match(name)}
        return Renamed(layout, from_module_names(kept), tuple(name for name in tensors if name not in kept))
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
            name = _modern(name)
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
    names, transposed = _tables("vision_model.attnpool.positional_embedding" in tensors)
    for old, tensor in tensors.items():
        name = old
        for theirs, ours in names:
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        for theirs, ours in _HUGGING_FACE_BLOCK if name.startswith("visual.") else ():
            name = name.replace(theirs, ours)
        name = _modern(name)
        english = layout == "hugging_face_english" and (
            name.startswith("bert.") or old == "text_projection.weight"
        )
        if english or _LEFT_OUT.match(name):
            dropped.append(old)
        elif match := _QKV.fullmatch(name):
            thirds.setdefault((match[1], match[3]), {})[match[2]] = tensor
        elif old in transposed:
            state[transposed[old]] = tensor.T
        else:
            state[name] = tensor
    for (block, kind), parts in thirds.items():
        if len(parts) == 3:  # else the joined tensor is reported as missing
            state[f"{block}.attn.in_proj_{kind}"] = torch.cat([parts[one] for one in "qkv"])
    return Renamed(layout, state, tuple(dropped))


def _modern(name: str) -> str:
    """Return PyTorch's name of a norm in BERT; old files, and transformers 5.0, have TensorFlow's."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


def to_hugging_face(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state in Chinese CLIP's names as folders for transformers name it, of a ViT or a ResNet."""
    renamed: dict[str, torch.Tensor] = {}
    names, transposed = _tables("visual.attnpool.positional_embedding" in state)
    back = {ours: theirs for theirs, ours in transposed.items()}
    for name, tensor in state.items():
        if match := _IN_PROJ.fullmatch(name):
            block = match[1].replace("visual.transformer.resblocks.", "vision_model.encoder.layers.")
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{block}.self_attn.{part}_proj.{match[2]}"] = third.contiguous()
            continue
        if name in back:
            renamed[back[name]] = tensor.T.contiguous()
            continue
        new = name
        for theirs, ours in _HUGGING_FACE_BLOCK if name.startswith("visual.") else ():
            new = new.replace(ours, theirs)
        for theirs, ours in names:
            new = theirs + new.removeprefix(ours) if new.startswith(ours) else new
        renamed[new] = tensor
    return renamed


def _tables(is_resnet: bool) -> tuple[tuple[tuple[str, str], ...], dict[str, str]]:
    """Return the beginnings of names, theirs and ours, and the names of tensors that are transposed."""
    if is_resnet:
        return _HUGGING_FACE_RESNET, _HUGGING_FACE_RESNET_TRANSPOSED
    return _HUGGING_FACE, _HUGGING_FACE_TRANSPOSED
