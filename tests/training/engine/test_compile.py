"""Towers compiled by torch: another speed, the same training."""

import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.config import build
from pipeline.core.records import ConfigError
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import CONFIG, build_config, make_job, small_models, train_rank
from training.config.job import TrainJob
from training.config.train import TrainConfig, check_fits
from training.engine import compiler
from training.engine.compiler import check_compiler, compiles
from training.engine.towers import Towers
from training.model import compiled as layers
from training.model.clip import build_clip
from training.stages import TrainStageConfig

LOCKED: dict[str, Any] = {"lock_image": True, "compile": True}


def test_only_what_can_be_compiled_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config({"deepspeed": "zero3", "compile": True})
    with pytest.raises(ConfigError, match="zero3 is ZeRO 3"):
        check_fits(config, small_models()["small-vit"], "stage1")
    assert not compiles(CONFIG)  # there is no GPU
    compiled = dataclasses.replace(CONFIG, compile=True)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    check_compiler(CONFIG, "stage1")
    with pytest.raises(ConfigError, match=r"\[stage1\] compile = true: no compiler: /nowhere/c\+\+ is not"):
        check_compiler(compiled, "stage1")


def test_the_setting_s_earlier_name_keeps_working() -> None:
    table = {"epochs": 1, "global_batch": 8, "compile_image": True}
    assert build(TrainConfig, table, "run.toml").compile is True
    with pytest.raises(ConfigError, match=r"run.toml: compile_image: the earlier name of compile, which is"):
        build(TrainConfig, {**table, "compile": True}, "run.toml")
    stage = {
        "train": {**table, "compile_image": False},
        "model": "tiny-vit",
        "vocabulary": "v",
        "validate": False,
    }
    assert build(TrainStageConfig, stage, "run.toml").train.compile is False


def test_a_gpu_compiles_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_computes_on_gpu", lambda: True)
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: name == "triton")
    monkeypatch.setenv("CC", sys.executable)
    assert compiles(CONFIG)
    assert not compiles(dataclasses.replace(CONFIG, compile=False))
    assert not compiles(dataclasses.replace(CONFIG, deepspeed="zero3"))
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert not compiles(CONFIG)
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Triton, .* is not installed; .* or set compile = false"):
        check_compiler(dataclasses.replace(CONFIG, compile=True), "stage2")


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torch trace and differentiate as it does, but generate no code, which takes long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    layers.compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    layers.compiled.cache_clear()
    torch._dynamo.reset()


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_layers_give_features_and_gradients_of_uncompiled_ones(recompute: bool) -> None:
    check_features_and_gradients(recompute)
    # The image tower has one for each size of a batch; the text tower fills its rows to one length.
    assert num_graphs() == 3


def check_features_and_gradients(recompute: bool) -> None:
    torch.manual_seed(0)
    clip = build_clip(small_models(dropout=0.0)["small-vit"]).train()
    clip.set_activation_checkpointing(recompute)
    compiled = dataclasses.replace(CONFIG, compile=True)
    towers = [Towers(clip, num_samples_of_ranks=(5,), config=config) for config in (CONFIG, compiled)]
    for size in (5, 3, 5):
        image_BCHW = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8)
        tokens_BL = torch.randint(1, 20, (size, 9)).tril(size)
        found = []
        for tower in towers:
            clip.zero_grad()
            features = tower(image_BCHW, tokens_BL)
            (features.image_BD.pow(3).sum() + features.text_BD.pow(3).sum()).backward()
            gradients = {name: each.grad for name, each in clip.named_parameters() if each.grad is not None}
            found.append((features.image_BD, features.text_BD, gradients))
        torch.testing.assert_close(found[1][:2], found[0][:2], atol=1e-6, rtol=0)
        assert len(found[0][2]) > 50
        torch.testing.assert_close(found[1][2], found[0][2], atol=1e-6, rtol=1e-4)
    before = num_graphs()
    clip.encode_image(torch.rand(2, 3, 32, 32))  # as a validation does: uncompiled
    clip.encode_text(torch.ones(2, 100, dtype=torch.int64)[:, :9])
    assert num_graphs() == before


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_so_do_those_that_inductor_generates_code_for(recompute: bool) -> None:
    check_features_and_gradients(recompute)


