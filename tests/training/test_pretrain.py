import dataclasses
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.shard_format import sidecar_of
from tests.helpers.launched_jobs import (
    LIMIT_SECONDS,
    launch,
    losses,
    outputs,
    read_metrics,
)
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import make_job, small_models, train_rank
from training.config.job import TrainJob
from training.config.train import AugmentConfig
from training.weights.formats import resize_positions
from training.weights.weights import load_checkpoint


def train_rank_without_dropout(job: TrainJob) -> None:
    train_rank(job, dropout=0.0)


@pytest.mark.slow
def test_ranks_and_zero_stages_make_no_difference(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "exclude_duplicates": True,
        "augment": AugmentConfig(horizontal_flip=0.5, auto_augment="original"),
        "adam_eps": 1e-5,  # at 1e-6, a gradient that is mere rounding moves a weight by a whole step
    }
    one = make_job(tmp_path, "one", ranks=1, **changes)
    run_ranks(train_rank_without_dropout, 1, one)
    # 3 ranks own 4 lanes: their shares of a batch differ
    for ranks, deepspeed in ((2, "zero1"), (3, "zero2")):
        other = make_job(tmp_path, f"{deepspeed}-{ranks}", ranks=ranks, deepspeed=deepspeed, **changes)
        run_ranks(train_rank_without_dropout, ranks, other)
        np.testing.assert_allclose(losses(other), losses(one), atol=1e-4)
        ours, theirs = load_file(other.output_model), load_file(one.output_model)
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("model", [pytest.param("small-vit", marks=pytest.mark.slow), "small-rn-64"])
def test_a_larger_image_size_continues_from_a_smaller_one(tmp_path: Path, model: str) -> None:
    """The position embedding is interpolated; all else is taken as it is."""
    small, large = (32, 64) if model == "small-rn-64" else (16, 32)
    first = make_job(tmp_path, "first", model=model, image_size_px=small, epochs=1)
    run_ranks(train_rank_without_dropout, 1, first)
    second = make_job(tmp_path, "second", model=model, epochs=1, peak_learning_rate=1e-12)
    second = dataclasses.replace(second, start_checkpoint=first.output_model)
    run_ranks(train_rank_without_dropout, 1, second)
    before, after = (load_checkpoint(job.output_model) for job in (first, second))
    assert [clip.config.vision.image_size_px for clip in (before, after)] == [small, large]
    assert before.config.name == after.config.name == model
    earlier, later = before.state_dict(), after.state_dict()
    changed = {name for name, tensor in earlier.items() if tensor.shape != later[name].shape}
    assert changed == {"visual.pos_embed" if model == "small-vit" else "visual.head.pos_embed"}
    (name,) = changed
    grid = later[name].reshape(-1, later[name].shape[-1])
    expected = resize_positions(earlier[name].reshape(-1, grid.shape[-1]), round((len(grid) - 1) ** 0.5))
    torch.testing.assert_close(grid, expected, atol=1e-6, rtol=0)
    for name in earlier.keys() - changed:
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(earlier[name], later[name], atol=1e-6, rtol=0)


