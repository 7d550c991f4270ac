"""What matrix products in float8 ask of a training's settings. Imports no torch."""

from pipeline.core.records import ConfigError
from training.config.deepspeed_file import computed_in, computes_in_bfloat16, read_deepspeed_file
from training.model.config import ModelConfig, VisionTransformerConfig

_MULTIPLE = 16  # of both sides of a matrix, for the tensor cores that multiply in float8


def check_float8(deepspeed: str, model: ModelConfig, *, locks_image: bool, stage: str) -> None:
    """Check that a model can be trained with products in float8.

    Raises:
        ConfigError: if the DeepSpeed file or the width of a layer does not suit it.
    """
    settings = read_deepspeed_file(deepspeed)
    if not computes_in_bfloat16(settings):
        raise ConfigError(
            f"[{stage}] fp8 = true, but deepspeed = {deepspeed!r} computes in {computed_in(settings)}, and"
            " float8 products belong between bf16 layers; use zero1_bf16 or zero1_autocast, or leave fp8 out"
        )
    if settings.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            f"[{stage}] fp8 = true, but {deepspeed} is ZeRO 3: it takes weights back before the backward"
            " pass, for which float8 products keep them; use a lower stage or leave fp8 out"
        )
    widths: dict[str, tuple[int, ...]] = {"text tower": (model.text.width,)}
    if isinstance(model.vision, VisionTransformerConfig) and not locks_image:
        widths["image tower"] = (model.vision.width, model.vision.feed_forward_width)
    for tower, found in widths.items():
        for width in found:
            if width % _MULTIPLE:
                raise ConfigError(
                    f"[{stage}] fp8 = true, but the {tower} of {model.name} has layers of width {width}, and"
                    f" float8 products need multiples of {_MULTIPLE}; leave fp8 out"
                )
