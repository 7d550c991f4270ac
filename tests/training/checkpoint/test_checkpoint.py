import dataclasses
import errno
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.records import InputError
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import make_job, train_rank
from training.checkpoint import checkpoint
from training.checkpoint.checkpoint import Checkpoint, TrainState
from training.checkpoint.host_memory import HostMemory
from training.config.job import TrainJob

IDENTITY = {"model": "small-vit", "crop_area": (0.9, 1.0)}


def make_state(step: int) -> TrainState:
    weights = {"logit_scale": torch.tensor([step * 0.5]), "visual.bn.num_batches_tracked": torch.tensor(step)}
    moments = {"exp_avg.logit_scale": torch.ones(1), "exp_avg_sq.logit_scale": torch.full((1,), 2.0)}
    return TrainState(step, weights, moments)


def save(
    root: Path,
    *steps: int,
    keep: int = 3,
    damaged: Collection[int] = (),
    ranked: Mapping[int, list[int]] | None = None,
) -> None:
    """`ranked`: what a checkpoint may end with, best first, by its step."""

    def rank_steps(found: Checkpoint) -> list[int]:
        return (ranked or {}).get(found.step, [])

    for step in steps:
        checkpoint.save(
            str(root),
            make_state(step),
            IDENTITY,
            b"%d\n" % step,
            keep=keep,
            damaged=damaged,
            rank_steps=rank_steps,
        )


def find_newest(root: Path) -> tuple[Checkpoint, dict[int, str]]:
    found, damage = checkpoint.find_newest(str(root), IDENTITY)
    assert found is not None
    return found, damage


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in root.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 4)
    found, damage = find_newest(tmp_path / "checkpoints")
    assert (found.step, damage) == (4, {})
    assert Path(found.metrics_path).read_text() == "4\n"
    state = checkpoint.load(found)
    expected = make_state(4)
    assert (state.weights, state.moments) == (expected.weights, expected.moments)


def test_there_may_be_none(tmp_path: Path) -> None:
    assert checkpoint.find_newest(str(tmp_path / "checkpoints"), IDENTITY) == (None, {})


def test_only_the_newest_are_kept_and_left_overs_go(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    (root / ".step_000000002.partial").mkdir()
    (root / "step_000000001.removing").mkdir()
    save(root, 2, 3, 10, keep=2)
    assert sorted(path.name for path in root.iterdir()) == ["step_000000003", "step_000000010"]


@pytest.mark.parametrize(
    "file", ["weights.safetensors", "optimizer.safetensors", "metrics.jsonl", "state.json"]
)
@pytest.mark.parametrize("damage", ["cut", "missing", "unreadable"])
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path: Path, file: str, damage: str) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1, 2)
    path = root / "step_000000002" / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
        if damage == "unreadable":
            path.mkdir()
    found, damages = find_newest(root)
    assert found.step == 1
    assert list(damages) == [2]
    assert damages[2].startswith(f"{file} ")


@pytest.mark.parametrize(
    ("before", "after"), [('"num_updates": null', '"num_updates": 7777'), ("small-vit", "smalm-vit")]
)
def test_a_changed_value_in_its_state_is_damage_and_not_another_run(
    tmp_path: Path, before: str, after: str
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1, 2)
    path = root / "step_000000002" / "state.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    found, damage = find_newest(root)
    assert (found.step, damage) == (1, {2: "state.json has changed values"})


def test_damaged_later_ones_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 4, 8, 12)
    for step in (8, 12):
        (root / f"step_{step:09d}" / "state.json").unlink()
    save(root, 6, keep=1)
    assert find_newest(root)[0].step == 6
    assert steps_in(root) == [6]


def test_one_that_a_start_found_damaged_does_not_count(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 4, 8, 9)
    (root / "step_000000009" / "state.json").unlink()  # of a stop: no other start writes that step again
    save(root, 12, keep=2, damaged={9})
    assert steps_in(root) == [8, 12]
    save(root, 16, keep=2, damaged={8, 9, 12})  # they are whole by now, or gone
    assert steps_in(root) == [12, 16]


def test_whole_later_ones_stay(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 18)
    save(root, 3, 6, keep=1)
    assert steps_in(root) == [6, 18]


def test_the_best_as_of_each_that_is_kept_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    ranked = {18: [16, 12, 4], 16: [12, 4], 12: [12, 4], 20: [20, 16, 12], 21: [3, 20, 16]}
    save(root, 4, 12, 16, 18, 20, keep=2, ranked=ranked)
    assert steps_in(root) == [12, 16, 18, 20]  # 16 was saved before it was validated
    save(root, 21, keep=1, ranked=ranked)
    assert steps_in(root) == [20, 21]  # the weights of step 3 were not there


