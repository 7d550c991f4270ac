"""`[finetune]` from weights of another resolution, and resumed: other ranks, ZeRO stages, more epochs."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.own_corpus import cnclip, cnclip_here, make_own
from training.model.clip import build_clip
from training.model.config import MODELS
from training.model.tokenizer import SPECIAL_TOKENS, Tokenizer
from training.weights.weights import save_checkpoint

FINETUNE = """
[model]
name = "tiny-vit"
vocabulary = "{root}/vocab.txt"
start_weights = "{root}/start.safetensors"
[finetune]
epochs = 4
global_batch = 8
lanes = 4
peak_learning_rate = {rate}
warmup_steps = 2
save_every_steps = 2
validate_every_steps = 0
validate_every_epoch = true
choose = "best"
[finetune.augment]
horizontal_flip = 0.0
auto_augment = "none"
"""
POSITIONS = "visual.positional_embedding"


def make_run(root: Path, *, rate: float, size_px: int) -> Path:
    """Images of one's own, and a whole model for images of another size to finetune on them."""
    make_own(root)
    data = (root / "run.toml").read_text(encoding="utf-8").partition("[model]")[0]
    (root / "run.toml").write_text(data + FINETUNE.format(root=root, rate=rate), encoding="utf-8")
    tokenizer = Tokenizer([*SPECIAL_TOKENS, *"第只橘猫趴在窗台上0123456789"])
    tokenizer.save_vocabulary(str(root / "vocab.txt"))
    torch.manual_seed(0)
    tiny = MODELS["tiny-vit"]
    large = dataclasses.replace(tiny, vision=dataclasses.replace(tiny.vision, image_size_px=size_px))
    model = build_clip(large, vocab_size=tokenizer.vocab_size)
    save_checkpoint(str(root / "start.safetensors"), model, model.config, {})
    return root


