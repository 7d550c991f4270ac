"""What a command's model is: a run's last stage as the run was resolved, or weights."""

from pathlib import Path

import pytest

from eval.features.encoder import find_checkpoint
from pipeline import cli as command_line
from pipeline.core.records import ConfigError


def write_trained(folder: Path, resolved: str) -> None:
    (folder / "finetune").mkdir(parents=True)
    (folder / "finetune" / "model.safetensors").write_bytes(b"weights")
    (folder / "run.resolved.toml").write_text(resolved)


def test_settings_of_a_base_and_of_what_was_resolved(tmp_path: Path) -> None:
    """`recipe = "icr"` gives 128 tokens, which only the resolved file shows."""
    run = tmp_path / "run"
    (tmp_path / "base.toml").write_text('[model]\nname = "RN50"\nvocabulary = "base.txt"\n')
    (tmp_path / "mine.toml").write_text(
        f'base = "{tmp_path}/base.toml"\n[run]\nfolder = "{run}"\n[finetune]\nrecipe = "icr"\n'
    )
    write_trained(run, '[model]\nvocabulary = "resolved.txt"\n[finetune]\ncontext_length = 128\n')
    target = str(tmp_path / "mine.toml")
    found = find_checkpoint(target, None, None)
    assert (found.vocabulary, found.context_length, found.is_finetuned) == ("resolved.txt", 128, True)
    found = find_checkpoint(target, None, None, ["finetune.context_length=77"])
    assert (found.context_length, found.run_folder) == (77, str(run))
    (run / "run.resolved.toml").unlink()
    assert find_checkpoint(target, None, None).vocabulary == "base.txt"


def test_set_chooses_another_folder(tmp_path: Path) -> None:
    write_trained(tmp_path / "other", "[model]\n[finetune]\ncontext_length = 64\n")
    found = find_checkpoint("demo", None, None, [f"run.folder={tmp_path}/other"])
    assert (found.run_folder, found.context_length) == (str(tmp_path / "other"), 64)
    assert find_checkpoint("weights.pt", None, None).path == "weights.pt"
    with pytest.raises(ConfigError, match=r"--set a.b=1: weights.pt is not a run's file"):
        find_checkpoint("weights.pt", None, None, ["a.b=1"])


@pytest.mark.parametrize(
    "words", [["serve"], ["eval", "--out", "x"], ["embed", "--out", "x", "--texts", "y"]]
)
def test_every_command_that_takes_a_run_takes_set(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = words
    assert command_line.main([command, "demo", "--set", f"run.folder={tmp_path}", *rest]) == 1
    assert f"{tmp_path}: holds no trained stage" in capsys.readouterr().err
