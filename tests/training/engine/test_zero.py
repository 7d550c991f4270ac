"""Every ZeRO stage, precision and micro-batch against plain PyTorch on the same global batches."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.batches import WholeBatches
from tests.helpers.rank_processes import run_ranks
from tests.helpers.shard_files import VOCABULARY
from tests.helpers.train_jobs import make_job, small_models, train_rank
from training.config.job import TrainJob
from training.model.clip import INITIAL_LOGIT_BIAS, build_clip
from training.weights.formats import read_weights
from training.weights.weights import load_checkpoint, save_checkpoint

STEPS = 20
# Root mean square of a weight's gradients; below, they are rounding, and Adam steps as far on that as on any.
NOISE = 1e-6


def bias_at_the_start(job: TrainJob) -> float | None:
    from training.model.config import MODELS
    from training.model.tokenizer import Tokenizer
    from training.pretrain import build_model

    MODELS.update(small_models(dropout=0.0))
    bias = build_model(job, Tokenizer.load(job.vocabulary)).logit_bias
    return None if bias is None else bias.item()


def job_of_20_steps(folder: Path, run: str, **changes: Any) -> TrainJob:
    """A job whose first features already differ from each other: then gradients are more than rounding."""
    job = make_job(folder, run, sizes=(64, 64, 32), **{"epochs": 2, "peak_learning_rate": 3e-4, **changes})
    config = small_models(dropout=0.0)[job.model]
    generator = torch.Generator().manual_seed(11)
    clip = build_clip(config, vocab_size=len(VOCABULARY))
    for parameter in clip.parameters():
        if parameter.ndim > 1:
            spread = parameter[0].numel() ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        elif parameter.numel() > 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    start = str(folder / f"start-{run}.safetensors")
    save_checkpoint(start, clip, clip.config, {})
    return dataclasses.replace(job, start_checkpoint=start)


def train_without_dropout(job: TrainJob) -> None:
    train_rank(job, dropout=0.0)


def losses(job: TrainJob) -> list[float]:
    lines = (Path(job.folder) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


class Plain(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]
    significant: dict[str, Tensor]  # where a weight's gradients were more than noise
    start: dict[str, Tensor]  # weights before the first step


def train_plainly(job: TrainJob) -> Plain:
    """Train without DeepSpeed.

    One process, the whole batch in one forward, the N × N matrix of the formula, and torch's AdamW.
    """
    from training.engine.optim import build_optimizer, learning_rate
    from training.model.config import MODELS
    from training.model.preprocess import MEAN, STD
    from training.model.tokenizer import Tokenizer
    from training.pretrain import build_model, make_reader, sample_order, view_config

    MODELS.update(small_models(dropout=0.0))
    config, tokenizer = job.config, Tokenizer.load(job.vocabulary)
    clip = build_model(job, tokenizer).train()
    reader = make_reader(job, sample_order(job), tokenizer, clip, lanes=range(config.num_lanes))
    batches = WholeBatches(reader, view_config(job, reader, clip))
    adam = build_optimizer(clip, config)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    start = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    found = []
    for step in range(STEPS):
        batch = batches.read(step)
        image_BD = clip.encode_image((batch.image.float() / 255 - mean) / std)
        logits = clip.logit_scale.exp() * image_BD @ clip.encode_text(batch.tokens_BL).T
        if config.loss == "sigmoid":
            assert clip.logit_bias is not None
            is_positive = (batch.image_id_B[:, None] == batch.image_id_B) | (
                batch.caption_id_B[:, None] == batch.caption_id_B
            )
            sign = torch.where(is_positive, 1.0, -1.0)
            loss = -F.logsigmoid(sign * (logits + clip.logit_bias)).sum() / len(logits)
        else:
            target = torch.arange(len(logits))
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        adam.param_groups[0]["lr"] = adam.param_groups[1]["lr"] = learning_rate(step, STEPS, config)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, np.log(config.max_temperature))
        found.append(loss.item())
    bias_correction = 1 - config.adam_beta2**STEPS
    significant = {
        name: (adam.state[parameter]["exp_avg_sq"] / bias_correction).sqrt() > NOISE
        for name, parameter in clip.named_parameters()
    }
    return Plain(found, clip.state_dict(), significant, start)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return train_plainly(job_of_20_steps(tmp_path_factory.mktemp("plain"), "plain"))


def assert_as_plain(job: TrainJob, plain: Plain) -> None:
    expected, weights, significant, _ = plain
    assert len(expected) == STEPS
    np.testing.assert_allclose(losses(job), expected, atol=1e-5)
    ours = load_checkpoint(job.output_model).state_dict()
    assert sum(int(mask.sum()) for mask in significant.values()) > 200_000
    for name, mask in significant.items():
        if mask.any():
            difference = (ours[name] - weights[name])[mask].norm()
            assert difference <= 1e-5 * weights[name][mask].norm(), name


@pytest.mark.parametrize(
    ("deepspeed", "ranks", "micro_batch"),
    [
        ("zero1", 1, 3),
        ("zero1", 2, None),
        pytest.param("overlapped zero2", 2, 3, marks=pytest.mark.slow),  # as on GPUs
        pytest.param("zero3", 2, None, marks=pytest.mark.slow),
        pytest.param("overlapped zero1", 2, 3, marks=pytest.mark.slow),
        pytest.param("zero2", 2, 3, marks=pytest.mark.slow),
        # 4, 4 and 8 samples: two ranks have none in the last micro-batches
        pytest.param("zero1", 3, 1, marks=pytest.mark.slow),
        pytest.param("zero3", 3, 1, marks=pytest.mark.slow),
        pytest.param("zero0", 2, None, marks=pytest.mark.slow),
        pytest.param("zero0", 2, 3, marks=pytest.mark.slow),
        pytest.param("zero2", 2, None, marks=pytest.mark.slow),
        pytest.param("zero3", 2, 3, marks=pytest.mark.slow),
        pytest.param("zero3_offload", 2, None, marks=pytest.mark.slow),
        pytest.param("zero0", 4, None, marks=pytest.mark.slow),
        pytest.param("zero1", 4, None, marks=pytest.mark.slow),
        pytest.param("zero1", 3, 2, marks=pytest.mark.slow),
        pytest.param("zero2", 4, None, marks=pytest.mark.slow),
        pytest.param("zero3", 4, None, marks=pytest.mark.slow),
        pytest.param("zero3_offload", 4, 3, marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_are_those_of_plain_pytorch(
    tmp_path: Path, plain: Plain, deepspeed: str, ranks: int, micro_batch: int | None
) -> None:
    if deepspeed.startswith("overlapped"):
        zero = {"stage": int(deepspeed[-1]), "overlap_comm": True, "reduce_bucket_size": 20_000}
        deepspeed = str(tmp_path / "mine.json")
        Path(deepspeed).write_text(json.dumps({"zero_optimization": zero}))
    job = job_of_20_steps(tmp_path, "run", deepspeed=deepspeed, ranks=ranks, micro_batch=micro_batch)
    run_ranks(train_without_dropout, ranks, job)
    assert_as_plain(job, plain)


@pytest.mark.parametrize(
    ("deepspeed", "micro_batch"), [("zero1", 3), pytest.param("zero3", None, marks=pytest.mark.slow)]
)
def test_the_sigmoid_loss_learns_its_bias(tmp_path: Path, deepspeed: str, micro_batch: int | None) -> None:
    """Also with several positives; a later stage starts with the bias, and other readers leave it out."""
    changes: dict[str, Any] = {"loss": "sigmoid", "several_positives": True}
    plain = train_plainly(job_of_20_steps(tmp_path, "plain", **changes))
    job = job_of_20_steps(tmp_path, "run", deepspeed=deepspeed, ranks=2, micro_batch=micro_batch, **changes)
    run_ranks(train_without_dropout, 2, job)
    assert_as_plain(job, plain)
    bias = load_checkpoint(job.output_model).logit_bias
    assert bias is not None
    assert abs(bias.item() - INITIAL_LOGIT_BIAS) > 1e-4
    next_stage = dataclasses.replace(job, start_checkpoint=job.output_model)
    softmax = dataclasses.replace(next_stage, config=dataclasses.replace(job.config, loss="softmax"))
    assert run_ranks(bias_at_the_start, 1, next_stage) == [bias.item()]
    assert run_ranks(bias_at_the_start, 1, softmax) == [None]
    weights = read_weights(job.output_model)
    assert weights.dropped == ("logit_bias",)
    assert weights.problems() == {}


@pytest.mark.parametrize(
    ("deepspeed", "micro_batch"),
    [
        pytest.param("zero1_autocast", None, marks=pytest.mark.slow),
        ("zero2_bf16", None),
        pytest.param("zero1_bf16", None, marks=pytest.mark.slow),
        pytest.param("zero3_bf16", None, marks=pytest.mark.slow),
        # gradients of micro-batches add up in float32
        pytest.param("zero1_bf16", 3, marks=pytest.mark.slow),
        pytest.param("zero2_bf16", 3, marks=pytest.mark.slow),
        pytest.param("zero3_bf16", 3, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_stays_in_its_band(
    tmp_path: Path, plain: Plain, deepspeed: str, micro_batch: int | None
) -> None:
    """Losses of 20 steps to 0.05: bfloat16 has 8 bits, and losses are differences of logits of up to 14."""
    job = job_of_20_steps(tmp_path, "run", deepspeed=deepspeed, ranks=2, micro_batch=micro_batch)
    run_ranks(train_without_dropout, 2, job)
    found = losses(job)
    np.testing.assert_allclose(found, plain.losses, atol=0.05)
    assert max(np.abs(np.subtract(found, plain.losses))) > 1e-6  # else nothing was in bfloat16
    start, ours = plain.start, load_checkpoint(job.output_model).state_dict()
    moved = {name: (plain.weights[name] - start[name]).norm() for name in plain.significant}
    for name in ("text_projection", "logit_scale", "visual.head.weight"):
        assert (ours[name] - plain.weights[name]).norm() < 0.2 * moved[name], name


def train_at(job: TrainJob, names: tuple[str, ...]) -> list[list[float]]:
    """Losses at several ZeRO stages, one after the other in the same process."""
    found = []
    for name in names:
        folder = f"{job.folder}-{name}"
        Path(folder).mkdir(exist_ok=True)
        config = dataclasses.replace(job.config, deepspeed=name)
        one = dataclasses.replace(
            job, config=config, folder=folder, output_model=f"{folder}/model.safetensors"
        )
        train_without_dropout(one)
        found.append(losses(one))
    return found


@pytest.mark.slow
def test_a_twin_of_vit_bigg_trains_at_every_stage(tmp_path: Path) -> None:
    """Weights and gradients distributed, with GELU and feed-forward layers that are not 4 × as wide."""
    changes: dict[str, Any] = {"ranks": 2, "epochs": 1, "micro_batch": 4, "validate_every_steps": 0}
    job = job_of_20_steps(tmp_path, "run", model="twin-ViT-bigG-14", checkpoint_activations=True, **changes)
    whole, *sharded, bf16 = run_ranks(train_at, 2, job, ("zero0", "zero1", "zero3", "zero3_bf16"))[0]
    assert whole[-1] < whole[0]
    for found in sharded:
        np.testing.assert_allclose(found, whole, atol=1e-5)
    np.testing.assert_allclose(bf16, whole, atol=0.1)


@pytest.mark.slow
def test_gradients_are_clipped_as_deepspeed_clips_them(tmp_path: Path, plain: Plain) -> None:
    """At ZeRO 3 DeepSpeed clips; below, training does, on the device."""
    changes: dict[str, Any] = {"ranks": 2, "epochs": 1, "max_gradient_norm": 0.05, "validate_every_steps": 0}
    job = job_of_20_steps(tmp_path, "run", **changes)
    theirs, *ours = run_ranks(train_at, 2, job, ("zero3", "zero0", "zero1", "zero2"))[0]
    assert max(np.abs(np.subtract(theirs, plain.losses[: len(theirs)]))) > 1e-4
    for found in ours:
        np.testing.assert_allclose(found, theirs, atol=1e-6)


def train_from(job: TrainJob) -> dict[str, npt.NDArray[Any]]:
    """Train; returns the weights it started from."""
    from training.model.config import MODELS
    from training.model.tokenizer import Tokenizer
    from training.pretrain import build_model

    MODELS.update(small_models(dropout=0.0))
    start = build_model(job, Tokenizer.load(job.vocabulary)).state_dict()
    train_rank(job, dropout=0.0)
    return {name: tensor.numpy() for name, tensor in start.items()}


@pytest.mark.parametrize(
    ("deepspeed", "model"),
    [
        ("zero2_bf16", "small-vit"),
        pytest.param("zero3", "small-rn", marks=pytest.mark.slow),
        pytest.param("zero3_bf16", "small-vit", marks=pytest.mark.slow),
        pytest.param("zero1_autocast", "small-rn", marks=pytest.mark.slow),
        pytest.param("zero3_offload", "small-vit", marks=pytest.mark.slow),
    ],
)
def test_a_locked_tower_stays_byte_for_byte(tmp_path: Path, deepspeed: str, model: str) -> None:
    changes: dict[str, Any] = {"lock_image": True, "model": model, "epochs": 1, "micro_batch": 3}
    job = job_of_20_steps(tmp_path, "run", deepspeed=deepspeed, ranks=2, **changes)
    start = run_ranks(train_from, 2, job)[0]
    end = load_checkpoint(job.output_model).state_dict()
    for name, tensor in start.items():
        if name.startswith("visual."):
            np.testing.assert_array_equal(tensor, end[name].numpy(), name)
    assert not np.array_equal(start["text_projection"], end["text_projection"].numpy())


def test_bfloat16_with_batch_norms_is_refused(tmp_path: Path) -> None:
    job = job_of_20_steps(tmp_path, "run", deepspeed="zero1_bf16", model="small-rn")
    with pytest.raises(AssertionError, match=r"ConfigError: .*running statistics .* use zero1_autocast"):
        run_ranks(train_without_dropout, 1, job)


def features_of_both_passes(job: TrainJob) -> list[tuple[bool, npt.NDArray[Any]]]:
    """(whether it is for the backward pass, text features) of every forward of training."""
    from training.engine.towers import Towers

    found = []
    forward = Towers.forward

    def watched(towers: Towers, *inputs: Tensor) -> tuple[Tensor, ...]:
        features = forward(towers, *inputs)
        found.append((torch.is_grad_enabled(), features[1].detach().numpy().copy()))
        return features

    pytest.MonkeyPatch().setattr(Towers, "forward", watched)
    train_rank(job, dropout=0.3)
    return found


def test_a_micro_batch_runs_again_with_the_dropout_it_had(tmp_path: Path) -> None:
    job = job_of_20_steps(tmp_path, "run", epochs=1, micro_batch=6)  # parts of 6, 5 and 5
    job = dataclasses.replace(job, start_checkpoint=None)  # which has no dropout
    (found,) = run_ranks(features_of_both_passes, 1, job)
    first = [features for again, features in found if not again]
    second = [features for again, features in found if again]
    assert [len(features) for features in first[:3]] == [6, 5, 5]
    assert all(np.array_equal(*pair) for pair in zip(first, second, strict=True))
    assert not np.array_equal(first[1], first[2])


def precisions_of_both_passes(job: TrainJob) -> set[tuple[bool, bool]]:
    """(the pass keeps activations, it casts) of every forward pass of the image tower."""
    from training.model.clip import CLIP

    encode, found = CLIP.encode_image, set()

    def noted(self: CLIP, image: Tensor, *arguments: Any) -> Tensor:
        found.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return encode(self, image, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIP, "encode_image", noted)
        train_without_dropout(dataclasses.replace(job, evaluations={}))
    return found


def test_both_passes_of_a_micro_batch_cast_alike(tmp_path: Path) -> None:
    never = {"validate_every_steps": 0, "epochs": 1}
    job = make_job(tmp_path, "run", micro_batch=4, deepspeed="zero1_autocast", **never)
    (found,) = run_ranks(precisions_of_both_passes, 1, job)
    assert {(True, True), (False, True)} <= found
    assert (True, False) not in found


def test_running_statistics_see_every_micro_batch_once(tmp_path: Path) -> None:
    job = job_of_20_steps(tmp_path, "run", model="small-rn", epochs=1, micro_batch=8)
    run_ranks(train_without_dropout, 1, job)
    end = load_checkpoint(job.output_model).state_dict()
    counts = {int(tensor) for name, tensor in end.items() if name.endswith("num_batches_tracked")}
    assert counts == {20}  # 10 steps of 2 parts


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_running_statistics_see_nothing_of_what_ranks_without_samples_compute(
    tmp_path: Path, deepspeed: str
) -> None:
    changes: dict[str, Any] = {"model": "small-rn-64", "epochs": 1, "ranks": 3, "micro_batch": 1}
    job = job_of_20_steps(tmp_path, "run", deepspeed=deepspeed, **changes)
    run_ranks(train_without_dropout, 3, job)
    end = load_checkpoint(job.output_model).state_dict()
    counts = {int(tensor) for name, tensor in end.items() if name.endswith("num_batches_tracked")}
    assert counts == {40}  # 10 steps of the 4 samples of rank 0, which writes; rank 2 has 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("zero3", "zero1"), ("zero1", "zero3"), ("zero3", "zero3_offload")]
)
def test_a_run_goes_on_at_another_stage_and_number_of_ranks(
    tmp_path: Path, plain: Plain, before: str, after: str
) -> None:
    first = job_of_20_steps(tmp_path, "run", deepspeed=before, ranks=2, save_every_steps=7)
    run_ranks(train_without_dropout, 2, first)
    Path(first.output_model).unlink()
    newest = Path(first.folder) / "checkpoints" / "step_000000014"
    assert newest.is_dir()
    second = job_of_20_steps(tmp_path, "run", deepspeed=after, ranks=3, micro_batch=2)
    run_ranks(train_without_dropout, 3, second)
    assert_as_plain(second, plain)
