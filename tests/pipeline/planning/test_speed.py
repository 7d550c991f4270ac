"""Training on many devices: FLOPs as PyTorch counts them, bytes as ranks send them, what hides what."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cli import main
from pipeline.planning.memory import Precision, Zero, num_parameters
from pipeline.planning.requirements import hardware, need, trainings_of_recipe
from pipeline.planning.speed import (
    Step,
    bandwidth_of,
    device_flops,
    feed,
    gpu_days,
    step,
    suitable_ranks,
    utilisation,
    wire,
)
from tests.helpers.large_twins import TWINS
from tests.helpers.rank_processes import run_ranks
from training.config.recipes import paper_recipe
from training.config.train import TrainConfig
from training.flops import image_forward, text_forward, training_flops
from training.model.clip import build_clip
from training.model.config import MODELS, VisionTransformerConfig

B16, L14 = MODELS["ViT-B-16"], MODELS["ViT-L-14"]
CONFIG = TrainConfig(epochs=1, global_batch=1024, lanes=8, ranks=8)
LENGTH = 24


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("name", ["tiny-vit", *TWINS])
def test_a_training_step_has_the_flops_that_pytorch_counts(name: str, locked: bool) -> None:
    model = TWINS.get(name) or MODELS[name]
    vision: Any = model.vision
    clip = build_clip(model).train()
    if locked:
        clip.lock_image_tower()
    with FlopCounterMode(display=False) as counter:
        image_BD = clip.encode_image(torch.randn(4, 3, vision.image_size_px, vision.image_size_px))
        (image_BD.sum() + clip.encode_text(torch.ones(4, LENGTH, dtype=torch.long)).sum()).backward()
    # The counter does not know the CPU's fused attention of the image tower, a first layer does not need the
    # gradient of its input, and the projection of [CLS] is too small to plan with.
    passes = 1 if locked else 3
    tokens = vision.num_patches + 1
    image_attention = passes * 4 * vision.layers * tokens**2 * vision.width
    patches = 0 if locked else 2 * vision.num_patches * 3 * vision.patch_size_px**2 * vision.width
    projection = 3 * 2 * model.text.width * model.embed_dim
    planned = training_flops(model, dataclasses.replace(CONFIG, lock_image=locked), LENGTH)
    counted = counter.get_total_flops() / 4
    assert planned - image_attention - patches + projection == pytest.approx(counted, rel=1e-6)


def test_a_device_computes_some_things_twice() -> None:
    text, image = text_forward(B16.text, 20), image_forward(B16)

    def flops(micro_batch: int, **changes: Any) -> float:
        return device_flops(B16, dataclasses.replace(CONFIG, **changes), micro_batch=micro_batch, tokens=20)

    assert flops(128) == pytest.approx(3 * (text + image))
    assert flops(64) == pytest.approx(4 * (text + image))
    assert flops(128, checkpoint_activations=True) == pytest.approx(4 * (text + image))
    assert flops(128, lock_image=True) == pytest.approx(3 * text + image)
    assert flops(64, lock_image=True) == pytest.approx(4 * text + image)
    assert flops(128, lock_image=True, cached_views=4) == pytest.approx(3 * text)
    masked = training_flops(B16, dataclasses.replace(CONFIG, patch_mask=0.5), 20)
    assert flops(64, patch_mask=0.5) == pytest.approx(masked + text + image_forward(B16, 0.5))
    assert 3 * text + 1.4 * image < masked < 3 * text + 1.5 * image  # half of the patches, and no longer n²


def step_of(config: TrainConfig, **changes: Any) -> Step:
    given: dict[str, Any] = {
        "zero": Zero(1),
        "precision": "autocast",
        "micro_batch": 128,
        "flops_per_second": 4e14,
        "bandwidth": 45e9,
        "tokens": 22,
    }
    return step(B16, config, **{**given, **changes})


def test_a_step_waits_for_the_fullest_rank_and_for_what_nothing_hides() -> None:
    flops = device_flops(B16, CONFIG, micro_batch=128, tokens=22)
    alone = step_of(dataclasses.replace(CONFIG, ranks=1), micro_batch=1024)
    assert alone.total == alone.device == pytest.approx(1024 * flops / 4e14)  # no network, launched in time
    eight = step_of(CONFIG)
    assert eight.host == pytest.approx(24 * 2.2e-3)
    sent = wire(B16, CONFIG, zero=Zero(1), precision="autocast")
    assert eight.hidden == pytest.approx((sent.gradients - sent.last_bucket) / 45e9)
    assert eight.exposed == pytest.approx((sent.last_bucket + sent.weights + sent.features) / 45e9)
    assert eight.total == pytest.approx(max(eight.device, eight.host) + eight.exposed)
    # On 5 ranks of 8 lanes two ranks hold one lane and three hold two: all take as long as those.
    five = step_of(dataclasses.replace(CONFIG, ranks=5), micro_batch=256)
    assert five.device == pytest.approx(256 * flops / 4e14)
    # A slow network shows the gradients too: only two thirds of the computing, the backward pass, hide them.
    slow = step_of(CONFIG, bandwidth=1e9)
    assert slow.hidden == pytest.approx(2 / 3 * max(slow.device, slow.host))
    assert step_of(CONFIG, zero=Zero(0)).hidden == 0
    assert gpu_days(CONFIG, eight, 86_400) == pytest.approx(8 * eight.total)
    used = utilisation(B16, CONFIG, eight, peak_flops=1e15, tokens=22)
    assert used == pytest.approx(1024 * training_flops(B16, CONFIG, 22) / (8 * eight.total * 1e15))


def test_what_a_rank_reads() -> None:
    one_second = Step(1.0, 0.0, 0.0, 0.0)
    live = feed(B16, CONFIG, one_second)
    assert (live.samples_a_second, live.cores) == (128, pytest.approx(128 / 742))
    assert live.bytes_a_second == pytest.approx(128 * 55_857)
    cached = feed(B16, dataclasses.replace(CONFIG, lock_image=True, cached_views=4), one_second)
    assert cached.bytes_a_second == pytest.approx(128 * (1028 + 90))
    assert cached.cores < live.cores / 400


def test_the_most_ranks_that_suit_share_evenly_and_lose_a_tenth_at_most() -> None:
    assert suitable_ranks(dataclasses.replace(CONFIG, lanes=64), lambda ranks: 0.5 - 0.002 * ranks) == 16
    assert suitable_ranks(CONFIG, lambda ranks: 0.5) == 8
    assert (bandwidth_of(8, None), bandwidth_of(9, None), bandwidth_of(9, 1.0)) == (350e9, 45e9, 1.0)


def counted_bytes(deepspeed: str) -> float:
    """Bytes that this rank sends in a step: those of every collective, by a ring's rule."""
    from training.data.loader import Batch
    from training.engine import engine as engines
    from training.engine.towers import Towers

    sent, is_counting = 0.0, False

    def counting(name: str, factor: float) -> None:
        known = getattr(dist, name)

        def counted(*given: Any, **more: Any) -> Any:
            nonlocal sent
            tensors_of_call = [*given, *more.values()]
            whole = tensors_of_call[1 if name == "reduce_scatter" else 0]
            tensors = whole if isinstance(whole, list | tuple) else [whole]
            if is_counting:
                sent += factor / 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return known(*given, **more)

        setattr(dist, name, counted)

    # (R - 1) / R of the whole with two ranks is a half; adding up takes it twice. DeepSpeed takes them early.
    for name in ("all_gather", "all_gather_into_tensor", "reduce_scatter"):
        counting(name, 1)
    counting("all_reduce", 2)

    config = TrainConfig(epochs=1, global_batch=8, lanes=2, ranks=2, deepspeed=deepspeed)
    engines.join_ranks(config)
    engine = engines.build_engine(
        Towers(build_clip(MODELS["tiny-vit"]), num_samples_of_ranks=(4, 4), config=config), config
    )
    batch: Any = Batch(
        step=0,
        keys=None,  # type: ignore[arg-type]
        image=torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
        tokens_BL=torch.ones(4, LENGTH, dtype=torch.long),
        image_id_B=torch.arange(4),
        caption_id_B=torch.arange(4),
    )
    engine.train()
    engines.train_step(engine, batch, 1e-4, 100.0, 0)
    is_counting = True
    engines.train_step(engine, dataclasses.replace(batch, step=1), 1e-4, 100.0, 0)
    return sent


