"""Reads DeepSpeed files, which set memory, precision and communication only. Imports no torch."""

import difflib
from importlib import resources
from typing import Any, Literal

from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import ConfigError
from training.model.config import ModelConfig, ModifiedResNetConfig

Half = Literal["bf16", "fp16"]  # weights in 16 bits, with a float32 master

# reduce_bucket_size: some four buckets of ViT-B/16, so that most are sent while the backward pass computes.
# DeepSpeed's default, 500 million, is a single one for every model here.
BUCKET_VALUES = 50_000_000

# The keys that a DeepSpeed file may have. All others belong in the run's TOML or change what is learned.
_ALLOWED = (
    "bf16",
    "communication_data_type",
    "fp16",
    "prescale_gradients",
    "torch_autocast",
    "zero_optimization",
)
# The keys of DeepSpeed's own table (deepspeed.runtime.zero.config), which takes seconds to import.
ZERO_KEYS: tuple[str, ...] = (
    "allgather_bucket_size",
    "allgather_partitions",
    "allgather_sequential",
    "compute_grad_norm",
    "contiguous_gradients",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "elastic_checkpoint",
    "enable_sanity_checks",
    "gather_16bit_weights_on_model_save",
    "ignore_unused_parameters",
    "leaf_module",
    "legacy_stage1",
    "load_from_fp32_weights",
    "log_trace_cache_warnings",
    "max_live_parameters",
    "max_reuse_distance",
    "memory_efficient_linear",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "override_module_apply",
    "param_persistence_threshold",
    "parameter_alignment",
    "pipeline_loading_checkpoint",
    "prefetch_bucket_size",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "save_muon_momentum_buffer_in_memory",
    "stage",
    "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_all_reduce_for_fetch_params",
    "use_multi_rank_bucket_allreduce",
    "zenflow",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)
_TABLES = ("bf16", "fp16", "torch_autocast", "zero_optimization")


def read_deepspeed_file(name: str) -> dict[str, Any]:
    """Return the content of a file of deepspeed_configs by its stem, or of any path that ends in .json.

    Raises:
        ConfigError: if the file does not exist, is not JSON, or has a key that is not about memory, precision
            or communication.
    """
    settings = _read(name)
    foreign = sorted(set(settings) - set(_ALLOWED))
    if foreign:
        raise ConfigError(
            f"{name}: {foreign[0]}: a DeepSpeed file holds memory, precision and communication only"
            f" ({', '.join(_ALLOWED)}); set the rest in the run's TOML"
        )
    for key in _TABLES:
        if not isinstance(found := settings.get(key, {}), dict):
            raise ConfigError(f"{name}: {key}: found {found!r}; must be an object, {{…}}")
    if "check_grad_overflow" in settings.get("bf16", {}):
        raise ConfigError(
            f"{name}: bf16.check_grad_overflow: leave it out and set the run's on_non_finite, which handles"
            " gradients that are not finite"
        )
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{name}: zero_optimization.stage: found {stage!r}; must be 0, 1, 2 or 3")
    _check_precisions(name, settings)
    for key in settings.get("zero_optimization", {}):
        if key not in ZERO_KEYS:
            near = ", ".join(difflib.get_close_matches(key, ZERO_KEYS, 1) or ZERO_KEYS)
            raise ConfigError(f"{name}: zero_optimization.{key}: unknown to DeepSpeed; did you mean {near}?")
    if settings.get("zero_optimization", {}).get("round_robin_gradients"):
        raise ConfigError(
            f"{name}: zero_optimization.round_robin_gradients: DeepSpeed takes the float32 weights of one"
            " parameter for another's then, and all checkpoints would be wrong; leave it out"
        )
    if (half := half_of(settings)) and stage == 0:
        raise ConfigError(
            f"{name}: {half} at ZeRO stage 0 takes a wrong first Adam step in DeepSpeed; use stage 1 or above"
        )
    return settings