def test_what_kills_left_is_swept(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    checkpoint.sweep(str(root))
    save(root, 1)
    for name in (".step_000000002.partial", "step_000000003.removing", "step_000000001.removing"):
        (root / name).mkdir()
        (root / name / "weights.safetensors").write_bytes(b"half")
    (root / "notes").mkdir()
    checkpoint.sweep(str(root))
    assert sorted(path.name for path in root.iterdir()) == ["notes", "step_000000001"]


def test_a_start_sweeps(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", epochs=1, save_every_steps=1000, lock_image=True, cached_views=1)
    checkpoints, features = Path(job.folder) / "checkpoints", tmp_path / "shards" / "features"
    (checkpoints / "step_000000777.removing").mkdir(parents=True)
    features.mkdir()
    (features / ".a.npy.0badcafe-1-0badcafe.partial").write_bytes(b"half")
    os.utime(features / ".a.npy.0badcafe-1-0badcafe.partial", (0, 0))
    run_ranks(train_rank, 1, job)
    assert [path.name for path in checkpoints.iterdir()] == ["step_000000002"]  # of the warm-up
    assert {path.suffix for path in features.iterdir()} == {".npy"}


def held_at_saves(job: TrainJob) -> list[tuple[int, int]]:
    """How many weights and moments a rank holds when checkpoints are put together."""
    gather, held = checkpoint.gather_state, []

    def counted(engine: Any, step: int, memory: HostMemory) -> TrainState:
        state = gather(engine, step, memory)
        held.append((len(state.weights), len(state.moments)))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "gather_state", counted)
        train_rank(job)
    return held


@pytest.mark.parametrize("deepspeed", ["zero1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_only_the_rank_that_writes_holds_the_state(tmp_path: Path, deepspeed: str) -> None:
    job = make_job(tmp_path, "run", ranks=2, epochs=1, save_every_steps=2, deepspeed=deepspeed)
    writes, other = run_ranks(held_at_saves, 2, job)
    assert other == [(0, 0)]
    ((weights, moments),) = writes
    state = checkpoint.load(checkpoint.at_step(str(Path(job.folder) / "checkpoints"), 2))
    assert (len(state.weights), len(state.moments)) == (weights, moments)
    assert weights > 10
    assert moments > 10


def train_into_a_limit(job: TrainJob, limit_bytes: int) -> str:
    """The error where no file may be as large as the model that is to be written."""
    import resource

    from training import pretrain

    write = pretrain.write_model

    def limited(*arguments: Any, **more: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
        write(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "write_model", limited)
        with pytest.raises(InputError) as caught:
            train_rank(job)
    return str(caught.value)


@pytest.mark.parametrize("openai", [False, True])
def test_a_disk_that_is_full_of_the_model_is_named_and_the_run_goes_on_later(
    tmp_path: Path, openai: bool
) -> None:
    job, path = make_job(tmp_path, "run", epochs=1), tmp_path / "run" / "model.safetensors"
    if openai:
        path = tmp_path / "run" / "openai.pt"
        job = dataclasses.replace(job, openai_model=str(path))
    (said,) = run_ranks(train_into_a_limit, 1, job, 100_000)
    assert said.startswith(f"{path}: cannot write the model: ")
    assert "File too large" in said
    assert said.endswith(" GB free; make room and rerun the same command to resume")
    assert not list(Path(job.folder).glob(".*"))
    run_ranks(train_rank, 1, job)
    assert path.exists()
    assert Path(job.output_model).exists()


def test_weights_of_a_damaged_best_are_not_taken(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    path = root / "step_000000001" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"step_000000001: damaged \(weights.safetensors has changed bytes"):
        checkpoint.load_verified_weights(checkpoint.at_step(str(root), 1))


def test_one_of_another_run_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    with pytest.raises(
        InputError, match=r"step_000000001: made with model = small-vit, but this run has small-rn"
    ):
        checkpoint.find_newest(str(root), IDENTITY | {"model": "small-rn"})
    with pytest.raises(
        InputError, match=r"made with crop_area = \[0.9, 1.0\], but this run has \[0.5, 1.0\]"
    ):
        checkpoint.find_newest(str(root), IDENTITY | {"crop_area": (0.5, 1.0)})


def test_a_full_disk_leaves_the_one_before_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        InputError, match=r"step_000000002: cannot write the checkpoint: .*No space left.*make room"
    ):
        save(root, 2)
    assert [path.name for path in root.iterdir()] == ["step_000000001"]


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        save(tmp_path / run / "checkpoints", 7)
        state = json.loads((tmp_path / run / "checkpoints/step_000000007/state.json").read_text())
        digests.append(state["sha256"])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 3