@pytest.mark.slow
@pytest.mark.parametrize(("deepspeed", "stage"), [("zero0", 0), ("zero1", 1)])
def test_ranks_send_the_bytes_that_are_planned(deepspeed: str, stage: int) -> None:
    config = TrainConfig(epochs=1, global_batch=8, lanes=2, ranks=2)
    planned = wire(MODELS["tiny-vit"], config, zero=Zero(stage), precision="float32")
    for sent in run_ranks(counted_bytes, 2, deepspeed):
        assert planned.total == pytest.approx(sent, rel=0.02)


@pytest.mark.parametrize(
    ("precision", "a_weight"), [("float32", (4, 4)), ("autocast", (2, 4)), ("bfloat16", (2, 2))]
)
def test_bytes_by_precision_and_stage(precision: Precision, a_weight: tuple[int, int]) -> None:
    config = dataclasses.replace(CONFIG, ranks=2)
    image, text = num_parameters(B16)
    words = (21128 + 512) * 768

    def sent(stage: int, **changes: Any) -> Any:
        return wire(B16, dataclasses.replace(config, **changes), zero=Zero(stage), precision=precision)

    gradients = a_weight[0] * (image + text) + (2 * words if precision == "autocast" else 0)
    assert sent(1).gradients == sent(0).gradients == pytest.approx(gradients)  # added up: twice a half
    assert (sent(0).weights, sent(1).weights) == (0, pytest.approx(a_weight[1] * (image + text) / 2))
    assert sent(3).gradients == pytest.approx(gradients / 2)
    assert sent(3).weights == pytest.approx(2 * sent(1).weights)  # in both passes
    assert sent(3, checkpoint_activations=True).weights == pytest.approx(3 * sent(1).weights)
    assert sent(1, lock_image=True).weights == pytest.approx(a_weight[1] * text / 2)
    assert wire(B16, dataclasses.replace(config, ranks=1), zero=Zero(1), precision=precision).total == 0


