"""Products in float8: for whom, of which layers, how near, and without a trace in the files."""

import dataclasses
import functools
import importlib.util
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from pipeline.core.records import ConfigError
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import CONFIG, build_config, make_job, small_models, train_rank
from training.config.job import TrainJob
from training.config.train import check_fits
from training.engine import float8
from training.engine.float8 import check_device, multiply_in_float8
from training.losses.contrastive import contrastive_loss
from training.model import compiled as layers
from training.model.clip import CLIP, build_clip
from training.weights.weights import load_checkpoint

ASKED = dataclasses.replace(CONFIG, fp8=True)
NUM_SAMPLES = 24

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: make test-float8"
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deepspeed": "zero1"}, r"\[stage2\] fp8 = true, but deepspeed = 'zero1' computes in fp32, and"),
        ({"deepspeed": "zero1_fp16"}, "computes in fp16, and float8 products belong between bf16 layers"),
        ({"deepspeed": "zero3_bf16"}, r"\[stage2\] fp8 = true, but zero3_bf16 is ZeRO 3: it takes weights"),
    ],
)
def test_a_deepspeed_file_that_does_not_suit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_fits(build_config({"fp8": True, **changes}), small_models()["small-vit"], "stage2")


def test_layers_have_to_be_multiples_of_16_wide() -> None:
    model = small_models()["small-vit"]
    odd = dataclasses.replace(model, vision=dataclasses.replace(model.vision, feed_forward=200))
    config = build_config({"fp8": True, "deepspeed": "zero1_bf16"})
    with pytest.raises(ConfigError, match=r"image tower of small-vit has layers of width 200, .* of 16;"):
        check_fits(config, odd, "stage2")
    check_fits(dataclasses.replace(config, fp8=False), odd, "stage2")
    check_fits(dataclasses.replace(config, lock_image=True), odd, "stage1")
    check_fits(config, model, "stage2")
    narrow = dataclasses.replace(model, text=dataclasses.replace(model.text, width=72))
    with pytest.raises(ConfigError, match="text tower of small-vit has layers of width 72"):
        check_fits(config, narrow, "stage2")


