import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.catalog import load
from pipeline.core.records import ConfigError, InputError, Manifest
from pipeline.core.stage import Context
from tests.helpers.rank_processes import run_ranks
from tests.helpers.shard_files import VOCABULARY
from tests.helpers.train_jobs import CONFIG, build_config, make_job, small_models, train_rank
from training.config.job import TrainJob
from training.config.train import DistilConfig
from training.engine.teacher import load_teacher
from training.losses import tiles
from training.losses.distillation import distillation_loss
from training.model.clip import build_clip
from training.model.config import ModelConfig
from training.stages import TrainStageConfig, plan
from training.weights.weights import load_checkpoint, save_checkpoint

N, D, E, TEMPERATURE = 13, 6, 9, 3.0


def features() -> tuple[list[Tensor], list[Tensor]]:
    """Student's image, text and scale; teacher's, wider."""
    generator = torch.Generator().manual_seed(5)
    sides = []
    for dim, scale in ((D, 10.0), (E, 30.0)):
        image, text = F.normalize(torch.randn(2, N, dim, generator=generator, dtype=torch.float64), dim=2)
        sides.append([image, text, torch.tensor([scale], dtype=torch.float64)])
    sides[0][2] = sides[0][2].log()
    return sides[0], sides[1]


def plain() -> tuple[Tensor, ...]:
    """Loss and gradients by the formula, with N × N matrices and torch's KL divergence."""
    (image, text, scale), (teacher_image, teacher_text, teacher_scale) = features()
    leaves = [tensor.requires_grad_() for tensor in (image, text, scale)]
    student = scale.exp() * image @ text.T / TEMPERATURE
    teacher = teacher_scale * teacher_image @ teacher_text.T / TEMPERATURE
    loss = sum(
        F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
        for ours, theirs in ((student, teacher), (student.T, teacher.T))
    )
    loss = loss * TEMPERATURE**2 / 2
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def tiled(sizes: tuple[int, ...], tile_side: int, locked: bool) -> list[npt.NDArray[np.float64]]:
    """Loss and this rank's gradients; run in a rank."""
    rank = 0
    if len(sizes) > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
    before, tiles._TILE_SIDE = tiles._TILE_SIDE, tile_side
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    (image, text, scale), (teacher_image, teacher_text, teacher_scale) = features()
    image, text = image[own].clone(), text[own].clone()
    leaves = [text.requires_grad_(), scale.requires_grad_()]
    if not locked:
        leaves.insert(0, image.requires_grad_())
    loss = distillation_loss(
        image,
        text,
        scale,
        teacher_image[own],
        teacher_text[own],
        teacher_scale,
        temperature=TEMPERATURE,
        num_samples_of_ranks=sizes,
    )
    tiles._TILE_SIDE = before
    gradients = torch.autograd.grad(3 * loss, leaves)  # upstream factors go through
    return [loss.detach().numpy(), *((gradient / 3).numpy() for gradient in gradients)]


def test_on_a_device_the_loss_waits_for_nothing() -> None:
    with torch.device("meta"):
        image, text = torch.rand(2, 5000, D, requires_grad=True)
        taught = torch.rand(2, 5000, E)
        scale = torch.rand(1, requires_grad=True)
    loss = distillation_loss(
        image, text, scale, *taught, torch.tensor([30.0], device="meta"),
        temperature=TEMPERATURE, num_samples_of_ranks=(5000,),
    )  # fmt: skip
    assert torch.autograd.grad(loss, scale)[0].shape == (1,)


