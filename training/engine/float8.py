"""Matrix products in float8, by torchao: those of attention's inputs and of the feed-forward layers."""

import re

import torch
from deepspeed.accelerator import get_accelerator

from pipeline.core.records import ConfigError
from training.config.train import TrainConfig
from training.model.clip import CLIP

# The first GPUs that multiply in float8 are Ada's; Hopper's have 9.0.
_CAPABILITY = (8, 9)
_OF_A_VIT = r"visual\.blocks\.\d+\.(attn\.qkv|mlp\.fc[12])"
_OF_BERT = r"bert\.encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(intermediate|output)\.dense)"
_PRODUCTS = re.compile(f"{_OF_A_VIT}|{_OF_BERT}")


def check_device(config: TrainConfig, stage: str) -> None:
    """Check that this machine multiplies in float8, if the run asks for it.

    Raises:
        ConfigError: if it does not.
    """
    if not config.fp8:
        return
    if (name := get_accelerator().device_name()) != "cuda":
        lacking = f"needs an NVIDIA GPU, and this machine computes on its {name}"
    elif (found := torch.cuda.get_device_capability()) < _CAPABILITY:
        lacking = (
            f"needs a GPU of compute capability {'.'.join(map(str, _CAPABILITY))} or newer (Ada, Hopper,"
            f" Blackwell), and {torch.cuda.get_device_name()} has {'.'.join(map(str, found))}"
        )
    else:
        try:
            import torchao.float8  # noqa: F401
        except ImportError as error:
            lacking = f"needs torchao ({error}): pip install 'cnclip-pretraining[fp8]'"
        else:
            return
    raise ConfigError(f"[{stage}] fp8 = true: {lacking}, or set fp8 = false")


def multiply_in_float8(clip: CLIP) -> list[str]:
    """Have the products of the towers that learn computed in float8; return the layers' names.

    Inputs and weights are scaled to float8 (e4m3) by their largest value at each use, gradients to e5m2;
    sums and results are as before. Parameters stay the same objects under the same names. A locked image
    tower is not converted, so that its features are those of a cache. A CPU computes the same numbers without
    float8 hardware, slowly: for tests and benchmarks.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    wanted = [
        name
        for name, _ in clip.named_modules()
        if _PRODUCTS.fullmatch(name) and not (clip.image_tower_locked and name.startswith("visual."))
    ]
    convert_to_float8_training(
        clip,
        module_filter_fn=lambda _, name: name in wanted,
        # Padding: the number of tokens is the inner side of a weight's gradient, and need not be a multiple.
        config=Float8LinearConfig(emulate=get_accelerator().device_name() == "cpu", pad_inner_dim=True),
    )
    return wanted
