"""The locked image tower compiled: another speed, the same training."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.records import ConfigError
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import CONFIG, build_config, make_job, small_models, train_rank
from training.config.job import TrainJob
from training.config.train import check_fits
from training.engine.towers import Towers
from training.model.clip import build_clip
from training.pretrain import check_compiler

LOCKED: dict[str, Any] = {"lock_image": True, "compile_image": True}


def test_only_what_can_be_compiled_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="only a locked image tower can be compiled"):
        build_config({"compile_image": True})
    config = build_config({"deepspeed": "zero3", **LOCKED})
    with pytest.raises(ConfigError, match="zero3 is ZeRO 3"):
        check_fits(config, small_models()["small-vit"], "stage1")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    check_compiler(CONFIG, "stage1")
    with pytest.raises(ConfigError, match=r"\[stage1\] compile_image = true: no C\+\+ compiler: /nowhere"):
        check_compiler(dataclasses.replace(CONFIG, **LOCKED), "stage1")


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
@pytest.mark.parametrize("deepspeed", ["zero1", "zero1_autocast", "zero1_bf16"])
def test_training_is_the_same_and_goes_on_with_the_same_bytes(tmp_path: Path, deepspeed: str) -> None:
    changes: dict[str, Any] = {"ranks": 2, "micro_batch": 3, "deepspeed": deepspeed}  # parts of 3 and 2
    eager = make_job(tmp_path, "eager", lock_image=True, **changes)
    compiled = make_job(tmp_path, "compiled", **LOCKED, **changes)
    assert run_ranks(train_and_count, 2, eager) == [0, 0]
    assert min(run_ranks(train_and_count, 2, compiled)) > 0
    np.testing.assert_allclose(losses(compiled), losses(eager), atol=1e-5 if deepspeed == "zero1" else 2e-2)

    again = make_job(tmp_path, "again", **LOCKED, **changes)
    shutil.copytree(Path(compiled.folder) / "checkpoints", Path(again.folder) / "checkpoints")
    shutil.rmtree(sorted((Path(again.folder) / "checkpoints").iterdir())[-1])
    assert min(run_ranks(train_and_count, 2, again)) > 0
    assert outputs(again) == outputs(compiled)


@pytest.mark.slow
def test_features_are_cached_by_the_compiled_tower(tmp_path: Path) -> None:
    eager = make_job(tmp_path / "a", "run", lock_image=True, cached_views=2)
    compiled = make_job(tmp_path / "b", "run", cached_views=2, **LOCKED)
    assert run_ranks(train_and_count, 1, eager) == [0]
    assert run_ranks(train_and_count, 1, compiled)[0] > 0
    np.testing.assert_allclose(losses(compiled), losses(eager), atol=2e-3)  # a float16 rounds the other way
