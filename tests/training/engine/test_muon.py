"""Muon against torch's own, against itself on one rank, and its share of a step's operations."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.core.records import ConfigError
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import CONFIG, small_models
from tests.training.engine.test_zero import job_of_20_steps, losses, train_without_dropout
from training.config.train import check_fits
from training.engine.muon import MuonAdamW, _spans, orthogonal
from training.engine.optim import build_optimizer
from training.flops import muon_step
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS
from training.weights.weights import load_checkpoint

MUON = dataclasses.replace(CONFIG, optimizer="muon", weight_decay=0.1)
SHAPES = ((64, 128), (128, 64), (96, 96))


def steps_of(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], rate: float) -> None:
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


def test_steps_are_those_of_torch() -> None:
    """torch's computes in bfloat16 everywhere, so that steps agree to a few percent."""
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(9)) for shape in SHAPES]
    ours = [nn.Parameter(weight.clone()) for weight in start]
    theirs = [nn.Parameter(weight.clone()) for weight in start]
    steps_of(MuonAdamW([{"params": ours, "is_muon": True, "weight_decay": 0.1}]), ours, 0.02)
    steps_of(torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs, 0.02)
    for before, our, their in zip(start, ours, theirs, strict=True):
        moved = (their - before).norm()
        assert moved > 0.5
        assert (our - their).norm() < 0.02 * moved


def test_a_direction_has_nearly_equal_singular_values() -> None:
    wide = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    (step,) = orthogonal([wide * torch.logspace(-1, 1, 64)[:, None]])  # two orders of magnitude apart
    values = torch.linalg.svdvals(step) / (0.2 * 256**0.5)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_matrices_are_muons_and_the_rest_is_adamws() -> None:
    clip = build_clip(small_models()["small-vit"], vocab_size=30)
    names = {parameter: name for name, parameter in clip.named_parameters()}
    groups = build_optimizer(clip, MUON).param_groups
    of_muon = {names[each] for group in groups if group["is_muon"] for each in group["params"]}
    others = {names[each] for group in groups if not group["is_muon"] for each in group["params"]}
    assert of_muon | others == set(names.values())
    assert not of_muon & others
    assert {"text_projection", "visual.head.weight", "visual.blocks.0.attn.qkv.weight"} <= of_muon
    assert {"visual.patch_embed.proj.weight", "visual.pos_embed", "logit_scale"} <= others
    assert not any("embedding" in name or name.endswith("bias") for name in of_muon)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_its_operations_are_counted(name: str, locked: bool) -> None:
    with torch.device("meta"):
        clip = CLIP(MODELS[name])
    if locked:
        clip.lock_image_tower()
    optimizer = build_optimizer(clip, MUON)
    assert isinstance(optimizer, MuonAdamW)
    with FlopCounterMode(display=False) as counter:
        orthogonal(sorted(optimizer.matrices, key=lambda matrix: matrix.shape))
    assert counter.get_total_flops() == muon_step(MODELS[name], locks_image=locked)


