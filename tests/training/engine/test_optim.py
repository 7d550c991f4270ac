import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from tests.helpers.train_jobs import CONFIG, small_models
from training.engine.optim import build_optimizer, learning_rate, parameter_groups
from training.model.clip import CLIP, build_clip
from training.model.config import MODELS

SCHEDULE = dataclasses.replace(CONFIG, peak_learning_rate=2.0, warmup_steps=10)


def test_learning_rate_warms_up_then_follows_a_cosine_to_zero() -> None:
    assert learning_rate(0, 110, SCHEDULE) == pytest.approx(0.2)
    assert learning_rate(9, 110, SCHEDULE) == pytest.approx(2.0)
    assert learning_rate(10, 110, SCHEDULE) == pytest.approx(2.0)
    assert learning_rate(60, 110, SCHEDULE) == pytest.approx(1.0)
    assert learning_rate(85, 110, SCHEDULE) == pytest.approx(1 + math.cos(0.75 * math.pi))
    assert 0 < learning_rate(109, 110, SCHEDULE) < 1e-3


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    config = dataclasses.replace(SCHEDULE, warmup_steps=0)
    assert learning_rate(0, 100, config) == 2.0


def test_a_run_shorter_than_its_warm_up_never_reaches_the_peak() -> None:
    assert learning_rate(4, 5, SCHEDULE) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["small-vit", "small-rn"])
def test_gains_and_shifts_do_not_decay(name: str) -> None:
    clip = build_clip(small_models()[name], vocab_size=30)
    decayed, kept = (group["params"] for group in parameter_groups(clip, 0.1))
    assert isinstance(decayed, list)
    assert isinstance(kept, list)
    names = {id(parameter): name for name, parameter in clip.named_parameters()}
    decayed_names, kept_names = ({names[id(parameter)] for parameter in group} for group in (decayed, kept))
    assert decayed_names | kept_names == set(names.values())
    assert not decayed_names & kept_names
    assert {"text_projection", "bert.embeddings.word_embeddings.weight"} <= decayed_names
    assert {"logit_scale", "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"} <= kept_names
    norms = [
        f"{prefix}.{parameter}"
        for prefix, module in clip.named_modules()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)
        for parameter, _ in module.named_parameters(recurse=False)
    ]
    assert len(norms) > 10
    assert set(norms) <= kept_names


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_laid_end_to_end_every_parameter_starts_at_a_multiple_of_16_bytes(name: str, locked: bool) -> None:
    with torch.device("meta"):  # no memory
        clip = CLIP(MODELS[name])
    if locked:
        clip.lock_image_tower()
    for group in parameter_groups(clip, 0.1):
        sizes = [parameter.numel() for parameter in group["params"]]  # type: ignore[attr-defined]
        starts = [2 * start for start in itertools.accumulate(sizes, initial=0)][:-1]  # bfloat16
        assert [start % 16 for start in starts] == [0] * len(sizes)


def test_what_is_frozen_is_in_no_group() -> None:
    clip = build_clip(small_models()["small-rn"], vocab_size=30)
    clip.lock_image_tower()
    optimizer = build_optimizer(clip, CONFIG)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {
        id(parameter) for name, parameter in clip.named_parameters() if not name.startswith("visual.")
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [CONFIG.weight_decay, 0.0]
