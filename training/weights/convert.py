"""`cnclip convert` and `cnclip inspect`: weights from one format to another, and what a file holds."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.core import store
from pipeline.core.records import ConfigError
from training.model.clip import CLIP
from training.model.config import RESNET_CELL_PX, VisionTransformerConfig
from training.model.tokenizer import Tokenizer
from training.weights.export import save_cn_clip, save_hugging_face, save_onnx, save_safetensors
from training.weights.formats import Weights, build_model, read_weights
from training.weights.hub.locate import locate
from training.weights.model_card import RESNET_CODE, facts_of
from training.weights.sizes import matching_towers
from training.weights.vocabulary_lookup import find_vocabulary
from training.weights.weights import not_finite

Target = Literal["cn_clip", "hugging_face", "safetensors", "onnx"]
TARGETS: tuple[Target, ...] = ("cn_clip", "hugging_face", "safetensors", "onnx")
_PUBLIC_VOCAB_SIZE = 21128  # of Chinese BERT, which cn_clip brings along
_LISTED = 12  # tensor names that `inspect` prints of each kind


def target_of(out: str, to: str | None) -> Target:
    """Return the format to write: `to`, else by the name.

    Names end in `.pt`, `.safetensors` or `.onnx`; any other means `hugging_face`.
    """
    if to is not None:
        return next(target for target in TARGETS if target == to)
    ending = os.path.splitext(out.rstrip("/"))[1]
    by_ending: dict[str, Target] = {
        ".pt": "cn_clip",
        ".pth": "cn_clip",
        ".safetensors": "safetensors",
        ".onnx": "onnx",
    }
    return by_ending.get(ending, "hugging_face")


def convert(
    source: str,
    out: str,
    *,
    to: str | None = None,
    vocabulary: str | None = None,
    image_size_px: int | None = None,
) -> list[str]:
    """Convert weights of any known format; return lines that say what was written.

    Raises:
        ConfigError: if `out` is `source`, or the format cannot hold the model.
        InputError: as reading raises it.
    """
    target = target_of(out, to)
    given = source
    source, origin = locate(given)
    if store.is_local(source) and os.path.exists(out) and os.path.samefile(source, out):
        raise ConfigError(f"{out}: is also the input: give another path")
    weights = read_weights(source)
    model = build_model(weights, image_size_px=image_size_px)
    facts = facts_of(source, weights.facts)
    if origin != given:
        facts["source"] = origin
    lines = [f"{origin}: {weights.format}, {model.config.name}"]
    if target == "cn_clip":
        save_cn_clip(out, model)
        written = out
        if model.config.text.vocab_size != _PUBLIC_VOCAB_SIZE:  # cn_clip has the public one
            beside = f"{os.path.splitext(out)[0]}.vocab.txt"
            find_vocabulary(source, model.config.text.vocab_size, given=vocabulary).save_vocabulary(beside)
            written += f" and its vocabulary {beside}"
        vision = model.config.vision
        if not isinstance(vision, VisionTransformerConfig) and vision.image_size_px % RESNET_CELL_PX:
            written += (
                f"; cn_clip's image features differ: of {vision.image_size_px} px it drops rows and columns"
                f" that this project keeps, as of any size that is no multiple of {RESNET_CELL_PX}"
            )
    elif target == "hugging_face":
        tokenizer = find_vocabulary(source, model.config.text.vocab_size, given=vocabulary)
        save_hugging_face(out, model, tokenizer, facts)
        is_vit = isinstance(model.config.vision, VisionTransformerConfig)
        code = "" if is_vit else f"{RESNET_CODE}, "
        trust = "" if is_vit else " it has a ResNet: load it with AutoModel and trust_remote_code=True;"
        written = (
            f"{out}: config.json, {code}model.safetensors, the tokenizer's and the processor's files,"
            f' README.md;{trust} load its processor with backend="pil": transformers\' default resizes with'
            " other rounding, pixels differ by up to 2 of 255, at hard edges by up to about 30"
        )
    elif target == "safetensors":
        written = _write_safetensors(source, out, model, facts, vocabulary)
    else:
        prefix = out.removesuffix("onnx") if out.endswith(".onnx") else store.join(out, "")
        differences = save_onnx(prefix, model)
        written = ", ".join(
            f"{prefix}{side}.onnx (differs by {difference:.0e} under onnxruntime)"
            for side, difference in differences.items()
        )
    return [*lines, f"wrote {written}"]


def _write_safetensors(
    source: str, out: str, model: CLIP, facts: dict[str, str], vocabulary: str | None
) -> str:
    tokenizer: Tokenizer = find_vocabulary(source, model.config.text.vocab_size, given=vocabulary)
    if out.endswith(".safetensors"):
        stem = out.removesuffix(".safetensors")
        path, card, words = out, f"{stem}.md", f"{stem}.vocab.txt"
    else:
        path, card, words = (
            store.join(out, name) for name in ("model.safetensors", "README.md", "vocab.txt")
        )
    save_safetensors(path, model, tokenizer, facts, card=card, vocabulary=words)
    return f"{path}, its model card {card} and its vocabulary {words}"


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a file or folder of weights is, which model it holds, and what is missing in it."""

    origin: str  # the path or name that was given, with the revision that it stands for
    path: str  # of the file, which is in the cache for a name
    format: str
    model: str  # in words: sizes, or the towers that the tensors are of
    parameters: int
    tensors: int
    dtypes: list[str]
    facts: dict[str, str]  # what the file says about itself
    missing: list[str]  # names of tensors, as the lists below
    unexpected: list[str]
    of_another_shape: list[str]
    left_out: list[str]  # tensors of the file that have no place in a model
    notes: list[str]
    not_finite: list[str]

    def lines(self) -> list[str]:
        """Return lines for people; long lists are cut."""
        lines = [
            self.origin,
            *([f"  file        {self.path}"] if self.origin != self.path else []),
            f"  format      {self.format}",
            f"  model       {self.model}",
            f"  parameters  {self.parameters:,} in {self.tensors} tensors, {', '.join(self.dtypes)}",
        ]
        lines += [f"  {key:<11} {value}" for key, value in self.facts.items()]
        lists = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.of_another_shape),
            ("left out", self.left_out),
        )
        lines += [f"  {kind:<11} {_listed(names)}" for kind, names in lists]
        lines += [f"  note        {remark}" for remark in self.notes]
        if self.not_finite:
            lines.append(f"  not finite  {_listed(self.not_finite)}")
        return lines


