"""Changed settings and inputs make work stale, and only that work is redone."""

import os
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.core import store
from pipeline.core.records import ConfigError
from pipeline.core.run import State, manifest_path, survey
from tests.helpers.number_stages import (
    NUM_FILES,
    EvenConfig,
    execute,
    manifest_of,
    manifests,
    number_run,
    states,
)


def test_a_changed_setting_is_stale_and_never_silently_redone(numbers: Path, tmp_path: Path) -> None:
    execute(number_run(numbers, tmp_path / "run"))
    changed = number_run(numbers, tmp_path / "run", EvenConfig(below=20))
    assert states(changed) == [State.DONE, State.STALE]
    assert survey(changed)[1].why == "its configuration changed: below 1000 → 20"
    before = manifests(changed)
    with pytest.raises(
        ConfigError, match=r"even is stale: its configuration changed: below 1000 → 20; run with --redo"
    ):
        execute(changed)
    assert manifests(changed) == before
    assert states(number_run(numbers, tmp_path / "run")) == [
        State.DONE,
        State.DONE,
    ]  # changed back
    assert execute(changed, redo=True) == 1
    assert manifest_of(changed, "even").num_kept == 10
    assert states(changed) == [State.DONE, State.DONE]


def test_settings_that_change_no_bytes_are_not_stale(numbers: Path, tmp_path: Path) -> None:
    execute(number_run(numbers, tmp_path / "run"))
    run = number_run(numbers, tmp_path / "run", EvenConfig(journal="elsewhere"), processes=2)
    assert states(run) == [State.DONE, State.DONE]


def test_a_changed_input_redoes_its_own_tasks_alone(numbers: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run = number_run(numbers, tmp_path / "run", EvenConfig(journal=str(journal)))
    execute(run)
    (numbers / "00002.txt").write_text("2 4 6")
    assert states(run) == [State.STALE, State.DONE]  # even still matches the source stage's old manifest
    with pytest.raises(ConfigError, match=r"source is stale: its inputs changed"):
        execute(run)
    journal.unlink()
    assert execute(run, redo=True) == 2
    assert journal.read_text().split() == ["00002"]
    assert store.read_text(store.join(run.folder, "even", "00002.txt")) == "2 4 6"
    fresh = number_run(numbers, tmp_path / "fresh")
    execute(fresh)
    # Apart from where the tables lie, a redone run is the run that never was another.
    assert manifest_of(run, "even") == manifest_of(fresh, "even")


def test_redo_of_one_finished_stage(numbers: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run = number_run(numbers, tmp_path / "run", EvenConfig(journal=str(journal)))
    execute(run)
    before = manifests(run)
    journal.unlink()
    assert runner.execute(run, [run.stage("even")], redo=True, force=True) == 1
    assert len(journal.read_text().split()) == NUM_FILES
    assert manifests(run) == before


def test_a_stage_behind_a_link_is_redone_there(numbers: Path, tmp_path: Path) -> None:
    run, other = number_run(numbers, tmp_path / "run"), tmp_path / "other_disk"
    execute(run)
    (tmp_path / "run" / "even").rename(other)
    (tmp_path / "run" / "even").symlink_to(other)
    for below in (20, 30):
        assert execute(number_run(numbers, tmp_path / "run", EvenConfig(below=below)), redo=True) == 1
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "even", "source"]
        assert (tmp_path / "run" / "even").is_symlink()
        assert (other / "manifest.json").exists()
    before = {path.name for path in other.iterdir()}
    other.rename(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match=r"a broken link to .*other_disk; mount or make"):
        execute(number_run(numbers, tmp_path / "run", EvenConfig(below=40)), redo=True)
    assert {path.name for path in (tmp_path / "unmounted").iterdir()} == before


def test_half_done_work_of_another_setting_is_stale(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run")
    execute(run)
    os.remove(manifest_path(run, "even"))
    changed = number_run(numbers, tmp_path / "run", EvenConfig(below=20))
    assert states(changed) == [State.DONE, State.STALE]
    with pytest.raises(ConfigError, match="even is stale"):
        execute(changed)