@pytest.mark.slow
def test_compiled_features_are_the_eager_ones() -> None:
    for name in ("small-vit", "small-rn"):
        torch.manual_seed(0)
        clip = build_clip(small_models()[name])
        clip.lock_image_tower()
        eager = Towers(clip, num_samples_of_ranks=(5,), config=dataclasses.replace(CONFIG, lock_image=True))
        compiled = Towers(clip, num_samples_of_ranks=(5,), config=dataclasses.replace(CONFIG, **LOCKED))
        for size in (5, 3, 1, 5):
            image_BCHW = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8)
            found, expected = compiled.encode_image(image_BCHW), eager.encode_image(image_BCHW)
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 4  # two models, each for one size and then for any


def train_and_count(job: TrainJob) -> int:
    """Frames that torch compiled."""
    train_rank(job, dropout=0.0)
    return int(torch._dynamo.utils.counters["frames"]["ok"])


def outputs(job: TrainJob) -> tuple[bytes, bytes]:
    return Path(job.output_model).read_bytes(), (Path(job.folder) / "metrics.jsonl").read_bytes()


def losses(job: TrainJob) -> list[float]:
    lines = (Path(job.folder) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deepspeed", "locked"),
    [
        ("zero1", True),
        ("zero1_autocast", True),
        ("zero1_bf16", True),
        ("zero1", False),
        ("zero2_bf16", False),
    ],
)
def test_training_is_the_same_and_goes_on_with_the_same_bytes(
    tmp_path: Path, deepspeed: str, locked: bool
) -> None:
    changes: dict[str, Any] = {"ranks": 2, "micro_batch": 3, "deepspeed": deepspeed}  # parts of 3 and 2
    changes["lock_image"] = locked
    eager = make_job(tmp_path, "eager", **changes)
    compiled = make_job(tmp_path, "compiled", compile=True, **changes)
    assert run_ranks(train_and_count, 2, eager) == [0, 0]
    assert min(run_ranks(train_and_count, 2, compiled)) > 0
    np.testing.assert_allclose(losses(compiled), losses(eager), atol=1e-5 if deepspeed == "zero1" else 2e-2)

    again = make_job(tmp_path, "again", compile=True, **changes)
    shutil.copytree(Path(compiled.folder) / "checkpoints", Path(again.folder) / "checkpoints")
    shutil.rmtree(sorted((Path(again.folder) / "checkpoints").iterdir())[-1])
    assert min(run_ranks(train_and_count, 2, again)) > 0
    assert outputs(again) == outputs(compiled)


@pytest.mark.slow
def test_a_micro_batch_runs_again_with_the_dropout_it_had() -> None:
    """Inductor draws dropout itself; both passes have to draw the same."""
    torch.manual_seed(0)
    clip = build_clip(small_models(dropout=0.3)["small-vit"]).train()
    tokens_BL = torch.randint(1, 20, (7, 9))

    def encode(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return clip.encode_text(tokens_BL, compiled=True)

    with torch.no_grad():
        first = encode(1)
    assert torch.equal(encode(1), first)
    assert not torch.equal(encode(2), first)


@pytest.mark.slow
def test_features_are_cached_by_the_compiled_tower(tmp_path: Path) -> None:
    eager = make_job(tmp_path / "a", "run", lock_image=True, cached_views=2)
    compiled = make_job(tmp_path / "b", "run", cached_views=2, **LOCKED)
    assert run_ranks(train_and_count, 1, eager) == [0]
    assert run_ranks(train_and_count, 1, compiled)[0] > 0
    np.testing.assert_allclose(losses(compiled), losses(eager), atol=2e-3)  # a float16 rounds the other way