def examine(path: str) -> Inspected:
    """Read weights, a file, a folder or a name, and return what they are.

    Raises:
        InputError: as reading raises it.
    """
    path, origin = locate(path)
    weights = read_weights(path)
    problems = weights.problems()
    return Inspected(
        origin=origin,
        path=path,
        format=weights.format,
        model=_model(weights),
        parameters=sum(
            tensor.numel() for name, tensor in weights.state.items() if not name.endswith(_STATISTICS)
        ),
        tensors=len(weights.state),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.state.values()}),
        facts={key: str(value) for key, value in sorted(weights.facts.items()) if key != "format"},
        missing=problems.get("missing", []),
        unexpected=problems.get("unexpected", []),
        of_another_shape=problems.get("of another shape", []),
        left_out=list(weights.dropped),
        notes=list(weights.remarks),
        not_finite=not_finite(weights.state),
    )


def inspect(path: str) -> list[str]:
    """Return lines that say what a file, folder or name stands for, which model it is, and what it lacks."""
    return examine(path).lines()


_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


def _model(weights: Weights) -> str:
    if weights.config is not None:
        config = weights.config
        return (
            f"{config.name}: {config.vision.image_size_px} px, {config.embed_dim} dimensions, text tower of"
            f" {config.text.layers} layers, {config.text.vocab_size:,} tokens in its vocabulary"
        )
    towers = matching_towers(weights.state)
    side: Literal["image", "text"] = "image" if weights.has_image_tower else "text"
    return f"{side} tower only, as in {', '.join(towers[side]) or 'no known model'}"


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f", … ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(_first(names)) + more


def _first(names: list[str]) -> Iterator[str]:
    yield from names[:_LISTED]