@pytest.mark.parametrize("tile_side", [1, 4, 1024])
def test_loss_and_gradient_are_the_plain_formula_s(tile_side: int) -> None:
    for ours, theirs in zip(tiled((N,), tile_side, False), plain(), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("locked", [False, True])
def test_two_ranks_together_have_the_gradient_of_one(locked: bool) -> None:
    loss, image_grad, text_grad, scale_grad = plain()
    found = [[torch.from_numpy(a) for a in rank] for rank in run_ranks(tiled, 2, (7, 6), 4, locked)]
    for rank in found:
        torch.testing.assert_close(rank[0], loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([rank[-2] for rank in found]), text_grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sum(rank[-1] for rank in found), scale_grad, rtol=1e-9, atol=1e-12)
    if not locked:
        torch.testing.assert_close(torch.cat([rank[1] for rank in found]), image_grad, rtol=1e-9, atol=1e-12)


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    (image, text, scale), _ = features()
    leaves = [tensor.requires_grad_() for tensor in (image, text, scale)]
    loss = distillation_loss(
        *leaves, image.detach(), text.detach(), scale.exp(), temperature=2.0, num_samples_of_ranks=(N,)
    )
    assert abs(loss.item()) < 1e-12
    assert all(gradient.abs().max() < 1e-9 for gradient in torch.autograd.grad(loss, leaves))


def wider() -> ModelConfig:
    small = small_models(dropout=0.3)["small-vit"]
    text = dataclasses.replace(small.text, width=96, heads=3)
    return dataclasses.replace(small, name="custom", embed_dim=48, text=text)


def save_teacher(folder: Path, model: ModelConfig) -> str:
    torch.manual_seed(9)
    clip = build_clip(model, vocab_size=len(VOCABULARY))
    for parameter in clip.parameters():
        if parameter.ndim > 1:  # features that differ from picture to picture
            parameter.data = torch.randn(parameter.shape) * parameter[0].numel() ** -0.5
    path = str(folder / "teacher.safetensors")
    save_checkpoint(path, clip, clip.config, {})
    return path


def train_without_dropout(job: TrainJob) -> None:
    train_rank(job, dropout=0.0)


def losses(job: TrainJob) -> list[float]:
    lines = (Path(job.folder) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_two_ranks_in_micro_batches_learn_as_one_does(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path, wider())
    before = Path(teacher).read_bytes()
    distil = DistilConfig(teacher=teacher, weight=0.7, temperature=1.5)
    one = make_job(tmp_path, "one", distil=distil)
    two = make_job(tmp_path, "two", distil=distil, ranks=2, micro_batch=3)
    alone = make_job(tmp_path, "alone")
    run_ranks(train_without_dropout, 1, one)
    run_ranks(train_without_dropout, 2, two)
    run_ranks(train_without_dropout, 1, alone)
    np.testing.assert_allclose(losses(two), losses(one), atol=2e-5)
    assert losses(one)[0] > losses(alone)[0] + 1e-3
    assert Path(teacher).read_bytes() == before
    ours, others = (load_checkpoint(job.output_model).text_projection.detach() for job in (one, alone))
    assert (ours - others).abs().max() > 1e-3


def test_the_teacher_s_similarities_are_learned(tmp_path: Path) -> None:
    """On its own images and captions, the student's matrix moves towards the teacher's."""
    torch.manual_seed(0)
    config = small_models(dropout=0.0)["small-vit"]
    student = build_clip(config, vocab_size=len(VOCABULARY))
    changes = dataclasses.replace(CONFIG, distil=DistilConfig(teacher=save_teacher(tmp_path, wider())))
    teacher = load_teacher(changes, student, "stage2")
    assert teacher is not None
    image_BCHW, tokens_BL = torch.rand(8, 3, 32, 32), torch.randint(5, len(VOCABULARY), (8, 5))
    taught = teacher.features(image_BCHW, tokens_BL)
    assert not taught.image_BE.requires_grad
    assert torch.equal(taught.text_BE, teacher.features(image_BCHW, tokens_BL).text_BE)  # no dropout
    teacher.prepare("cpu", torch.bfloat16)
    rounded = teacher.features(image_BCHW, tokens_BL).text_BE
    assert rounded.dtype == torch.float32
    assert 1e-5 < (rounded - taught.text_BE).abs().max() < 0.05
    adam = torch.optim.AdamW(student.parameters(), lr=2e-3)
    found = []
    for _ in range(12):
        image_BD, text_BD = student(image_BCHW, tokens_BL)
        loss = distillation_loss(
            image_BD,
            text_BD,
            student.logit_scale,
            taught.image_BE,
            taught.text_BE,
            teacher.scale,
            temperature=1.0,
            num_samples_of_ranks=(8,),
        )
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        found.append(loss.item())
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"max_positions": 8}, "has 8 positions, but context_length = 12"),
        ({"vocab_size": 99}, f"has a vocabulary of 99, the model {len(VOCABULARY)}"),
    ],
)
def test_a_teacher_that_cannot_read_the_same_is_refused(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    own = wider()
    torch.manual_seed(0)
    text = dataclasses.replace(own.text, **{"vocab_size": len(VOCABULARY), **model})
    clip = build_clip(dataclasses.replace(own, text=text))
    path = str(tmp_path / "teacher.safetensors")
    save_checkpoint(path, clip, clip.config, {})
    student = build_clip(small_models()["small-vit"], vocab_size=len(VOCABULARY))
    config = dataclasses.replace(CONFIG, distil=DistilConfig(teacher=path))
    with pytest.raises(ConfigError, match=message):
        load_teacher(config, student, "stage2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cached_views": 2, "lock_image": True}, "distil needs images, but cached_views = 2"),
        ({"distil": DistilConfig(teacher="t", temperature=0.0)}, "distil.temperature: .* greater than 0"),
        ({"distil": DistilConfig(teacher="t", weight=0.0)}, "distil.weight: .* greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"distil": DistilConfig(teacher="t"), **changes})


def test_a_run_with_another_teacher_is_another_run(tmp_path: Path) -> None:
    """The stage lists the teacher's bytes as inputs, and a checkpoint lists how it was made."""
    shards = Manifest("shards", 1, "", "", {}, (), 0, 0, {})
    context = Context(str(tmp_path), "stage2", 0, {"shards": shards})
    teacher = tmp_path / "teacher.safetensors"
    train = dataclasses.replace(CONFIG, distil=DistilConfig(teacher=str(teacher)))
    config = TrainStageConfig(train=train, model="tiny-vit", vocabulary="vocab.txt", validate=False)
    with pytest.raises(InputError, match=r"no such file or folder; correct \[stage2.distil\] teacher"):
        plan(config, context)
    teacher.write_bytes(b"one")
    (before,) = plan(config, context)
    teacher.write_bytes(b"two")
    (after,) = plan(config, context)
    assert before.inputs["teacher"] != after.inputs["teacher"]


def test_a_run_s_file_may_ask_for_all_of_it() -> None:
    extras = {"patch_mask": 0.5, "distil.teacher": "big.pt", "negation.objects": ["圆形", "菱形"]}
    overrides = [f"stage2.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in extras.items()]
    _, config = load("demo", overrides)
    assert config.stage2 is not None
    assert config.stage2.patch_mask == 0.5
    assert config.stage2.distil == DistilConfig(teacher="big.pt")
    assert config.stage2.negation is not None
    assert config.stage2.negation.objects == ("圆形", "菱形")
    with pytest.raises(ConfigError, match=r"stage2.distil.teachr: unknown key; did you mean .*teacher"):
        load("demo", ["stage2.distil.teachr=big.pt"])