def test_36_samples_a_gpu_use_a_fifth_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_recipe("ViT-L-14", "stage2").global_batch / 128 == 36
    assert isinstance(L14.vision, VisionTransformerConfig)
    for network, most in (("45", 16), ("350", 22)):
        words = ("--hardware", "H100", "--utilisation", "0.45", "--network", network)
        assert main(["plan", "pretrain", *words]) == 0
        said = capsys.readouterr().out
        header, rows = said.split("\n\n")[1].splitlines()[0], said.split("\n\n")[1].splitlines()[1:]
        assert header.split()[:3] == ["training", "ranks", "step"]
        (row,) = [line.split() for line in rows if line.startswith("stage2 of ViT-L-14  ")]
        assert 10 < int(row[10].rstrip("%")) <= most
        assert "ViT-L-14 stage2: 128 ranks of 36 samples reach" in said
    assert main(["plan", "pretrain", "--network", "0"]) == 2
    assert "--network 0.0: must be greater than 0 GB/s" in capsys.readouterr().err


def test_days_are_those_of_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "pretrain", "--hardware", "H100"]) == 0
    first, second = (part.splitlines()[1:] for part in capsys.readouterr().out.split("\n\n")[:2])
    for one, two in zip(first, second, strict=True):
        row, took = one.split(), two.split()
        assert row[:2] == [took[2], took[0]]
        seconds = int(row[4].replace(",", "")) * float(took[4].replace(",", "")) / 1e3
        assert float(row[9].replace(",", "")) == pytest.approx(seconds * int(took[3]) / 86_400, abs=0.1)


def test_the_page_on_scale_has_these_numbers() -> None:
    page = (Path(__file__).parents[3] / "docs" / "scale.md").read_text(encoding="utf-8")
    for item in (*trainings_of_recipe("pretrain", None), *trainings_of_recipe("larger", None)):
        fast, slow = (need(item, hardware("H100", 0.4, None, network), 22) for network in (350.0, 45.0))
        size = re.sub(r"^ViT-(\w+)-(\d+)", r"ViT-\1/\2", item.model).replace("14-336", "14@336px")
        title, sent, took = f"| {size} stage {item.name[-1]} | ", slow.wire, slow.step
        for cells in (
            (item.config.ranks, slow.shares.largest, *_megabytes(sent.gradients, sent.weights, sent.features),
             *(f"{1e3 * part:,.0f}" for part in (took.device, took.host, took.hidden, took.exposed))),
            (f"{100 * fast.utilisation:.0f}%", f"{100 * slow.utilisation:.0f}%", fast.suitable_ranks,
             slow.suitable_ranks, f"{fast.feed.samples_a_second:,.0f}", f"{fast.feed.cores:.1f}",
             *_megabytes(fast.feed.bytes_a_second)),
            (f"{fast.gpu_days:,.1f}", f"{slow.gpu_days:,.1f}", slow.suitable_ranks),
        ):  # fmt: skip
            assert title + " | ".join(map(str, cells)) + " |" in page, (title, cells)


def _megabytes(*values: float) -> tuple[str, ...]:
    return tuple(f"{value / 1e6:,.0f}" for value in values)
