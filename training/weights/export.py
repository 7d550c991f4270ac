"""Weights out: Chinese CLIP's `.pt`, a folder for transformers, safetensors with a card, and ONNX."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib import resources
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.core import store
from pipeline.core.files.written import check_safetensors, check_size, check_zip, naming
from pipeline.core.records import ConfigError
from training.config.train import CONTEXT_LENGTH
from training.model.clip import CLIP
from training.model.config import ModelConfig, TextConfig, VisionTransformerConfig
from training.model.preprocess import MEAN, STD
from training.model.tokenizer import SPECIAL_TOKENS, Tokenizer, hugging_face_tokenizer
from training.weights.layouts import to_hugging_face
from training.weights.model_card import RESNET_CODE, model_card
from training.weights.said import RESNET_TYPE
from training.weights.tensor_files import METADATA_KEY
from training.weights.weights import header_of, save_checkpoint, state_for_file

ONNX_TOLERANCE = 1e-4  # of unit-norm features, onnxruntime against torch
_ONNX_INLINE_BYTES = 1_500_000_000  # protobuf ends at 2 GB: larger weights go into a second file
# Chinese CLIP's names of its text towers, by layers and width
_TEXT_NAMES = {
    (3, 768): "RBT3-chinese",
    (12, 768): "RoBERTa-wwm-ext-base-chinese",
    (24, 1024): "RoBERTa-wwm-ext-large-chinese",
}


def save_cn_clip(path: str, model: CLIP) -> None:
    """Write the `.pt` that `cn_clip.clip.load_from_name` loads: float32, names prefixed as the released ones.

    The reference halves what it loads, so that there float32 weights come back rounded; here they do not. The
    same weights give the same bytes.

    Raises:
        ConfigError: for an image tower that cn_clip has no code for.
    """
    vision = model.config.vision
    if isinstance(vision, VisionTransformerConfig) and (vision.activation, vision.feed_forward) != (
        "quick_gelu",
        None,
    ):
        raise ConfigError(
            f"{path}: cn_clip's ViT has QuickGELU and feed-forward layers of {4 * vision.width}, but"
            f" {model.config.name} has {vision.activation} and {vision.feed_forward_width}: write another"
            " format, such as safetensors"
        )
    state = {f"module.{name}": tensor for name, tensor in state_for_file(model).items()}
    payload = {
        "epoch": 0,
        "step": 0,
        "name": structure_name(model.config),
        METADATA_KEY: header_of(model.config, {}),  # heads and resolution, which no tensor shows
        "state_dict": state,
    }
    with store.publish(path) as temporary, naming(path):
        with open(temporary, "wb") as file:
            torch.save(payload, file)  # to a file object: given a path, torch writes its name into the bytes
        check_zip(temporary, path)


def structure_name(config: ModelConfig) -> str:
    """Return `ViT-B-16@RoBERTa-wwm-ext-base-chinese` or its like, else the project's own name."""
    text = _TEXT_NAMES.get((config.text.layers, config.text.width))
    return f"{config.name}@{text}" if text is not None else config.name


def save_safetensors(
    path: str, model: CLIP, tokenizer: Tokenizer, facts: Mapping[str, str], *, card: str, vocabulary: str
) -> None:
    """Write this project's checkpoint, in Chinese CLIP's names, its model card and its vocabulary."""
    _write_card(card, model, facts)
    tokenizer.save_vocabulary(vocabulary)
    recorded = {key: facts[key] for key in ("data", "stage", "samples_seen", "scores") if key in facts}
    save_checkpoint(path, model, model.config, recorded)


def save_hugging_face(folder: str, model: CLIP, tokenizer: Tokenizer, facts: Mapping[str, str]) -> None:
    """Write a folder that transformers loads offline, model and processor.

    A ViT's is of the library's own `ChineseCLIPModel`. The library has none with a ResNet: that folder brings
    its code along (RESNET_CODE), which `AutoModel` takes with `trust_remote_code=True`.
    """
    config = model.config
    _write_card(store.join(folder, "README.md"), model, facts, for_transformers=True)
    tokenizer.save_vocabulary(store.join(folder, "vocab.txt"))
    store.write_text(store.join(folder, "tokenizer.json"), hugging_face_tokenizer(tokenizer))
    _write_json(folder, "tokenizer_config.json", _tokenizer_config())
    _write_json(folder, "preprocessor_config.json", _preprocessor_config(config))
    _write_json(folder, "config.json", _hugging_face_config(config))
    if not isinstance(config.vision, VisionTransformerConfig):
        code = resources.files("training.model").joinpath(RESNET_CODE).read_text(encoding="utf-8")
        store.write_text(store.join(folder, RESNET_CODE), code)
    path = store.join(folder, "model.safetensors")
    with store.publish(path) as temporary, naming(path):
        save_file(to_hugging_face(state_for_file(model)), temporary, metadata={"format": "pt"})
        check_safetensors(temporary, path)


def _write_card(path: str, model: CLIP, facts: Mapping[str, str], *, for_transformers: bool = False) -> None:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    card = model_card(model.config, num_parameters, facts, for_transformers=for_transformers)
    store.write_text(path, card)


