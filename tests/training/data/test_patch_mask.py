import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.core.records import ConfigError
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import CONFIG, build_config, make_job, small_models, train_rank
from training.config.job import TrainJob
from training.data.patch_mask import PatchMask, make_patch_mask
from training.flops import image_forward
from training.model.clip import build_clip

KEYS = [f"{number:032x}".encode() for number in (3, 77, 2**100)]


def test_what_is_kept_depends_on_seed_epoch_and_key_alone() -> None:
    mask = PatchMask(num_patches=16, num_kept=4, seed=7)
    kept_BP = mask.draw(KEYS, [0, 0, 5])
    assert kept_BP.shape == (3, 4)
    for row, (key, epoch) in enumerate(zip(KEYS, [0, 0, 5], strict=True)):
        assert torch.equal(mask.draw([key], [epoch])[0], kept_BP[row])
        assert kept_BP[row].unique().tolist() == kept_BP[row].tolist()  # ascending, each once
    many = mask.draw([KEYS[0]] * 400, list(range(400)))
    counts = torch.bincount(many.flatten(), minlength=16)
    assert counts.min() > 60  # each patch in a quarter of 400
    assert counts.max() < 140
    assert not torch.equal(PatchMask(16, 4, seed=8).draw(KEYS, [0, 0, 5]), kept_BP)


def test_all_patches_kept_are_the_tower_and_fewer_cost_less() -> None:
    torch.manual_seed(0)
    clip = build_clip(small_models(dropout=0.0)["small-vit"]).eval()
    image_BCHW = torch.randn(3, 3, 32, 32)
    whole = clip.encode_image(image_BCHW)
    everything = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(clip.encode_image(image_BCHW, everything), whole)
    half = torch.stack([torch.randperm(16)[:8].sort().values for _ in range(3)])
    assert not torch.allclose(clip.encode_image(image_BCHW, half), whole, atol=1e-3)
    assert torch.equal(clip.encode_image(image_BCHW), whole)  # and a mask leaves nothing behind

    # The patches that are kept decide: the others may hold anything.
    other = image_BCHW.clone()
    for row, kept in enumerate(half):
        for patch in set(range(16)) - set(kept.tolist()):
            top, left = 8 * (patch // 4), 8 * (patch % 4)
            other[row, :, top : top + 8, left : left + 8] = 9.0
    torch.testing.assert_close(clip.encode_image(other, half), clip.encode_image(image_BCHW, half))

    def flops(kept: Tensor | None) -> int:
        with FlopCounterMode(display=False) as counter:
            clip.encode_image(image_BCHW, kept)
        return int(counter.get_total_flops())

    assert flops(half) < 0.62 * flops(None)  # the patches' own embedding is not saved
    for kept, share in ((None, 0.0), (half, 0.5)):
        assert 3 * image_forward(clip.config, share) == pytest.approx(flops(kept), rel=0.05)


def masks_of_forwards(job: TrainJob) -> list[tuple[bool, npt.NDArray[np.int64] | None, int]]:
    """(whether for the backward pass, patches kept, tokens in the last block) of each image forward."""
    from training.model.vision import ImageTransformer

    found: list[tuple[bool, npt.NDArray[np.int64] | None, int]] = []
    forward = ImageTransformer.forward

    def watched(tower: ImageTransformer, x: Tensor, *, kept_BP: Tensor | None = None) -> Tensor:
        counts: list[int] = []
        hook = tower.blocks[-1].register_forward_hook(lambda *call: counts.append(call[2].shape[1]))
        feature = forward(tower, x, kept_BP=kept_BP)
        hook.remove()
        kept = None if kept_BP is None else kept_BP.numpy().copy()
        found.append((torch.is_grad_enabled(), kept, counts[0]))
        return feature

    pytest.MonkeyPatch().setattr(ImageTransformer, "forward", watched)
    train_rank(job, dropout=0.0)
    return found


def losses(job: TrainJob) -> list[float]:
    lines = (Path(job.folder) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_training_masks_replays_its_masks_and_evaluates_without(tmp_path: Path) -> None:
    one = make_job(tmp_path, "one", patch_mask=0.5)
    two = make_job(tmp_path, "two", patch_mask=0.5, ranks=2, micro_batch=3, checkpoint_activations=True)
    whole = make_job(tmp_path, "whole")
    (found,) = run_ranks(masks_of_forwards, 1, one)
    masked = [kept for _, kept, _ in found if kept is not None]
    assert {count for _, kept, count in found if kept is not None} == {1 + 8}
    assert {count for _, kept, count in found if kept is None} == {1 + 16}  # validation
    assert len(masked) == 6
    assert len(found) > 6
    assert not np.array_equal(masked[0], masked[1])

    of_ranks = run_ranks(masks_of_forwards, 2, two)
    for calls in of_ranks:
        first = [kept for again, kept, _ in calls if kept is not None and not again]
        second = [kept for again, kept, _ in calls if kept is not None and again]
        assert len(first) == 6 * 3
        assert all(np.array_equal(*pair) for pair in zip(first, second, strict=True))
    np.testing.assert_allclose(losses(two), losses(one), atol=2e-5)
    run_ranks(masks_of_forwards, 1, whole)
    assert abs(losses(whole)[0] - losses(one)[0]) > 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_mask": 1.0}, "patch_mask: must be less than 1, found 1.0"),
        ({"patch_mask": -0.1}, "patch_mask: must be at least 0, found -0.1"),
        ({"patch_mask": 0.5, "cached_views": 2, "lock_image": True}, "patch_mask needs images"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(changes)


def test_a_resnet_has_no_patches() -> None:
    config = dataclasses.replace(CONFIG, patch_mask=0.5)
    with pytest.raises(ConfigError, match=r"small-rn has a ResNet, .* take a ViT"):
        make_patch_mask(config, small_models()["small-rn"], "stage2", 0)
    mask = make_patch_mask(config, small_models()["small-vit"], "stage2", 0)
    assert mask == PatchMask(16, 8, 0)
