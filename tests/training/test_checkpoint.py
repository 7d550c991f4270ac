import errno
import json
from pathlib import Path

import pytest
import torch

from pipeline.records import InputError
from training import checkpoint
from training.checkpoint import TrainState

IDENTITY = {"model": "small-vit", "crop_area": (0.9, 1.0)}


def make_state(step: int) -> TrainState:
    weights = {"logit_scale": torch.tensor([step * 0.5]), "visual.bn.num_batches_tracked": torch.tensor(step)}
    moments = {"exp_avg.logit_scale": torch.ones(1), "exp_avg_sq.logit_scale": torch.full((1,), 2.0)}
    return TrainState(step, weights, moments)


def save(root: Path, *steps: int, keep: int = 3) -> None:
    metrics = root.parent / "metrics.jsonl"
    for step in steps:
        metrics.write_text(f"{step}\n")
        checkpoint.save(str(root), make_state(step), IDENTITY, str(metrics), keep=keep)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 4)
    found = checkpoint.find_newest(str(tmp_path / "checkpoints"), IDENTITY)
    assert found is not None
    assert found.step == 4
    assert Path(found.metrics_path).read_text() == "4\n"
    state = checkpoint.load(found)
    expected = make_state(4)
    assert (state.weights, state.moments) == (expected.weights, expected.moments)


def test_there_may_be_none(tmp_path: Path) -> None:
    assert checkpoint.find_newest(str(tmp_path / "checkpoints"), IDENTITY) is None


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
def test_a_damaged_one_gives_way_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1, 2)
    path = root / "step_000000002" / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
        if damage == "unreadable":
            path.mkdir()
    found = checkpoint.find_newest(str(root), IDENTITY)
    assert found is not None
    assert found.step == 1
    assert f"step_000000002: damaged ({file} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after"), [('"num_updates": null', '"num_updates": 7777'), ("small-vit", "smalm-vit")]
)
def test_a_changed_value_in_its_state_is_damage_and_not_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1, 2)
    path = root / "step_000000002" / "state.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    found = checkpoint.find_newest(str(root), IDENTITY)
    assert found is not None
    assert found.step == 1
    assert "state.json has other values than were written" in capsys.readouterr().out


def test_damaged_later_ones_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 4, 8, 12)
    for step in (8, 12):
        (root / f"step_{step:09d}" / "state.json").unlink()
    save(root, 6, keep=1)
    found = checkpoint.find_newest(str(root), IDENTITY)
    assert found is not None
    assert found.step == 6
    assert [path.name for path in root.iterdir()] == ["step_000000006"]


def test_weights_of_a_damaged_best_are_not_taken(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    path = root / "step_000000001" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"step_000000001: damaged \(weights.safetensors has other bytes"):
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