def _write_json(folder: str, name: str, value: Mapping[str, Any]) -> None:
    store.write_text(store.join(folder, name), json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _tokenizer_config() -> dict[str, Any]:
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return {
        # The generic class keeps tokenizer.json as it is; BertTokenizer rebuilds it, without the folding of
        # curly quotes.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "processor_class": "ChineseCLIPProcessor",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, SPECIAL_TOKENS, strict=True)),
    }


def _preprocessor_config(config: ModelConfig) -> dict[str, Any]:
    side = config.vision.image_size_px
    return {
        "image_processor_type": "ChineseCLIPImageProcessor",
        "processor_class": "ChineseCLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_center_crop": False,  # the library's default crops; Chinese CLIP squashes
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def _hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    vision = config.vision
    shared = {
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "text_config": _text_settings(config.text),
    }
    if isinstance(vision, VisionTransformerConfig):
        return {
            "architectures": ["ChineseCLIPModel"],
            "model_type": "chinese_clip",
            **shared,
            "vision_config": {
                "model_type": "chinese_clip_vision_model",
                "hidden_size": vision.width,
                "intermediate_size": vision.feed_forward_width,
                "projection_dim": config.embed_dim,
                "num_hidden_layers": vision.layers,
                "num_attention_heads": vision.heads,
                "image_size": vision.image_size_px,
                "patch_size": vision.patch_size_px,
                "hidden_act": vision.activation,
                "layer_norm_eps": 1e-5,
                "attention_dropout": 0.0,
            },
        }
    module = RESNET_CODE.removesuffix(".py")
    classes = {
        "AutoConfig": "ChineseCLIPResNetConfig",
        "AutoModel": "ChineseCLIPResNetModel",
        "AutoModelForZeroShotImageClassification": "ChineseCLIPResNetModel",  # what pipelines ask for
    }
    return {
        "architectures": ["ChineseCLIPResNetModel"],
        "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
        "model_type": RESNET_TYPE,
        **shared,
        "vision_config": {
            "model_type": f"{RESNET_TYPE}_vision_model",
            "image_size": vision.image_size_px,
            "depths": list(vision.blocks),
            "hidden_size": vision.width,
        },
    }


def _text_settings(text: TextConfig) -> dict[str, Any]:
    return {
        "model_type": "chinese_clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.max_positions,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "hidden_dropout_prob": text.dropout,
        "attention_probs_dropout_prob": text.dropout,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }


# ONNX


class _ImageSide(nn.Module):
    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_image(image)


class _TextSide(nn.Module):
    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        # Padded: what a packed row looks like depends on the ids, which a graph cannot follow.
        found = self.clip.bert(input_ids=text, attention_mask=text.ne(0).long())
        return self.clip.project_text(found.last_hidden_state[:, 0])


def save_onnx(prefix: str, model: CLIP) -> dict[str, float]:
    """Write `<prefix>image.onnx` and `<prefix>text.onnx`; return their largest differences in onnxruntime.

    `image` float32 [batch, 3, side, side], preprocessed, gives `image_features` [batch, dim]; `text` int64
    [batch, length], padded with 0, gives `text_features`; both unit-norm; batch and length are free. Weights
    beyond protobuf's 2 GB stand in `NAME.onnx.data`.

    Raises:
        ConfigError: if the packages are not installed or the results differ by more than ONNX_TOLERANCE.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{prefix}: writing ONNX needs the package {error.name}: pip install 'cnclip-pretraining[onnx]'"
        ) from None
    model = model.cpu().eval()
    side, limit = model.config.vision.image_size_px, model.config.text.max_positions
    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.randn(2, 3, side, side, generator=generator)
    tokens_BL = torch.randint(1, model.config.text.vocab_size, (2, min(20, limit - 1)), generator=generator)
    tokens_BL[1, 5:] = 0  # a padded row, so that the mask is traced
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", min=2, max=limit)
    return {
        "image": _export_side(prefix, "image", _ImageSide(model), image_BCHW, {0: batch}),
        "text": _export_side(prefix, "text", _TextSide(model), tokens_BL, {0: batch, 1: length}),
    }


def _export_side(
    prefix: str, side: str, module: nn.Module, example: torch.Tensor, dynamic: Mapping[int, Any]
) -> float:
    folder, _, stem = prefix.rpartition("/")
    num_bytes = sum(4 * parameter.numel() for parameter in module.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, f"{stem}{side}.onnx")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=[side],
                output_names=[f"{side}_features"],
                dynamic_shapes=(dynamic,),
                verbose=False,
            )
            assert program is not None  # as it always is with dynamo=True
            program.save(path, external_data=num_bytes > _ONNX_INLINE_BYTES)
        difference = _onnx_difference(path, side, module, example)
        if not difference <= ONNX_TOLERANCE:
            raise ConfigError(
                f"{prefix}{side}.onnx: differs from torch by {difference:.1e} under onnxruntime, more than"
                f" {ONNX_TOLERANCE:.0e}: use another onnxruntime or torch"
            )
        for name in sorted(os.listdir(scratch), reverse=True):  # NAME.onnx.data before NAME.onnx
            target = store.join(folder, name) if folder else name
            with store.publish(target) as temporary, naming(target):
                shutil.copyfile(os.path.join(scratch, name), temporary)
                check_size(temporary, target, os.path.getsize(os.path.join(scratch, name)))
    return difference


def _onnx_difference(path: str, side: str, module: nn.Module, example: torch.Tensor) -> float:
    """Return the largest difference from torch on the example and on a batch of another size."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    with torch.no_grad():
        for batch in (example, example[1:], torch.cat([example, example.flip(0)])):
            theirs = torch.from_numpy(session.run(None, {side: batch.numpy()})[0])
            largest = max(largest, float((module(batch) - theirs).abs().max()))
    return largest
