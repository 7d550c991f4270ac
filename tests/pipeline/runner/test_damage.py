"""Missing and altered files are found, named and repaired."""

import dataclasses
import os
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.catalog import load
from pipeline.core import store
from pipeline.core.records import InputError
from pipeline.core.run import State, manifest_path, survey
from pipeline.last_start import load_as_started, write_started
from tests.helpers.number_stages import EvenConfig, execute, manifest_of, manifests, number_run


def test_a_file_that_is_gone_leaves_the_manifest(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run")
    execute(run)
    (numbers / "00003.txt").unlink()
    execute(run, redo=True)
    assert [shard.path for shard in manifest_of(run, "even").shards] == [
        "00000.txt",
        "00001.txt",
        "00002.txt",
    ]
    assert store.list_files(store.join(run.folder, "even", "receipts")) == [
        "00000.json", "00001.json", "00002.json",
    ]  # fmt: skip


def test_a_task_whose_output_was_lost_is_done_again(numbers: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run = number_run(numbers, tmp_path / "run", EvenConfig(journal=str(journal)))
    execute(run)
    before = manifests(run)
    os.remove(manifest_path(run, "even"))
    os.remove(tmp_path / "run" / "even" / "00001.txt")
    (tmp_path / "run" / "even" / "receipts" / "00003.json").write_text("{")  # damaged: counts for nothing
    journal.unlink()
    assert survey(run)[1].tasks_done == 2
    assert execute(run) == 1
    assert sorted(journal.read_text().split()) == ["00001", "00003"]
    assert manifests(run) == before


def test_verify_finds_a_flipped_byte_and_a_missing_file(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run")
    execute(run)
    assert runner.verify(run, run.stages) == []
    flipped, gone = (tmp_path / "run" / "even" / f"0000{number}.txt" for number in (1, 2))
    data = bytearray(flipped.read_bytes())
    data[0] ^= 1
    flipped.write_bytes(data)
    gone.unlink()
    complaints = runner.verify(run, run.stages)
    assert len(complaints) == 2
    assert complaints[0].startswith(f"{flipped}: bytes differ")
    assert complaints[1].startswith(f"{gone}: missing")
    assert all("--stage even --repair" in line for line in complaints)
    assert runner.execute(run, [run.stage("even")], redo=False, repair=True) == 1  # the remedy heals
    assert runner.verify(run, run.stages) == []


def test_repair_redoes_only_damaged_tasks(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run", EvenConfig(journal=str(tmp_path / "journal")))
    execute(run)
    before = store.read_text(manifest_path(run, "even"))
    (tmp_path / "journal").write_text("")
    assert runner.execute(run, run.stages, redo=False, repair=True) == 0  # all is whole
    flipped, cut, gone = (tmp_path / "run" / "even" / f"0000{number}.txt" for number in range(3))
    flipped.write_bytes(bytes(reversed(flipped.read_bytes())))  # as long as before: only its bytes tell
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    (tmp_path / "run" / "even" / "receipts" / "00003.json").write_text("{")
    assert [status.state for status in survey(run)] == [State.DONE, State.DAMAGED]
    with pytest.raises(
        InputError,
        match=r"even/00001\.txt: \d+ bytes, not \d+ bytes, and 1 more; repair it: .* even --repair",
    ):
        runner.execute(run, run.stages, redo=False)
    assert runner.execute(run, run.stages, redo=False, repair=True) == 1  # later stages stay
    assert (tmp_path / "journal").read_text().split() == ["00000", "00001", "00002", "00003"]
    (tmp_path / "journal").write_text("")
    cut.unlink()
    assert runner.execute(run, run.stages, redo=False, repair=True) == 1
    assert (tmp_path / "journal").read_text().split() == ["00001"]
    assert store.read_text(manifest_path(run, "even")) == before


@pytest.mark.parametrize("stage", ["source", "even"])
def test_repair_folds_a_damaged_manifest_anew(numbers: Path, tmp_path: Path, stage: str) -> None:
    run = number_run(numbers, tmp_path / "run", EvenConfig(journal=str(tmp_path / "journal")))
    execute(run)
    before = manifests(run)
    (tmp_path / "journal").write_text("")
    path = Path(manifest_path(run, stage))
    for damage in (b"", b"[" * 100_000, path.read_bytes().replace(b"10", b"11"), b'{"stage": "even"}'):
        path.write_bytes(damage)
        (complaint,) = runner.verify(run, [run.stage(stage)])
        assert f"repair it: cnclip run RUN.toml --stage {stage} --repair" in complaint
        assert runner.execute(run, run.stages, redo=False, repair=True) == 1
        assert manifests(run) == before
    assert (tmp_path / "journal").read_text() == ""  # no task was done again


def test_a_changed_fact_in_a_receipt_is_damage(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run", EvenConfig(journal=str(tmp_path / "journal")))
    execute(run)
    before = manifests(run)
    (tmp_path / "journal").write_text("")
    path = tmp_path / "run" / "even" / "receipts" / "00002.json"
    path.write_text(path.read_text().replace('"num_samples": 5', '"num_samples": 6'))
    assert runner.execute(run, run.stages, redo=False, repair=True) == 1
    assert (tmp_path / "journal").read_text().split() == ["00002"]
    assert manifests(run) == before


def test_a_stage_whose_parent_lost_a_file_does_not_run(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run")
    runner.execute(run, run.stages[:1], redo=False)
    table = tmp_path / "run" / "source" / "numbers" / "00001.txt"
    table.write_text("1")
    with pytest.raises(
        InputError, match=r"00001\.txt: 1 bytes, not 29 bytes; even needs source; repair it: .* source"
    ):
        runner.execute(run, run.stages[1:], redo=False)
    assert runner.execute(run, run.stages, redo=False, repair=True) == 2


def test_bytes_that_no_reader_takes_are_blamed_on_the_file(
    numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = number_run(numbers, tmp_path / "run")
    runner.execute(run, run.stages[:1], redo=False)
    read, real = [], store.digest_file
    monkeypatch.setattr(store, "digest_file", lambda path: (read.append(path), real(path))[1])
    table = tmp_path / "run" / "source" / "numbers" / "00001.txt"
    table.write_text("x" * table.stat().st_size)  # of the same size: only its reader notices
    with pytest.raises(InputError, match=r"00001\.txt: not the bytes that were written; even needs source"):
        runner.execute(run, run.stages[1:], redo=False)
    assert "even: unexpected ValueError, so its inputs are being checked\n" in capsys.readouterr().err
    assert [Path(path).name for path in read if "/source/" in path] == [
        "00000.txt",
        "00001.txt",
    ]  # no further


@pytest.mark.parametrize("damage", ["nothing", "manifest", "folder"])
def test_an_unexpected_error_is_not_hidden_by_what_cannot_be_checked(
    numbers: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = number_run(numbers, tmp_path / "run")
    runner.execute(run, run.stages[:1], redo=False)

    def fail(*_: object) -> None:
        if damage == "manifest":
            Path(manifest_path(run, "source")).write_text("{")
        elif damage == "folder":
            Path(manifest_path(run, "source")).unlink()
            Path(manifest_path(run, "source")).mkdir()
        raise ZeroDivisionError("the real one")

    monkeypatch.setattr(runner, "_run_stage", lambda *_, **__: fail())
    with pytest.raises(ZeroDivisionError, match="the real one"):
        runner.execute(run, run.stages[1:], redo=False)


def test_damaged_outputs_of_a_stage_without_a_file_have_a_remedy_of_their_own(
    numbers: Path, tmp_path: Path
) -> None:
    run = number_run(numbers, tmp_path / "run")
    stages = tuple(dataclasses.replace(stage, repair="make it again") for stage in run.stages)
    run = dataclasses.replace(run, stages=stages)
    execute(run)
    (tmp_path / "run" / "even" / "00001.txt").write_text("")
    with pytest.raises(InputError, match=r"00001\.txt: 0 bytes, not \d+ bytes; make it again$"):
        runner.execute(run, run.stages, redo=False)
    Path(manifest_path(run, "even")).write_text("{")
    with pytest.raises(InputError, match=r"damaged manifest, which receipts can replace; make it again$"):
        survey(run)


def test_a_damaged_manifest_is_named(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run")
    execute(run)
    Path(manifest_path(run, "source")).write_text('{"stage": "source"}')
    with pytest.raises(InputError, match=r"source/manifest\.json: damaged manifest"):
        survey(run)


def test_the_remedy_names_the_run_as_it_was_given(tmp_path: Path) -> None:
    given, _ = load("demo", (f"run.folder={tmp_path}",))
    assert given.remedy("shards") == "repair it: cnclip run demo --stage shards --repair"
    write_started(*load("demo", (f"run.folder={tmp_path}/my run",)))
    found, _ = load_as_started(f"{tmp_path}/my run")
    assert found.remedy("shards") == f"repair it: cnclip run '{tmp_path}/my run' --stage shards --repair"
