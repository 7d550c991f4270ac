"""FLOPs, parameters, memory and shares, each against what PyTorch counts or a process measures."""

import dataclasses
from typing import Any

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.planning.memory import (
    Precision,
    Zero,
    largest_micro_batch,
    memory,
    num_parameters,
    shares,
)
from tests.helpers.large_twins import TWINS
from tests.helpers.rank_processes import run_ranks
from training.config.averages import AveragesConfig
from training.config.train import TrainConfig
from training.flops import device_gib, find_device, image_forward, text_forward
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS, Activation, ModelConfig, VisionTransformerConfig

CONFIG = TrainConfig(epochs=1, global_batch=64, lanes=8, ranks=1)
LENGTH = 24


def on_meta(model: ModelConfig) -> CLIP:
    """The model without numbers."""
    with torch.device("meta"):
        return CLIP(model)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_of_the_image_tower_are_what_pytorch_counts(name: str) -> None:
    model = MODELS[name]
    clip, side = on_meta(model).eval(), model.vision.image_size_px
    visual = sum(parameter.numel() for parameter in clip.visual.parameters())
    rest = sum(parameter.numel() for parameter in clip.parameters()) - visual
    assert num_parameters(model) == (visual, rest)
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


def check_activations(
    model: ModelConfig, precision: Precision, tolerance: float, patch_mask: float = 0.0
) -> None:
    config = dataclasses.replace(CONFIG, patch_mask=patch_mask)
    clip = build_clip(model)
    measured = 0.0
    for side in ("image", "text"):
        few, more = (kept_for_backward(clip, side, n, precision == "autocast", patch_mask) for n in (2, 4))
        measured += (more - few) / 2  # a sample's; what does not grow with them is the weights' copies
    found = memory(model, config, zero=Zero(), precision=precision, micro_batch=1, tokens=LENGTH)
    assert found.activations == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("patch_mask", [0.5, 0.9])
def test_activations_of_masked_pictures_are_those_that_autograd_keeps(patch_mask: float) -> None:
    check_activations(MODELS["tiny-vit"], "float32", 0.15, patch_mask)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_activations_of_small_models_are_those_that_autograd_keeps(name: str, precision: Precision) -> None:
    check_activations(MODELS[name], precision, 0.15)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_block_of_other_proportions_keeps_what_autograd_keeps(
    activation: Activation, precision: Precision
) -> None:
    twin: Any = TWINS["ViT-bigG-14"]
    kept, values = list[float](), 17 * twin.vision.width
    for layers in (2, 3):
        vision = dataclasses.replace(twin.vision, layers=layers, activation=activation)
        clip = build_clip(dataclasses.replace(twin, vision=vision))
        few, more = (kept_for_backward(clip, "image", n, precision == "autocast", 0.0) for n in (2, 4))
        kept.append((more - few) / 2)
    whole = [
        memory(
            dataclasses.replace(twin, vision=dataclasses.replace(vision, layers=layers)),
            CONFIG, zero=Zero(), precision=precision, micro_batch=1, tokens=LENGTH,
        ).activations
        for layers in (2, 3)
    ]  # fmt: skip
    assert (whole[1] - whole[0]) / values == pytest.approx((kept[1] - kept[0]) / values, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("name", ["ViT-B-16", "RN50"])
def test_activations_are_those_that_autograd_keeps(name: str, precision: Precision) -> None:
    check_activations(MODELS[name], precision, 0.06)


def peak_bytes(name: str, config: TrainConfig) -> tuple[float, float]:
    """(what a rank's memory grew by from before the model to its fullest in a step, the estimate)."""
    from training.data.loader import Batch
    from training.engine import engine as engines
    from training.engine.towers import Towers

    engines.join_ranks(config)
    process = psutil.Process()
    before = process.memory_info().rss
    clip = build_clip(MODELS[name])
    if config.lock_image:
        clip.lock_image_tower()
    share = config.global_batch
    towers = Towers(clip, num_samples_of_ranks=(share,), config=config)
    engine = engines.build_engine(towers, config)
    side_px = clip.config.vision.image_size_px
    batch: Any = Batch(
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


def test_running_averages_take_four_bytes_of_each_trained_weight() -> None:
    def states(**changes: Any) -> float:
        config = dataclasses.replace(CONFIG, **changes)
        model, zero = MODELS["tiny-vit"], Zero(1)
        return memory(model, config, zero=zero, precision="bfloat16", micro_batch=1, tokens=LENGTH).states

    image, text = num_parameters(MODELS["tiny-vit"])
    both = AveragesConfig(ema=0.9, last_steps=3, interpolate=(0.5,))
    assert states(averages=both) - states() == 2 * 4 * (image + text)
    locked = states(averages=AveragesConfig(ema=0.9), lock_image=True) - states(lock_image=True)
    assert locked == 4 * text


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