def test_it_learns_and_writes_what_it_promises(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", sizes=(60, 60, 8), epochs=14, global_batch=32, exclude_duplicates=True)
    run_ranks(train_rank_without_dropout, 1, job)  # with dropout it is luck whether so few steps learn
    metrics = read_metrics(job)
    assert losses(job)[-1] < losses(job)[0] - 0.3
    assert [line["step"] for line in metrics if "evaluation" in line] == [*range(0, 57, 4)]
    assert set(metrics[0]) == {"step", "samples_seen", "evaluation", "recall"}
    assert set(metrics[1]) == {"step", "samples_seen", "loss", "temperature", "learning_rate"}
    assert metrics[-1]["samples_seen"] == 56 * 32
    checkpoints = list((Path(job.folder) / "checkpoints").iterdir())
    assert len(checkpoints) == job.config.keep_checkpoints + 1  # and that of the warm-up
    log = [json.loads(line) for line in (Path(job.folder) / "log.jsonl").read_text().splitlines()]
    speed = [line for line in log if "samples_per_second" in line]
    assert len(speed) == 56
    assert speed[-1]["samples_per_second"] > 0
    assert speed[-1]["data_wait_seconds"] >= 0
    # Of the time between steps: each part and its shares of all time so far.
    assert [line["step"] for line in log if "validation_seconds" in line] == [*range(0, 57, 4)]
    assert [line["step"] for line in log if "checkpoint_seconds" in line] == [*range(3, 56, 3), 56]
    assert 0 < log[-1]["checkpoint_share"] + log[-1]["validation_share"] < 1


def test_a_locked_image_tower_stays_as_it_is_byte_for_byte(tmp_path: Path) -> None:
    from training.model.config import MODELS
    from training.model.tokenizer import Tokenizer
    from training.pretrain import build_model
    from training.weights.weights import load_checkpoint

    MODELS.update(small_models())
    job = make_job(tmp_path, "run", model="small-rn", ranks=2, lock_image=True, epochs=1)
    start = build_model(job, Tokenizer.load(job.vocabulary)).state_dict()
    run_ranks(train_rank, 2, job)
    end = load_checkpoint(job.output_model).state_dict()
    assert any("running_mean" in name for name in end)
    for name, tensor in end.items():
        if name.startswith("visual."):
            assert torch.equal(tensor, start[name]), name
    assert not torch.equal(end["text_projection"], start["text_projection"])


def test_weights_are_handed_from_stage_to_stage(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": "small-rn", "epochs": 1}
    openai = str(tmp_path / "openai.pt")
    english = make_job(tmp_path, "english", **changes)
    english = dataclasses.replace(english, stage="english", openai_model=openai)
    stage1 = make_job(tmp_path, "stage1", **changes, lock_image=True)
    stage1 = dataclasses.replace(stage1, stage="stage1", image_weights=openai)
    stage2 = make_job(tmp_path, "stage2", **changes, peak_learning_rate=1e-30)
    stage2 = dataclasses.replace(stage2, start_checkpoint=stage1.output_model)
    for job in (english, stage1, stage2):
        run_ranks(train_rank, 1, job)
    first, second, third = (load_file(job.output_model) for job in (english, stage1, stage2))
    for name, tensor in second.items():
        if name.startswith("visual."):
            assert torch.equal(tensor, first[name]), name
        if "running_" not in name and "num_batches" not in name:  # batch norms look at pictures again
            assert torch.equal(tensor, third[name]), name
    assert not torch.equal(first["text_projection"], second["text_projection"])
    other = dataclasses.replace(stage2, model="small-vit", folder=str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    with pytest.raises(AssertionError, match=r"InputError: .*stage1/model.safetensors: holds another model"):
        run_ranks(train_rank, 1, other)


def gradient_norms(job: TrainJob) -> list[float]:
    """Length of the gradient that the optimizer sees, step by step."""
    found = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            found.append(sum(gradient.norm().item() ** 2 for gradient in gradients))
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.optim.AdamW", Watched)
        patch.setattr("deepspeed.runtime.engine.is_zero_supported_optimizer", lambda _: True)
        train_rank(job, dropout=0.0)
    return [float(sum(squares)) ** 0.5 for squares in np.array_split(found, len(losses(job)))]


@pytest.mark.parametrize("deepspeed", ["zero0", "zero1"])
def test_gradients_are_cut_to_the_asked_length(tmp_path: Path, deepspeed: str) -> None:
    changes: dict[str, Any] = {"epochs": 1, "deepspeed": deepspeed, "model": "small-rn"}
    (lengths,) = run_ranks(gradient_norms, 1, make_job(tmp_path, "plain", **changes))
    longest = lengths[0] / 2
    (cut,) = run_ranks(gradient_norms, 1, make_job(tmp_path, "cut", **changes, max_gradient_norm=longest))
    assert cut[0] == pytest.approx(longest, rel=1e-3)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = make_job(tmp_path, "plain", epochs=1)
    recomputed = make_job(tmp_path, "recomputed", epochs=1, checkpoint_activations=True)
    run_ranks(train_rank, 1, plain)
    run_ranks(train_rank, 1, recomputed)
    np.testing.assert_allclose(losses(recomputed), losses(plain), rtol=1e-6)


def notices(job: TrainJob) -> str:
    lines = (Path(job.folder) / "log.jsonl").read_text().splitlines()
    return "\n".join(line["notice"] for line in map(json.loads, lines) if "notice" in line)


@pytest.mark.parametrize(
    ("deepspeed", "ranks", "said"),
    [
        ("zero1", 1, "ranks 2 → 1"),
        pytest.param(
            "zero3",
            3,
            "ranks 2 → 3, deepspeed zero1 → zero3, ZeRO stage 1 → 3",
            marks=pytest.mark.slow,
        ),
        pytest.param("zero0", 1, "ZeRO stage 1 → 0", marks=pytest.mark.slow),
        pytest.param("zero2", 3, "ZeRO stage 1 → 2", marks=pytest.mark.slow),
        pytest.param("zero2 muon", 3, "ZeRO stage 1 → 2", marks=pytest.mark.slow),
    ],
)
def test_a_run_continues_on_other_ranks_in_another_zero_stage(
    tmp_path: Path, deepspeed: str, ranks: int, said: str
) -> None:
    deepspeed, _, optimizer = deepspeed.partition(" ")
    whole = make_job(tmp_path, "whole", ranks=2, optimizer=optimizer or "adamw")
    run_ranks(train_rank_without_dropout, 2, whole)
    config = dataclasses.replace(whole.config, ranks=ranks, deepspeed=deepspeed)
    continued = dataclasses.replace(whole, config=config)
    Path(whole.output_model).unlink()
    expected = losses(whole)
    run_ranks(train_rank_without_dropout, ranks, continued)
    assert losses(continued)[:3] == expected[:3]
    np.testing.assert_allclose(losses(continued), expected, atol=1e-4)
    assert "[stage2] resumes from step 3 with " in notices(continued)
    assert said in notices(continued)


def test_more_epochs_give_the_bytes_of_a_run_that_had_them_at_once(tmp_path: Path) -> None:
    """From the warm-up on: the cosine after it is another one for other epochs."""
    raised, whole = (make_job(tmp_path, run, epochs=epochs) for run, epochs in (("raised", 2), ("whole", 3)))
    run_ranks(train_rank, 1, raised)
    folder = Path(raised.folder) / "checkpoints"
    shutil.copytree(folder / "step_000000003", folder / "step_000000005")  # of the old schedule
    raised = dataclasses.replace(raised, config=whole.config)
    run_ranks(train_rank, 1, raised)
    run_ranks(train_rank, 1, whole)
    assert outputs(raised) == outputs(whole)
    assert (
        "[stage2] epochs 2 → 3: resumes from step 3, up to which both schedules are the same; the learning"
        " rate then follows a cosine to 0 at step 9"
    ) in notices(raised)
    fewer = dataclasses.replace(raised, config=dataclasses.replace(raised.config, epochs=1, warmup_steps=1))
    with pytest.raises(AssertionError, match=r"InputError.*made with (epochs = 3|warmup_steps = 2)"):
        run_ranks(train_rank, 1, fewer)


def test_another_configuration_does_not_continue(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", epochs=1, save_every_steps=1)
    run_ranks(train_rank, 1, job)
    changed = dataclasses.replace(job, config=dataclasses.replace(job.config, weight_decay=0.5))
    with pytest.raises(AssertionError, match=r"InputError.*step_.*weight_decay = 0.05, but this run has 0.5"):
        run_ranks(train_rank, 1, changed)
    other = dataclasses.replace(job, config=dataclasses.replace(job.config, optimizer="muon"))
    with pytest.raises(AssertionError, match=r"InputError.*step_.*optimizer"):
        run_ranks(train_rank, 1, other)


def test_activations_can_be_given_up_between_two_starts(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", save_every_steps=2)
    run_ranks(train_rank, 1, job)
    (Path(job.output_model)).unlink()
    changed = dataclasses.replace(job, config=dataclasses.replace(job.config, checkpoint_activations=True))
    run_ranks(train_rank, 1, changed)  # what a rank that ran out of memory is told to try
    assert Path(job.output_model).exists()


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", peak_learning_rate=1e38, warmup_steps=0)
    with pytest.raises(AssertionError, match=r"InputError: \[stage2\] the loss is (nan|inf) at step [23]"):
        run_ranks(train_rank, 1, job)
    (found,) = Path(job.folder).glob("not_finite_step_*_rank_0.json")
    assert len(json.loads(found.read_text())["keys"]) == job.config.global_batch
    assert all(np.isfinite(losses(job)))


def temperatures_and_masters(job: TrainJob) -> list[tuple[float, float]]:
    """(module's temperature, its float32 master) after every step."""
    from deepspeed.utils import safe_get_full_fp32_param

    from training import trainer as loop
    from training.engine.engine import StepResult, train_step

    found = []

    def watched(engine: Any, *arguments: Any) -> StepResult:
        result = train_step(engine, *arguments)
        scale = engine.module.clip.logit_scale
        master = safe_get_full_fp32_param(scale) if hasattr(scale, "_hp_mapping") else scale
        found.append((scale.exp().item(), master.exp().item()))
        return result

    pytest.MonkeyPatch().setattr(loop, "train_step", watched)
    train_rank(job)
    return found


@pytest.mark.parametrize("deepspeed", ["zero0", "zero1", "zero2"])
def test_the_temperature_is_clamped_in_the_master_too(tmp_path: Path, deepspeed: str) -> None:
    job = make_job(tmp_path, "run", ranks=2, epochs=1, max_temperature=9.0, deepspeed=deepspeed)
    for found in run_ranks(temperatures_and_masters, 2, job):
        # It starts at 14.3. Were the master not clamped, the second step would go on from there.
        assert found[0] == pytest.approx((9.0, 9.0), rel=1e-6)
        assert all(8.9 < module == master <= 9.000001 for module, master in found)


def train_rank_until_killed(job: TrainJob, step: int) -> None:
    """Die as by `kill -9`, in the middle of a step; checkpoints before it are written."""
    from training import trainer as loop
    from training.checkpoint.writer import CheckpointWriter
    from training.engine.engine import StepResult, train_step

    def killed(engine: Any, batch: Any, *arguments: Any) -> StepResult:
        if batch.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(engine, batch, *arguments)

    pytest.MonkeyPatch().setattr(CheckpointWriter, "start", lambda writer, write: write())
    pytest.MonkeyPatch().setattr(loop, "train_step", killed)
    train_rank(job)


@pytest.mark.slow
def test_killed_while_it_draws_captions_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "sizes": (16, 8),
        "global_batch": 8,
        "save_every_steps": 2,
        "deepspeed": "zero0",
    }
    whole, killed = (make_job(tmp_path, run, **changes) for run in ("whole", "killed"))
    for shard in whole.shards:
        table = pq.read_table(sidecar_of(shard.path))
        lists = [[text, text[:5], text[4:]] for text in table["caption"].to_pylist()]
        pq.write_table(table.append_column("captions", pa.array(lists)), sidecar_of(shard.path))
    run_ranks(train_rank, 1, whole)
    with pytest.raises(AssertionError, match="the rank died"):
        run_ranks(train_rank_until_killed, 1, killed, 5)  # of 6 steps; two epochs draw anew
    assert (Path(killed.folder) / "checkpoints" / "step_000000004").is_dir()
    run_ranks(train_rank, 1, killed)
    assert outputs(killed) == outputs(whole)
    kept = [np.load(path)["token_starts"] for path in (Path(killed.folder) / "tokens").iterdir()]
    assert sorted(len(starts) - 1 for starts in kept) == [3 * 8, 3 * 16]  # every caption


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_launched_again_gives_the_bytes_of_a_run_that_was_not(
    tmp_path: Path, optimizer: str
) -> None:
    changes: dict[str, Any] = {
        "model": "small-rn",
        "optimizer": optimizer,
        "ranks": 2,
        "epochs": 4,
        "save_every_steps": 4,
    }
    whole, killed = (make_job(tmp_path, run, **changes) for run in ("whole", "killed"))
    run_ranks(train_rank, 2, whole)
    with pytest.raises(AssertionError, match="the rank died"):
        run_ranks(train_rank_until_killed, 2, killed, 9)
    newest = Path(killed.folder) / "checkpoints" / "step_000000008" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    process = launch(killed)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output
    assert "step_000000008: damaged (optimizer.safetensors has changed bytes)" in output
    assert "resuming from" in output
    assert "step_000000004" in output
    assert '@progress {"done": 12, "total": 12, "text": "loss' in output
    assert outputs(killed) == outputs(whole)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": "small-rn", "ranks": 2, "epochs": 200, "save_every_steps": 20}
    whole, killed = (make_job(tmp_path, run, **changes) for run in ("whole", "killed"))
    run_ranks(train_rank, 2, whole)
    random = np.random.default_rng(0)
    for _ in range(10):
        process = launch(killed)
        try:
            process.communicate(timeout=random.uniform(1, 25))
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    process = launch(killed)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output
    assert outputs(killed) == outputs(whole)


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_and_is_shown(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", ranks=2)
    last = Path(job.shards[-1].path)
    data = bytearray(last.read_bytes())
    data[len(data) // 4 : -2048] = b"\0" * (len(data) - 2048 - len(data) // 4)
    last.write_bytes(data)
    process = launch(job)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode != 0
    assert f"error: {last}: " in output
    assert ".jpg is not the image" in output
