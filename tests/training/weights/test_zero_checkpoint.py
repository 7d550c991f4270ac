"""DeepSpeed's checkpoints at ZeRO 0 to 3, written by two ranks, read without DeepSpeed."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.core.records import InputError
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import save_deepspeed_checkpoints
from training.weights.formats import load_model, read_weights
from training.weights.zero_checkpoint import find_zero_checkpoint, read_zero_checkpoint

STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    run_ranks(save_deepspeed_checkpoints, 2, str(folder), STAGES)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_gives_the_weights_that_were_trained(stage: int, written: Path) -> None:
    folder, expected = written, torch.load(written / f"{stage}.pt", weights_only=True)
    model = load_model(str(folder / f"zero{stage}"))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    (tag,) = (entry for entry in (folder / f"zero{stage}").iterdir() if entry.is_dir())
    assert read_weights(str(tag)).format == "DeepSpeed checkpoint"  # the tag's folder does too


def test_a_missing_rank_and_a_missing_tag_are_named(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zero2"
    shutil.copytree(written / "zero2", folder)
    (lost,) = folder.glob("*/*rank_1_*_optim_states.pt")
    lost.unlink()
    with pytest.raises(InputError, match=r"written by 2 ranks, but 1 \*_optim_states\.pt are there"):
        load_model(str(folder))
    (folder / "latest").write_text("global_step9")
    with pytest.raises(InputError, match=r"latest: names global_step9, but .* holds no \*_model_states"):
        load_model(str(folder))
    (folder / "latest").write_text("../elsewhere")
    with pytest.raises(InputError, match="which is not a folder name"):
        find_zero_checkpoint(str(folder))


def test_code_in_its_files_does_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(
        {"module": {}, "evil": Attack()}, tmp_path / "mp_rank_00_model_states.pt", pickle_module=pickle
    )
    with pytest.raises(InputError, match=r"its pickle asks for \w+\.open"):
        read_zero_checkpoint(str(tmp_path))
    assert not (tmp_path / "ran").exists()
