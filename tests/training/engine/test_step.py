"""What a step makes the host wait for: nothing, wherever DeepSpeed leaves the gradient to it."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.batches import WholeBatches
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import make_job, small_models
from training.config.job import TrainJob

# Operations whose answer the host has to have before it continues.
WAITS = (
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
)


class CountWaits(TorchDispatchMode):
    """Notes such operations, other than those on tensors that lie on the host wherever the model is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.is_on_host = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.name().removesuffix(".default") in WAITS and not self.is_on_host:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))

    def on_host(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **more: Any) -> Any:
            self.is_on_host = True
            try:
                return function(*arguments, **more)
            finally:
                self.is_on_host = False

        return called


def waits_of_a_step(job: TrainJob, cases: list[dict[str, Any]]) -> list[list[str]]:
    """Train a few steps in each case; what the last of them waited for."""
    from training.engine.engine import build_engine, join_ranks, train_step
    from training.engine.numbers import NumbersUnderWay
    from training.engine.towers import Towers
    from training.losses import contrastive
    from training.model import text
    from training.model.config import MODELS
    from training.model.tokenizer import Tokenizer
    from training.pretrain import build_model, make_reader, sample_order, view_config

    MODELS.update(small_models())
    join_ranks(job.config)
    rank, ranks, all_found = torch.distributed.get_rank(), job.config.ranks, []
    tokenizer = Tokenizer.load(job.vocabulary)
    for case in cases:
        changes = {key: value for key, value in case.items() if key not in ("branches", "model")}
        config = dataclasses.replace(job.config, **changes)
        one = dataclasses.replace(job, config=config, model=case.get("model", job.model))
        clip, order = build_model(one, tokenizer), sample_order(one)
        reader = make_reader(one, order, tokenizer, clip, lanes=order.rank_lanes(rank, ranks))
        whole = WholeBatches(reader, view_config(one, reader, clip))
        sizes = tuple(order.rank_num_samples(each, ranks) for each in range(ranks))
        engine = build_engine(Towers(clip, num_samples_of_ranks=sizes, config=one.config), one.config)
        engine.train()
        count = CountWaits()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "pack", count.on_host(text.pack))
            if not case.get("branches"):  # as on a device
                patch.setattr(contrastive, "host_waits_for", lambda tensor: True)
            for step in range(3):
                batch = whole.read(step)
                with count if step == 2 else contextlib.nullcontext():  # counting slows every operation
                    result = train_step(engine, batch, 1e-4, 100.0, 0)
                    numbers = NumbersUnderWay(
                        result.loss, result.is_skipped, result.temperature, step, float(rank)
                    )
                read = numbers.read()
                assert not read.is_skipped
                assert (read.signal_number, read.wait_seconds) == (step, ranks - 1)
                assert 1 < read.temperature < 100
        all_found.append(count.found)
    return all_found


def test_a_step_waits_for_nothing(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"deepspeed": "zero1", "exclude_duplicates": True},
        {"deepspeed": "zero1_autocast", "micro_batch": 3, "max_gradient_norm": 0.1},
        {"deepspeed": "zero1_bf16", "checkpoint_activations": True},
        {"deepspeed": "zero2_bf16", "micro_batch": 3, "loss": "sigmoid", "several_positives": True},
        {"deepspeed": "zero0", "model": "small-rn", "max_gradient_norm": 0.1},
        {"deepspeed": "zero1", "branches": True},
    ]
    job = make_job(tmp_path, "run", ranks=2)
    for *found, with_a_branch in run_ranks(waits_of_a_step, 2, job, cases):
        assert found == [[]] * len(found)
        assert with_a_branch == ["aten::_local_scalar_dense"]  # which shows that they are counted
