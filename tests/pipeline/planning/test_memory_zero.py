"""Estimates of where DeepSpeed keeps a training's states, against its real buckets and gathers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.planning.memory import Precision, memory, num_parameters, zero_of
from tests.helpers.rank_processes import run_ranks
from training.config.deepspeed_file import BUCKET_VALUES, read_deepspeed_file
from training.config.train import TrainConfig
from training.model.clip import build_clip
from training.model.config import MODELS

CONFIG = TrainConfig(epochs=1, global_batch=64, lanes=8, ranks=1)
LENGTH = 24


def test_the_parts_of_memory_follow_the_zero_stages() -> None:
    model = MODELS["ViT-B-16"]
    image, text = num_parameters(model)
    config = dataclasses.replace(CONFIG, ranks=8)

    def states(file: str, precision: Precision = "float32", **changes: Any) -> float:
        changed = dataclasses.replace(config, **changes)
        zero = zero_of(read_deepspeed_file(file))
        return memory(model, changed, zero=zero, precision=precision, micro_batch=1, tokens=52).states

    everything = image + text
    assert states("zero0") == 16 * everything
    assert states("zero0", lock_image=True) == 4 * everything + 12 * text
    bucket = 4 * BUCKET_VALUES
    # one is sent while the other fills, as on GPUs
    assert states("zero1") == pytest.approx(8 * everything + 12 * everything / 8 + 2 * bucket)
    assert states("zero2") == pytest.approx(4 * everything + 16 * everything / 8 + 2 * bucket)
    assert states("zero2") - states("zero2", ranks=1) == pytest.approx(16 * everything * (1 / 8 - 1) + bucket)
    gathered = 4 * everything
    assert states("zero3") == pytest.approx(20 * everything / 8 + gathered + bucket)
    # gradients of 8 micro-batches add up in float32, besides the two bytes of each
    assert states("zero3_bf16", "bfloat16") == pytest.approx(20 * everything / 8 + (gathered + bucket) / 2)
    assert states("zero1_autocast", "autocast") == pytest.approx(states("zero1") + 2 * bucket)
    assert states("zero3_offload") == pytest.approx(gathered + bucket)


def test_what_is_offloaded_leaves_the_device() -> None:
    model, (image, text) = MODELS["ViT-H-14"], num_parameters(MODELS["ViT-H-14"])
    config = dataclasses.replace(CONFIG, ranks=8)

    def states(stage: int, **more: Any) -> float:
        zero = zero_of({"zero_optimization": {"stage": stage, **more}})
        return memory(model, config, zero=zero, precision="float32", micro_batch=1, tokens=52).states

    optimizer, weights = {"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "nvme"}}
    everything = image + text
    second_bucket = 4 * BUCKET_VALUES
    assert states(1) - states(1, **optimizer) == pytest.approx(12 * everything / 8 + second_bucket)
    assert states(2) - states(2, **optimizer) == pytest.approx(16 * everything / 8 + second_bucket)
    assert states(3) - states(3, **optimizer) == pytest.approx(16 * everything / 8)
    assert states(3) - states(3, **weights) == pytest.approx(4 * everything / 8)
    assert states(3, offload_optimizer={"device": "none"}) == states(3)
    assert (
        states(3) - states(3, stage3_max_reuse_distance=0) == 4 * 5e8
    )  # half of what is gathered by default


def gathered_share(config: TrainConfig, deepspeed: str) -> float:
    """Share of the weights that ZeRO-3 holds whole between the forward and the backward pass."""
    from training.data.loader import Batch
    from training.engine import engine as engines
    from training.engine.towers import Towers

    engines.join_ranks(config)
    model = MODELS["tiny-vit"]
    towers = Towers(build_clip(model), num_samples_of_ranks=(8,), config=config)
    engine: Any = engines.build_engine(towers, dataclasses.replace(config, deepspeed=deepspeed))
    side_px, shares_found = model.vision.image_size_px, list[float]()
    whole_loss, everything = towers.loss, sum(num_parameters(model))

    def loss(*arguments: Any, **more: Any) -> torch.Tensor:
        held = sum(parameter.data.numel() for parameter in towers.clip.parameters())
        shares_found.append(held / everything)
        return whole_loss(*arguments, **more)

    towers.loss = loss  # type: ignore[method-assign]
    batch: Any = Batch(
        step=0,
        keys=None,  # type: ignore[arg-type]
        image=torch.zeros(8, 3, side_px, side_px, dtype=torch.uint8),
        tokens_BL=torch.ones(8, LENGTH, dtype=torch.long),
        image_id_B=torch.arange(8),
        caption_id_B=torch.arange(8),
    )
    engine.train()
    for step in range(3):  # the first one learns in which order layers come
        engines.train_step(engine, dataclasses.replace(batch, step=step), 1e-4, 100.0, 0)
    return shares_found[-1]


def test_zero_3_holds_all_weights_of_a_small_model_at_the_end_of_a_forward_pass(tmp_path: Path) -> None:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    config = dataclasses.replace(CONFIG, global_batch=8)
    assert run_ranks(gathered_share, 1, config, str(tmp_path / "mine.json")) == [1.0]


def bucket_sizes(config: TrainConfig, names: tuple[str, ...]) -> list[int]:
    """DeepSpeed's buckets for gradients of tiny-vit, in values."""
    from training.engine import engine as engines
    from training.engine.towers import Towers

    engines.join_ranks(config)
    found = []
    for name in names:
        towers = Towers(build_clip(MODELS["tiny-vit"]), num_samples_of_ranks=(64,), config=config)
        engine = engines.build_engine(towers, dataclasses.replace(config, deepspeed=name))
        found.append(engine.optimizer.reduce_bucket_size)
    return found


def test_buckets_are_no_larger_than_what_is_trained(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 70000}}')
    names = ("zero1", "zero2", "zero3", str(tmp_path / "mine.json"))
    (found,) = run_ranks(bucket_sizes, 1, CONFIG, names)
    assert found == [sum(num_parameters(MODELS["tiny-vit"]))] * 3 + [70_000]
