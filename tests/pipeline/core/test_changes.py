"""What a change of settings means for work that is there, on the run that an earlier release finished."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline import runner
from pipeline.catalog import load
from pipeline.core import store
from pipeline.core.changes import started_path, write_started
from pipeline.core.run import Run, State, make_context, manifest_path, survey_stage

RECIPE = "old_run/run.toml"
ARCHIVE = Path(__file__).parents[1] / "data" / "finished_run.tar.xz"


def with_settings(stage: str, *overrides: str) -> Run:
    """The run, whose stage was begun by this release: its settings are noted."""
    run, _ = load(RECIPE, overrides)
    context = make_context(run, run.stage(stage))
    assert context is not None
    item = run.stage(stage)
    write_started(context, item, item.plan(item.config, context))
    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    with_settings("stage2")
    return tmp_path / "old_run" / "run" / "stage2"


def half_done(folder: Path, *steps: int) -> None:
    """A stage that was stopped: no manifest, no receipt, checkpoints of these steps."""
    for path in (folder / "manifest.json", *(folder / "receipts").iterdir()):
        path.unlink()
    for step in steps:
        (folder / "checkpoints" / f"step_{step:09d}").mkdir(parents=True)


def state_of(*overrides: str, stage: str = "stage2") -> tuple[State, str]:
    run, _ = load(RECIPE, overrides)
    status = survey_stage(run, run.stage(stage))
    return status.state, status.why


HOW = ["stage2.ranks=2", 'stage2.deepspeed="zero3_bf16"']
UNTIL_DONE = ["stage2.validate_every_steps=3", 'stage2.choose="best"', "stage2.patience=2"]
OTHER_WORK = [
    ("stage2.peak_learning_rate=1e-4", "peak_learning_rate 1e-30 → 0.0001"),
    ("stage2.global_batch=8", "global_batch 16 → 8"),
    ("stage2.lanes=4", "lanes 2 → 4"),
    ("stage2.augment.horizontal_flip=0.25", "horizontal_flip 0.5 → 0.25"),
    ("run.seed=3", "seed 0 → 3"),
]


def test_ranks_zero_stage_and_precision_are_no_other_work_done_or_not(folder: Path) -> None:
    changes = "deepspeed zero1 → zero3_bf16, ranks 1 → 2"
    assert state_of(*HOW) == (State.DONE, f"with {changes}: the same work")
    assert state_of("launch.launcher=srun", "stage2.micro_batch=3") == (State.DONE, "")
    half_done(folder)
    assert state_of(*HOW) == (State.TO_DO, f"continues with {changes}")
    assert state_of("stage2.checkpoint_activations=true") == (State.TO_DO, "")


def test_a_done_stage_is_kept_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = load(RECIPE, HOW)
    assert runner.execute(run, [run.stage("stage2")], redo=False) == 0
    assert "stage2: done, with deepspeed zero1 → zero3_bf16, ranks 1 → 2" in capsys.readouterr().err


@pytest.mark.parametrize("override", UNTIL_DONE)
def test_what_decides_how_a_stage_ends_may_change_until_it_has_ended(folder: Path, override: str) -> None:
    state, why = state_of(override)
    assert (state, why.startswith("its configuration changed: ")) == (State.STALE, True)
    half_done(folder)
    state, why = state_of(override)
    assert (state, why.startswith("continues with ")) == (State.TO_DO, True)


@pytest.mark.parametrize(("override", "change"), OTHER_WORK)
def test_another_training_is_stale_done_or_not(folder: Path, override: str, change: str) -> None:
    assert state_of(override) == (State.STALE, f"its configuration changed: {change}")
    half_done(folder)
    assert state_of(override, *HOW) == (State.STALE, f"its configuration changed: {change}")


def test_epochs_change_only_from_a_checkpoint_of_the_warm_up(folder: Path) -> None:
    state, why = state_of("stage2.epochs=2")
    assert state is State.STALE  # it is done, and its checkpoints are gone
    assert "epochs 1 → 2 (the cosine over all epochs shapes what follows the warm-up" in why
    with_settings("stage2", "stage2.warmup_steps=2")
    (folder / "manifest.json").write_text(json.dumps(_remade(folder)))
    (folder / "checkpoints" / "step_000000003").mkdir(parents=True)
    (folder / "checkpoints" / "step_000000004").mkdir(parents=True)
    warm = "stage2.warmup_steps=2"
    assert state_of(warm) == (State.DONE, "")
    state, why = state_of(warm, "stage2.epochs=2")
    assert (state, "epochs 1 → 2: resumes from step 3, the last" in why) == (State.TO_DO, True)
    with_settings("stage2", warm, "stage2.epochs=3")
    (folder / "manifest.json").write_text(json.dumps(_remade(folder)))
    assert state_of(warm, "stage2.epochs=2")[0] is State.STALE  # a finished model is not given up for less
    half_done(folder)
    assert state_of(warm, "stage2.epochs=2")[0] is State.TO_DO


def test_a_stage_that_has_no_checkpoint_yet_starts_with_other_epochs(folder: Path) -> None:
    half_done(folder)
    for epochs in (2, 3):
        state, why = state_of(f"stage2.epochs={epochs}")
        assert state is State.TO_DO
        assert f"epochs 1 → {epochs} (starts over, since there is no checkpoint yet)" in why
    half_done_at = folder / "checkpoints" / "step_000000004"
    half_done_at.mkdir(parents=True)
    assert state_of("stage2.epochs=2")[0] is State.STALE  # beyond the warm-up: the cosine is another one


def _remade(folder: Path) -> dict[str, Any]:
    """The manifest as this release would have written it for what was started."""
    started = json.loads((folder / "started.json").read_text())
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest | {key: started[key] for key in ("config_digest", "inputs_digest")}


def test_a_deepspeed_file_of_ones_own_may_change_too(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 1}}')
    setting = f'stage2.deepspeed="{own}"'
    with_settings("stage2", setting)
    (folder / "manifest.json").write_text(json.dumps(_remade(folder)))
    assert state_of(setting) == (State.DONE, "")
    own.write_text('{"zero_optimization": {"stage": 2}}')
    assert state_of(setting) == (State.DONE, "with another deepspeed file: the same work")
    half_done(folder)
    assert state_of(setting) == (State.TO_DO, "continues with another deepspeed file")


def forget_settings(folder: Path) -> None:
    """As an earlier release left it."""
    fields = json.loads((folder / "started.json").read_text())
    kept = {key: fields[key] for key in ("config_digest", "inputs_digest")}
    (folder / "started.json").write_text(json.dumps(kept))


def test_work_of_an_earlier_release_is_judged_by_the_job_that_it_left(folder: Path) -> None:
    forget_settings(folder)
    assert (folder / "job.json").exists()
    assert state_of() == (State.DONE, "")
    assert state_of("stage2.ranks=2") == (State.DONE, "with ranks 1 → 2: the same work")
    assert state_of("run.seed=5") == (State.STALE, "its configuration changed: seed 0 → 5")
    half_done(folder)
    assert state_of(*HOW)[0] is State.TO_DO
    assert state_of(OTHER_WORK[0][0]) == (State.STALE, f"its configuration changed: {OTHER_WORK[0][1]}")


@pytest.mark.parametrize("job", [None, "{", "[]", '{"stage": "stage2"}', "another"])
def test_without_settings_and_job_the_digest_decides(folder: Path, job: str | None) -> None:
    forget_settings(folder)
    path = folder / "job.json"
    if job == "another":  # of other settings than the digest
        path.write_text(path.read_text().replace('"lanes": 2', '"lanes": 4'))
    elif job is None:
        path.unlink()
    else:
        path.write_text(job)
    assert state_of() == (State.DONE, "")
    assert state_of("run.seed=5") == (State.DONE, "")
    assert state_of("stage2.ranks=2") == (State.STALE, "its configuration changed")


def test_a_changed_input_is_stale_whatever_else_changed(folder: Path) -> None:
    half_done(folder)
    model = folder.parent / "stage1" / "manifest.json"
    model.write_text(model.read_text().replace('"digest": "', '"digest": "0', 1))
    assert state_of() == (State.STALE, "its inputs changed")
    assert state_of(HOW[0]) == (State.STALE, "its inputs changed")


def test_what_was_begun_with_other_settings_than_a_manifest_says_nothing_of_it(folder: Path) -> None:
    run = with_settings("stage2", "stage2.ranks=2")
    context = make_context(run, run.stage("stage2"))
    assert context is not None
    assert store.exists(started_path(context))
    assert store.exists(manifest_path(run, "stage2"))
    (folder / "job.json").unlink()  # which would tell
    assert state_of("stage2.ranks=2") == (State.STALE, "its configuration changed")
    assert state_of() == (State.DONE, "")