@pytest.mark.parametrize(
    ("deepspeed", "ranks"),
    [
        ("zero1", 2),
        pytest.param("zero2", 3, marks=pytest.mark.slow),
        pytest.param("zero0", 2, marks=pytest.mark.slow),
        pytest.param("zero1", 4, marks=pytest.mark.slow),
        pytest.param("aligned", 3, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_matrices_take_the_steps_of_one(tmp_path: Path, deepspeed: str, ranks: int) -> None:
    one = job_of_20_steps(tmp_path, "one", optimizer="muon", deepspeed="zero0")
    run_ranks(train_without_dropout, 1, one)
    if deepspeed == "aligned":
        zero = {"stage": 1, "parameter_alignment": True}
        deepspeed = str(tmp_path / "mine.json")
        Path(deepspeed).write_text(json.dumps({"zero_optimization": zero}))
    many = job_of_20_steps(tmp_path, "many", optimizer="muon", deepspeed=deepspeed, ranks=ranks)
    run_ranks(train_without_dropout, ranks, many)
    np.testing.assert_allclose(losses(many), losses(one), atol=1e-4)
    assert losses(one)[-1] < losses(one)[0]
    start = load_checkpoint(str(one.start_checkpoint)).state_dict()
    expected, found = (load_checkpoint(job.output_model).state_dict() for job in (one, many))
    for name in ("text_projection", "visual.blocks.0.attn.qkv.weight", "visual.pos_embed"):
        moved = (expected[name] - start[name]).norm()
        assert (found[name] - expected[name]).norm() < 1e-2 * moved, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deepspeed", "micro_batch"),
    [("zero1_bf16", None), ("zero1_bf16", 3), ("zero2_bf16", 3), ("zero1_autocast", 3)],
)
def test_half_precision_stays_in_its_band(tmp_path: Path, deepspeed: str, micro_batch: int | None) -> None:
    one = job_of_20_steps(tmp_path, "one", optimizer="muon", deepspeed="zero0", max_gradient_norm=1.0)
    run_ranks(train_without_dropout, 1, one)
    half = dataclasses.replace(one.config, deepspeed=deepspeed, ranks=2, micro_batch=micro_batch)
    two = dataclasses.replace(one, config=half, folder=str(tmp_path / "two"))
    two = dataclasses.replace(two, output_model=f"{two.folder}/model.safetensors")
    Path(two.folder).mkdir()
    run_ranks(train_without_dropout, 2, two)
    np.testing.assert_allclose(losses(two), losses(one), atol=0.05)
    assert max(np.abs(np.subtract(losses(two), losses(one)))) > 1e-6  # else nothing was in 16 bits
    start = load_checkpoint(str(one.start_checkpoint)).state_dict()
    expected, found = (load_checkpoint(job.output_model).state_dict() for job in (one, two))
    for name in ("text_projection", "visual.blocks.0.attn.qkv.weight", "visual.head.weight"):
        moved = (expected[name] - start[name]).norm()
        # Rounding fills directions in which there is no gradient, and Muon steps as far there as elsewhere.
        assert (found[name] - expected[name]).norm() < 0.6 * moved, name


def test_a_step_with_an_infinite_gradient_changes_nothing() -> None:
    weight, gain = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(8))
    groups: list[dict[str, Any]] = [{"params": [weight], "is_muon": True}, {"params": [gain]}]
    optimizer = MuonAdamW(groups, lr=0.1, fused=True)
    before: dict[str, Tensor] = {}
    for found_inf in (0.0, 1.0):
        if found_inf:
            before = {"weight": weight.detach().clone(), "gain": gain.detach().clone()}
            before["mean"] = optimizer.state[weight]["exp_avg"].clone()
        weight.grad = torch.full((4, 8), torch.inf if found_inf else 1.0)
        gain.grad = torch.full((8,), torch.inf if found_inf else 1.0)
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        optimizer.step()
    assert before["weight"].ne(1).all()
    assert torch.equal(weight, before["weight"])
    assert torch.equal(gain, before["gain"])
    assert torch.equal(optimizer.state[weight]["exp_avg"], before["mean"])
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 3},
        {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        {"stage": 2, "cpu_offload": True},
        {"stage": 2, "zenflow": {"topk_ratio": 0.1}},
    ],
    ids=str,
)
def test_without_whole_matrices_on_the_device_it_is_refused(tmp_path: Path, zero: dict[str, Any]) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    config = dataclasses.replace(MUON, deepspeed=str(file))
    with pytest.raises(ConfigError, match=r'\[stage2\] optimizer = "muon", but .*mine\.json is ZeRO 3 or'):
        check_fits(config, MODELS["ViT-B-16"], "stage2")


def test_ranks_with_nothing_but_padding_have_no_matrix() -> None:
    places = ((0, torch.Size((4, 4))), (16, torch.Size((2, 4))), (24, torch.Size((1, 4))))
    assert _spans(places, 10, 4) == [
        (places[:1], 0, 16),
        (places[:2], 0, 24),
        (places[1:], 16, 28),
        ((), 0, 0),
    ]
