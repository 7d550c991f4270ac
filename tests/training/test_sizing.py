"""FLOPs, parameters, memory and shares, each against what PyTorch counts or a process measures."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rank_processes import run_ranks
from torch.utils.flop_counter import FlopCounterMode

from training.config import TrainConfig
from training.deepspeed_file import read_deepspeed_file
from training.flops import device_gib, find_device, image_forward, text_forward, training_flops
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS, ModelConfig, VisionTransformerConfig
from training.sizing import (
    Precision,
    Zero,
    gpu_days,
    largest_micro_batch,
    memory,
    num_parameters,
    shares,
    zero_of,
)

CONFIG = TrainConfig(epochs=1, global_batch=64, lanes=8, ranks=1)
LENGTH = 24


def on_meta(model: ModelConfig) -> CLIP:
    """The model without numbers."""
    with torch.device("meta"):
        return CLIP(model)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    clip = on_meta(MODELS[name])
    visual = sum(parameter.numel() for parameter in clip.visual.parameters())
    rest = sum(parameter.numel() for parameter in clip.parameters()) - visual
    assert num_parameters(MODELS[name]) == (visual, rest)


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_the_image_tower_are_what_pytorch_counts(name: str) -> None:
    model = MODELS[name]
    clip, side = on_meta(model).eval(), model.vision.image_size_px
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        clip.visual(torch.zeros(1, 3, side, side))
    assert image_forward(model) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn", "RN50"])
def test_flops_of_the_text_tower_are_what_pytorch_counts(name: str) -> None:
    model = MODELS[name]
    clip = build_clip(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        clip.encode_text(torch.ones(4, LENGTH, dtype=torch.long))
    # The counter does not know the CPU's fused attention: its two products are not in there.
    width, blocks = model.text.width, model.text.layers - 1
    attention = 4 * LENGTH * width * (blocks * LENGTH + 1)
    expected = 4 * (text_forward(model.text, LENGTH) - attention)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


def kept_for_backward(clip: CLIP, side: str, num_samples: int, autocast: bool, patch_mask: float) -> float:
    """Bytes of distinct storages that a forward pass keeps, without the parameters'."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*clip.parameters(), *clip.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    vision = clip.config.vision
    patches = None
    if patch_mask and isinstance(vision, VisionTransformerConfig):
        patches = torch.arange(vision.num_kept(patch_mask)).expand(num_samples, -1)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if side == "image":
            clip.encode_image(
                torch.zeros(num_samples, 3, vision.image_size_px, vision.image_size_px), patches
            )
        else:
            clip.encode_text(torch.ones(num_samples, LENGTH, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


def check_activations(name: str, precision: Precision, tolerance: float, patch_mask: float = 0.0) -> None:
    model, config = MODELS[name], dataclasses.replace(CONFIG, patch_mask=patch_mask)
    clip = build_clip(model)
    measured = 0.0
    for side in ("image", "text"):
        few, more = (kept_for_backward(clip, side, n, precision == "autocast", patch_mask) for n in (2, 4))
        measured += (more - few) / 2  # a sample's; what does not grow with them is the weights' copies
    found = memory(model, config, zero=Zero(), precision=precision, micro_batch=1, tokens=LENGTH)
    assert found.activations == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("patch_mask", [0.5, 0.9])
def test_activations_of_masked_pictures_are_those_that_autograd_keeps(patch_mask: float) -> None:
    check_activations("tiny-vit", "float32", 0.15, patch_mask)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_activations_of_small_models_are_those_that_autograd_keeps(name: str, precision: Precision) -> None:
    check_activations(name, precision, 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("name", ["ViT-B-16", "RN50"])
def test_activations_are_those_that_autograd_keeps(name: str, precision: Precision) -> None:
    check_activations(name, precision, 0.06)


def peak_bytes(name: str, config: TrainConfig) -> tuple[float, float]:
    """(what a rank's memory grew by from before the model to its fullest in a step, the estimate)."""
    from training import engine as engines

    engines.join_ranks(config)
    process = psutil.Process()
    before = process.memory_info().rss
    clip = build_clip(MODELS[name])
    if config.lock_image:
        clip.lock_image_tower()
    share = config.global_batch
    towers = engines.Towers(clip, num_samples_of_ranks=(share,), config=config)
    engine = engines.build_engine(towers, config)
    side_px = clip.config.vision.image_size_px
    batch: Any = engines.Batch(
        step=0,
        keys=None,  # type: ignore[arg-type]
        image=torch.zeros(share, 3, side_px, side_px, dtype=torch.uint8),
        tokens_BL=torch.ones(share, LENGTH, dtype=torch.long),
        image_id_B=torch.arange(share),
        caption_id_B=torch.arange(share),
    )
    engine.train()
    for step in range(2):
        engines.train_step(engine, dataclasses.replace(batch, step=step), 1e-4, 100.0, 0)
    with open("/proc/self/status", encoding="ascii") as file:
        (highest,) = [int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")]
    estimate = memory(
        MODELS[name], config, zero=Zero(1), precision="float32", micro_batch=share, tokens=LENGTH
    )
    return highest - before, estimate.total


@pytest.mark.slow
def test_a_rank_of_vit_b_16_takes_what_is_estimated() -> None:
    config = dataclasses.replace(CONFIG, global_batch=8, lanes=1, lock_image=True)
    ((measured, estimate),) = run_ranks(peak_bytes, 1, "ViT-B-16", config)
    assert estimate == pytest.approx(measured, rel=0.25), (measured / 2**30, estimate / 2**30)


def test_the_parts_of_memory_follow_the_zero_stages() -> None:
    model = MODELS["ViT-B-16"]
    image, text = num_parameters(model)
    config = dataclasses.replace(CONFIG, ranks=8)

    def states(file: str, precision: Precision = "float32", **changes: Any) -> float:
        changed = dataclasses.replace(config, **changes)
        zero = zero_of(read_deepspeed_file(file))
        return memory(model, changed, zero=zero, precision=precision, micro_batch=1, tokens=52).states

    everything = image + text
    assert states("zero0") == 16 * everything
    assert states("zero0", lock_image=True) == 4 * everything + 12 * text
    bucket = 4 * everything
    assert states("zero1") == pytest.approx(8 * everything + 12 * everything / 8 + bucket)
    assert states("zero2") == pytest.approx(4 * everything + 16 * everything / 8 + bucket)
    gathered = 4 * everything
    assert states("zero3") == pytest.approx(20 * everything / 8 + gathered + bucket)
    assert states("zero3_bf16", "bfloat16") == pytest.approx(16 * everything / 8 + (gathered + bucket) / 2)
    assert states("zero1_autocast", "autocast") == pytest.approx(states("zero1") + bucket)
    assert states("zero3_offload") == pytest.approx(gathered + bucket)


def test_what_is_offloaded_leaves_the_device() -> None:
    model, (image, text) = MODELS["ViT-H-14"], num_parameters(MODELS["ViT-H-14"])
    config = dataclasses.replace(CONFIG, ranks=8)

    def states(stage: int, **more: Any) -> float:
        zero = zero_of({"zero_optimization": {"stage": stage, **more}})
        return memory(model, config, zero=zero, precision="float32", micro_batch=1, tokens=52).states

    optimizer, weights = {"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "nvme"}}
    everything = image + text
    assert states(1) - states(1, **optimizer) == pytest.approx(12 * everything / 8)
    assert states(2) - states(2, **optimizer) == pytest.approx(16 * everything / 8)
    assert states(3) - states(3, **optimizer) == pytest.approx(16 * everything / 8)
    assert states(3) - states(3, **weights) == pytest.approx(4 * everything / 8)
    assert states(3, offload_optimizer={"device": "none"}) == states(3)
    assert (
        states(3) - states(3, stage3_max_reuse_distance=0) == 4 * 5e8
    )  # half of what is gathered by default


def gathered_share(config: TrainConfig, deepspeed: str) -> float:
    """Share of the weights that ZeRO-3 holds whole between the forward and the backward pass."""
    from training import engine as engines

    engines.join_ranks(config)
    model = MODELS["tiny-vit"]
    towers = engines.Towers(build_clip(model), num_samples_of_ranks=(8,), config=config)
    engine: Any = engines.build_engine(towers, dataclasses.replace(config, deepspeed=deepspeed))
    side_px, shares_found = model.vision.image_size_px, list[float]()
    whole_loss, everything = towers.loss, sum(num_parameters(model))

    def loss(*arguments: Any, **more: Any) -> torch.Tensor:
        held = sum(parameter.data.numel() for parameter in towers.clip.parameters())
        shares_found.append(held / everything)
        return whole_loss(*arguments, **more)

    towers.loss = loss  # type: ignore[method-assign]
    batch: Any = engines.Batch(
        step=0,
        keys=None,  # type: ignore[arg-type]
        image=torch.zeros(8, 3, side_px, side_px, dtype=torch.uint8),
        tokens_BL=torch.ones(8, LENGTH, dtype=torch.long),
        image_id_B=torch.arange(8),
        caption_id_B=torch.arange(8),
    )
    engine.train()
    for step in range(3):  # the first one learns in which order layers come
        engines.train_step(engine, dataclasses.replace(batch, step=step), 1e-4, 100.0, 0)
    return shares_found[-1]


def test_zero_3_holds_all_weights_of_a_small_model_at_the_end_of_a_forward_pass(tmp_path: Path) -> None:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    config = dataclasses.replace(CONFIG, global_batch=8)
    assert run_ranks(gathered_share, 1, config, str(tmp_path / "mine.json")) == [1.0]


def bucket_sizes(config: TrainConfig, names: tuple[str, ...]) -> list[int]:
    """DeepSpeed's buckets for gradients of tiny-vit, in values."""
    from training import engine as engines

    engines.join_ranks(config)
    found = []
    for name in names:
        towers = engines.Towers(build_clip(MODELS["tiny-vit"]), num_samples_of_ranks=(64,), config=config)
        engine = engines.build_engine(towers, dataclasses.replace(config, deepspeed=name))
        found.append(engine.optimizer.reduce_bucket_size)
    return found


def test_buckets_are_no_larger_than_what_is_trained(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 70000}}')
    names = ("zero1", "zero2", "zero3", str(tmp_path / "mine.json"))
    (found,) = run_ranks(bucket_sizes, 1, CONFIG, names)
    assert found == [sum(num_parameters(MODELS["tiny-vit"]))] * 3 + [70_000]


def test_what_fits_is_the_share_or_a_power_of_two() -> None:
    model, config = MODELS["ViT-B-16"], dataclasses.replace(CONFIG, global_batch=800, lanes=8)

    def needs(micro_batch: int) -> Any:
        return memory(model, config, zero=Zero(), precision="float32", micro_batch=micro_batch, tokens=52)

    most = needs(micro_batch=800).total / 0.9
    assert largest_micro_batch(needs, 800, most * 1.001) == 800
    assert largest_micro_batch(needs, 800, most * 0.999) == 512
    assert largest_micro_batch(needs, 800, needs(micro_batch=1).total) == 0


def test_ranks_that_do_not_divide_the_batch_are_told_better_ones() -> None:
    huge = TrainConfig(epochs=1, ranks=184)
    found = shares(huge)
    assert (found.smallest, found.largest, found.better_ranks) == (128, 192, (128, 256))
    assert found.idle == pytest.approx(1 - 32_768 / 184 / 192)
    even = shares(dataclasses.replace(huge, ranks=128))
    assert (even.smallest, even.largest, even.idle, even.better_ranks) == (256, 256, 0.0, ())


def test_days_count_what_is_computed_and_what_is_computed_twice() -> None:
    model = MODELS["ViT-B-16"]
    config = TrainConfig(epochs=1, global_batch=1024, lanes=8, ranks=8)
    text, image = text_forward(model.text, 20), image_forward(model)

    def days(micro_batch: int, **changes: Any) -> float:
        return gpu_days(
            model,
            dataclasses.replace(config, **changes),
            num_steps=86_400,
            micro_batch=micro_batch,
            flops_per_second=1024.0,
            tokens=20,
        )

    assert days(128) == pytest.approx(3 * (text + image))
    assert days(64) == pytest.approx(4 * (text + image))
    assert days(128, checkpoint_activations=True) == pytest.approx(4 * (text + image))
    assert days(128, lock_image=True) == pytest.approx(3 * text + image)
    assert days(64, lock_image=True) == pytest.approx(4 * text + image)
    assert days(128, lock_image=True, cached_views=4) == pytest.approx(3 * text)
    assert training_flops(model, config, 20) == 3 * (text + image)
    # On 5 ranks of 8 lanes two ranks hold one lane and three hold two: all take as long as those.
    assert days(256, ranks=5) == pytest.approx(3 * (text + image) * 5 * 256 / 1024)
    masked = training_flops(model, dataclasses.replace(config, patch_mask=0.5), 20)
    assert 3 * text + 1.4 * image < masked < 3 * text + 1.5 * image  # half of the patches, and no longer n²


@pytest.mark.parametrize(
    ("name", "expected", "gib"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 80),
        ("NVIDIA H100 PCIe", "H100 PCIe", 80),
        ("NVIDIA H100 NVL", "H100 NVL", 94),
        ("Tesla V100-SXM2-32GB", "V100", 32),
        ("Tesla V100-SXM2-16GB", "V100", 16),
        ("NVIDIA A100-SXM4-40GB", "A100", 40),
        ("A100 40 GB", "A100", 40),
        ("a100_40gb", "A100", 40),
        ("a100", "A100", 80),
        ("NVIDIA A10", "A10", 24),
    ],
)
def test_a_device_is_known_by_its_name(name: str, expected: str, gib: float) -> None:
    assert find_device(name) == expected
    assert device_gib(name) == gib


@pytest.mark.parametrize("name", ["Radeon", "NVIDIA A10G", "NVIDIA RTX A1000", "T400", "V100S-PCIE-32GB", ""])
def test_a_device_with_another_letter_is_another_one(name: str) -> None:
    assert find_device(name) is None