def test_a_machine_that_cannot_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(CONFIG, "stage2")
    with pytest.raises(ConfigError, match=r"\[stage2\] fp8 = true: needs an NVIDIA GPU, and .* on its cpu"):
        check_device(ASKED, "stage2")
    monkeypatch.setattr(float8, "get_accelerator", lambda: mock.Mock(device_name=lambda: "cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"of compute capability 8\.9 or newer .* NVIDIA A100 has 8\.0, or"):
        check_device(ASKED, "stage2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with (
        mock.patch.dict("sys.modules", {"torchao": None, "torchao.float8": None}),
        pytest.raises(
            ConfigError, match=r"needs torchao .*: pip install 'cnclip-pretraining\[fp8\]', or set"
        ),
    ):
        check_device(ASKED, "stage2")


def small_clip(name: str = "small-vit") -> CLIP:
    torch.manual_seed(0)
    return build_clip(small_models(dropout=0.0)[name], vocab_size=64)


@needs_torchao
@pytest.mark.parametrize(("name", "locked"), [("small-vit", False), ("small-vit", True), ("small-rn", False)])
def test_these_products_and_no_others_are_in_float8(name: str, locked: bool) -> None:
    clip = small_clip(name)
    if locked:
        clip.lock_image_tower()
    before, parameters = clip.state_dict(), dict(clip.named_parameters())
    found = multiply_in_float8(clip)
    expected = {
        f"bert.encoder.layer.{layer}.{product}"
        for layer in range(2)
        for product in (
            *(f"attention.self.{side}" for side in ("query", "key", "value")),
            "intermediate.dense",
            "output.dense",
        )
    }
    if name == "small-vit" and not locked:
        expected |= {
            f"visual.blocks.{b}.{product}" for b in range(2) for product in ("attn.qkv", "mlp.fc1", "mlp.fc2")
        }
    assert set(found) == expected
    assert {n for n, m in clip.named_modules() if type(m).__name__ == "Float8Linear"} == expected
    assert all(parameters[n] is parameter for n, parameter in clip.named_parameters())
    after = clip.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)


def loss_and_gradients(
    clip: CLIP, dtype: torch.dtype, *, compiled: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and all gradients, of captions of 5 and 9 tokens."""
    clip.to(dtype).zero_grad()
    generator = torch.Generator().manual_seed(1)
    image_BCHW = torch.randn(NUM_SAMPLES, 3, 32, 32, generator=generator).to(dtype)
    tokens_BL = torch.randint(1, 60, (NUM_SAMPLES, 9), generator=generator)
    tokens_BL[::3, 5:] = 0
    loss = contrastive_loss(
        clip.encode_image(image_BCHW, compiled=compiled),
        clip.encode_text(tokens_BL, compiled=compiled),
        clip.logit_scale.float(),
        num_samples_of_ranks=(NUM_SAMPLES,),
    )
    loss.backward()
    named = clip.named_parameters()
    return loss.item(), {name: p.grad.float() for name, p in named if p.grad is not None}


def apart(found: dict[str, Tensor], exact: dict[str, Tensor], layers_of: list[str]) -> list[float]:
    """Return the relative distances of the gradients of layers' weights, without those of keys and queries.

    The latter are small differences: attention is nearly even at the start.
    """
    names = [f"{name}.weight" for name in layers_of if not name.endswith((".query", ".key"))]
    return [float((found[name] - exact[name]).norm() / exact[name].norm()) for name in names]


@needs_torchao
def test_loss_and_gradients_are_near_those_of_float32() -> None:
    """float8 keeps 3 bits of an input's mantissa and 2 of a gradient's; each sum has dozens of them."""
    exact, gradients = loss_and_gradients(small_clip(), torch.float32)
    _, in_bf16 = loss_and_gradients(small_clip(), torch.bfloat16)
    clip = small_clip()
    names = multiply_in_float8(clip)
    found, in_float8 = loss_and_gradients(clip, torch.bfloat16)
    assert found == pytest.approx(exact, abs=0.02)
    distances = apart(in_float8, gradients, names)
    assert max(distances) < 0.25
    assert statistics.fmean(distances) > 2 * statistics.fmean(apart(in_bf16, gradients, names))
    clip.float().load_state_dict(small_clip().state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found, in_autocast = loss_and_gradients(clip, torch.float32)
    assert found == pytest.approx(exact, abs=0.02)
    assert max(apart(in_autocast, gradients, names)) < 0.25


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torch trace and differentiate as it does, but generate no code, which takes long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    layers.compiled.cache_clear()
    torch._dynamo.reset()
    yield
    layers.compiled.cache_clear()
    torch._dynamo.reset()


@needs_torchao
@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_compiled_layers_multiply_in_float8_too() -> None:
    clip = small_clip()
    names = multiply_in_float8(clip)
    loss, gradients = loss_and_gradients(clip, torch.bfloat16)
    again, compiled = loss_and_gradients(clip, torch.bfloat16, compiled=True)
    assert again == pytest.approx(loss, abs=0.02)
    assert max(apart(compiled, gradients, names)) < 0.25


def train_without_a_gpu(job: TrainJob) -> None:
    with mock.patch("training.pretrain.check_device"):  # a CPU only computes the same numbers
        train_rank(job)


@needs_torchao
@pytest.mark.slow
def test_files_hold_nothing_of_float8_and_a_run_resumes_without_it(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"sizes": (16, 8), "global_batch": 8, "save_every_steps": 2}
    job = make_job(tmp_path, "float8", fp8=True, deepspeed="zero1_bf16", **changes)
    run_ranks(train_without_a_gpu, 1, job)
    trained = load_checkpoint(job.output_model).state_dict()
    assert trained.keys() == build_clip(load_checkpoint(job.output_model).config).state_dict().keys()
    Path(job.output_model).unlink()
    plain = dataclasses.replace(job, config=dataclasses.replace(job.config, fp8=False))
    run_ranks(train_rank, 1, plain)
    lines = [json.loads(line) for line in (Path(job.folder) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    resumed = load_checkpoint(job.output_model).state_dict()
    assert any(not torch.equal(resumed[name], trained[name]) for name in trained)
