"""float16 with loss scaling: refused where there is no GPU; on one, it stays in a band around float32."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.records import ConfigError
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import CONFIG, make_job, train_rank
from training.config.job import TrainJob
from training.engine.precision import check_precision
from training.engine.zero_state import loss_scaling, set_loss_scaling

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU")


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_fp16_without_a_gpu_is_refused_in_one_line(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, deepspeed="zero1_fp16")
    with pytest.raises(ConfigError) as refusal:
        check_precision(config)
    assert str(refusal.value) == (
        "deepspeed = 'zero1_fp16': fp16 needs a GPU, and this machine computes on its cpu;"
        " take zero1 (float32) or zero1_bf16 here"
    )
    check_precision(dataclasses.replace(CONFIG, deepspeed="zero1_bf16"))
    job = make_job(tmp_path, "run", deepspeed="zero2_fp16", cached_views=1, lock_image=True)
    with pytest.raises(AssertionError, match=r"ConfigError: .*fp16 needs a GPU"):
        run_ranks(train_without_dropout, 1, job)
    assert not (tmp_path / "shards" / "features").exists()  # before hours of features are made


def test_loss_scaling_goes_on_where_it_was() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    def engine() -> SimpleNamespace:
        settings = {"init_scale": 2.0**16, "scale_window": 3, "min_scale": 1, "delayed_shift": 1}
        scaler = DynamicLossScaler(**settings, consecutive_hysteresis=False)
        return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))

    whole, stopped, resumed = engine(), engine(), engine()
    for each in (whole, stopped):
        for _ in range(6):
            each.optimizer.loss_scaler.update_scale(False)
    state = loss_scaling(stopped)
    assert state["cur_scale"] > 2.0**16
    set_loss_scaling(resumed, state)
    for _ in range(4):
        for each in (whole, resumed):
            each.optimizer.loss_scaler.update_scale(False)
        assert vars(resumed.optimizer.loss_scaler) == vars(whole.optimizer.loss_scaler)
    static = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=LossScaler(1)))
    set_loss_scaling(static, state)  # a run that goes on in float32
    assert static.optimizer.loss_scaler.loss_scale == 1
    assert loss_scaling(static) == {}


def train_without_dropout(job: TrainJob) -> None:
    train_rank(job, dropout=0.0)


def losses(job: TrainJob) -> list[float]:
    lines = (Path(job.folder) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@needs_gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_stays_in_its_band(tmp_path: Path, stage: int) -> None:
    """Losses to 0.02 of float32's: float16 has 11 bits, and logits are up to 14."""
    plain = make_job(tmp_path, "plain", deepspeed="zero1", epochs=4)
    half = make_job(tmp_path, "half", deepspeed=f"zero{stage}_fp16", epochs=4)
    for job in (plain, half):
        run_ranks(train_without_dropout, 1, job)
    np.testing.assert_allclose(losses(half), losses(plain), atol=0.02)
    assert max(np.abs(np.subtract(losses(half), losses(plain)))) > 1e-6  # else nothing was in float16


@needs_gpu
def test_an_fp16_run_that_stopped_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", deepspeed="zero1_fp16", epochs=3)
    run_ranks(train_without_dropout, 1, job)
    whole, found = Path(job.output_model).read_bytes(), losses(job)
    newest = max((Path(job.folder) / "checkpoints").iterdir())
    assert load_file(newest / "optimizer.safetensors")["loss_scaling.cur_scale"].item() > 1
    Path(job.output_model).unlink()
    run_ranks(train_without_dropout, 1, job)
    assert losses(job) == found
    assert Path(job.output_model).read_bytes() == whole