def succeed(root: Path, *words: str) -> str:
    """What `cnclip run` says on standard error."""
    done = cnclip(root, "run", "--stage", "finetune", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def losses(root: Path) -> list[float]:
    lines = (root / "run" / "finetune" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_run(tmp_path_factory.mktemp("finetune"), rate=1e-3, size_px=64)
    done = cnclip_here(root, "run", "--to", "finetune")
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.copytree(root / "run", root / "finished")
    return root


@pytest.fixture
def restored(finished: Path) -> Callable[..., Path]:
    """The run as it was once finished, or as a stop after its last checkpoint leaves it."""

    def restore(*, half_done: bool = False) -> Path:
        shutil.rmtree(finished / "run")
        shutil.copytree(finished / "finished", finished / "run")
        stage = finished / "run" / "finetune"
        if half_done:
            shutil.rmtree(stage / "receipts")
            for name in ("finished.json", "manifest.json", "model.safetensors"):
                (stage / name).unlink()
        return finished

    return restore


def test_a_task_is_finetuned_from_weights_of_another_resolution(finished: Path) -> None:
    start = load_file(finished / "start.safetensors")
    ended = load_file(finished / "run" / "finetune" / "model.safetensors")
    assert start[POSITIONS].shape == (65, 64)  # 64 px in patches of 8, and the class token
    assert ended[POSITIONS].shape == (17, 64)
    assert {name for name in start if start[name].shape != ended[name].shape} == {POSITIONS}
    # Six steps of 1e-3 and less move nothing far from where it began.
    for name in set(start) - {POSITIONS}:
        assert (ended[name] - start[name]).abs().max() < 0.01, name
    assert (ended[POSITIONS][0] - start[POSITIONS][0]).abs().max() < 0.01
    assert not torch.equal(ended["text_projection"], start["text_projection"])
    assert len(losses(finished)) == 6


def test_a_batch_larger_than_what_is_left_names_what_dropped_the_rest(finished: Path) -> None:
    words = ("--stage", "finetune", "--redo", "--set=finetune.global_batch=64", "--set=finetune.lanes=64")
    done = cnclip_here(finished, "run", *words)
    assert done.returncode == 2
    assert (
        "[finetune] global_batch = 64, but the corpus has 12 samples: lower global_batch (and lanes, if"
        " the file sets it); 12 samples are left of 13: "
    ) in done.stderr
    assert "dropped 1 as " in done.stderr
    assert (finished / "run" / "finetune" / "manifest.json").exists()  # nothing was discarded for it


@pytest.mark.slow
def test_a_stopped_stage_resumes_on_other_ranks_in_another_zero_stage(
    finished: Path, restored: Callable[..., Path]
) -> None:
    expected = losses(restored())
    root = restored(half_done=True)
    said = succeed(root, "--set=finetune.ranks=2", "--set=finetune.deepspeed=zero3")
    assert (
        "[finetune] resumes from step 4 with ranks 1 → 2, deepspeed zero1 → zero3, ZeRO stage 1 → 3" in said
    )
    assert losses(root)[:4] == expected[:4]
    np.testing.assert_allclose(losses(root), expected, atol=0.2)  # dropout draws by rank
    assert cnclip(root, "run", "--stage", "finetune").stdout.startswith("nothing to do")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranks": 3}, "ranks 1 → 3"),
        ({"ranks": 2, "deepspeed": "zero2"}, "ranks 1 → 2, deepspeed zero1 → zero2, ZeRO stage 1 → 2"),
        ({"ranks": 3, "deepspeed": "zero3"}, "ranks 1 → 3, deepspeed zero1 → zero3, ZeRO stage 1 → 3"),
        ({"ranks": 2, "deepspeed": "zero1_bf16"}, "zero1 → zero1_bf16, precision fp32 → bf16"),
        ({"micro_batch": 3, "checkpoint_activations": "true"}, "micro_batch None → 3"),
    ],
)
def test_a_stopped_stage_resumes_on_any_ranks(
    restored: Callable[..., Path], changes: dict[str, object], said: str
) -> None:
    expected = losses(restored())
    root = restored(half_done=True)
    found = succeed(root, *(f"--set=finetune.{key}={value}" for key, value in changes.items()))
    line = next(line for line in found.splitlines() if "[finetune] resumes from step 4 with" in line)
    assert said in line
    np.testing.assert_allclose(losses(root), expected, atol=0.2)


@pytest.mark.slow
def test_on_from_ranks_to_ranks(restored: Callable[..., Path]) -> None:
    """Each start changes ranks, stage and precision again, and resumes from what the one before saved."""
    root = restored(half_done=True)
    for ranks, deepspeed, step in ((3, "zero2", 4), (2, "zero3_bf16", 5), (1, "zero1", 5)):
        said = succeed(root, f"--set=finetune.ranks={ranks}", f"--set=finetune.deepspeed={deepspeed}")
        assert f"[finetune] resumes from step {step} with ranks" in said
        stage = root / "run" / "finetune"
        shutil.rmtree(stage / "receipts")
        for name in ("finished.json", "manifest.json", "model.safetensors"):
            (stage / name).unlink()
    assert len(losses(root)) == 6


@pytest.mark.slow
def test_more_epochs_give_the_bytes_of_a_training_that_had_them_at_once(
    restored: Callable[..., Path],
) -> None:
    root = restored()
    stage = root / "run" / "finetune"
    said = succeed(root, "--set=finetune.epochs=6")
    assert "finetune: to do, epochs 4 → 6: resumes from step 2, the last that both schedules share" in said
    assert "[finetune] epochs 4 → 6: resumes from step 2" in said
    assert "then follows a cosine to 0 at step 9" in said
    raised = [(stage / name).read_bytes() for name in ("model.safetensors", "metrics.jsonl")]
    shutil.rmtree(stage)
    succeed(root, "--set=finetune.epochs=6")
    assert raised == [(stage / name).read_bytes() for name in ("model.safetensors", "metrics.jsonl")]