def _check_precisions(name: str, settings: dict[str, Any]) -> None:
    """Raise ConfigError if a file asks for two precisions at once or for an invalid one."""
    enabled = []
    for key in ("bf16", "fp16", "torch_autocast"):
        found = settings.get(key, {}).get("enabled", False)
        if not isinstance(found, bool):
            raise ConfigError(f"{name}: {key}.enabled: found {found!r}; must be true or false")
        if found:
            enabled.append(key)
    if len(enabled) > 1:
        raise ConfigError(f"{name}: {' and '.join(enabled)} are enabled; a run computes in one of them")
    if (dtype := settings.get("torch_autocast", {}).get("dtype", "bfloat16")) != "bfloat16":
        raise ConfigError(
            f"{name}: torch_autocast.dtype: found {dtype!r}; must be 'bfloat16': DeepSpeed scales float16's"
            " loss only with fp16 enabled"
        )


def half_of(settings: dict[str, Any]) -> Half | None:
    """Return the 16-bit format that a DeepSpeed file's content asks for."""
    halves: tuple[Half, ...] = ("bf16", "fp16")
    return next((name for name in halves if settings.get(name, {}).get("enabled")), None)


def judges_gradients(settings: dict[str, Any], num_micro_batches: int) -> bool:
    """Return true if a step measures the gradient itself, on the device, before the optimizer's step.

    DeepSpeed does so, and waits for what it finds, in float16, whose loss it scales; at ZeRO 3, where it also
    waits for its stream after each backward pass; with an offloaded optimizer, whose gradients the host
    needs; and in the optimizer that it takes for bfloat16 weights at ZeRO 1 whose gradients add up in
    float32.
    """
    zero = settings.get("zero_optimization", {})
    stage, half = zero.get("stage", 0), half_of(settings)
    adds_up = accumulates_in_float32(settings, num_micro_batches)
    return half != "fp16" and stage < 3 and not offloads_optimizer(zero) and not (stage == 1 and adds_up)


def accumulates_in_float32(settings: dict[str, Any], num_micro_batches: int) -> bool:
    """Return true if gradients of bfloat16 weights add up over micro-batches in float32.

    bfloat16 has 8 bits: from the 256th micro-batch on it would lose what is as large as the mean so far.
    """
    return half_of(settings) == "bf16" and num_micro_batches > 1


def overlaps_communication(settings: dict[str, Any], ranks: int) -> bool:
    """Return true if ranks add up gradients while the backward pass computes, where DeepSpeed would wait."""
    zero = settings.get("zero_optimization", {})
    return ranks > 1 and zero.get("stage", 0) in (1, 2) and not offloads_optimizer(zero)


def offloads_optimizer(zero: dict[str, Any]) -> bool:
    """Return whether a `zero_optimization` table keeps the optimizer in host memory."""
    return any(zero.get(key) for key in ("offload_optimizer", "cpu_offload", "zenflow"))


def computes_in_bfloat16(settings: dict[str, Any]) -> bool:
    """Return whether a DeepSpeed file's content makes matrix products run in bfloat16."""
    autocast = settings.get("torch_autocast", {})
    in_autocast = autocast.get("enabled", False) and autocast.get("dtype", "bfloat16") == "bfloat16"
    return half_of(settings) == "bf16" or in_autocast


def computed_in(settings: dict[str, Any]) -> str:
    """Return the precision of a DeepSpeed file's content, in words."""
    if half := half_of(settings):
        return half
    return "bf16 autocast" if computes_in_bfloat16(settings) else "fp32"


def check_model(name: str, model: ModelConfig, stage: str) -> None:
    """Raise ConfigError if a DeepSpeed file's precision would lose what the model learns."""
    half = half_of(read_deepspeed_file(name))
    if half and isinstance(model.vision, ModifiedResNetConfig):
        raise ConfigError(
            f"[{stage}] deepspeed = {name!r}: {half} rounds the weights of batch norms, whose running"
            f" statistics are float32; use zero1_autocast for {model.name}, which leaves both as they are"
        )


def _read(name: str) -> dict[str, Any]:
    try:
        if name.endswith(".json"):
            text = store.read_text(name)
        else:
            text = (resources.files("deepspeed_configs") / f"{name}.json").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not text, or an impossible file name
        entries = (entry.name for entry in resources.files("deepspeed_configs").iterdir())
        known = ", ".join(sorted(entry.removesuffix(".json") for entry in entries if entry.endswith(".json")))
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ConfigError(f"deepspeed = {name!r}: {why}; known: {known}, or a path to a .json") from None
    try:
        settings = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{name}: found {type(settings).__name__}; a DeepSpeed file is one object, {{…}}")
    return settings
