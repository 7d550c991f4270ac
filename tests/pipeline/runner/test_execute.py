"""The runner on small real stages: a run does everything once and accounts for every row."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.cli.tables import closing_words
from pipeline.core import store
from pipeline.core.records import ConfigError, InputError, Receipt, too_few
from pipeline.core.run import Run, State, read_manifest, select, survey
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task
from tests.helpers.number_stages import (
    NUM_FILES,
    EvenConfig,
    execute,
    lose_rows,
    manifest_of,
    manifests,
    number_run,
    one_task,
    states,
)


def test_a_run_does_everything_once(numbers: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run = number_run(numbers, tmp_path / "run", EvenConfig(below=30, journal=str(journal)))
    assert states(run) == [State.TO_DO, State.TO_DO]
    assert survey(run)[1].why == "after source"
    assert execute(run) == 2
    assert states(run) == [State.DONE, State.DONE]
    even = manifest_of(run, "even")
    assert (even.num_in, even.num_kept, even.dropped) == (40, 15, {"large": 5, "odd": 20})
    assert [shard.path for shard in even.shards] == [f"{number:05d}.txt" for number in range(NUM_FILES)]
    assert store.read_text(store.join(run.folder, "even", "00001.txt")) == "10 12 14 16 18"
    assert even.parents == {"source": store.digest_bytes(manifest_of(run, "source").to_json().encode())}
    assert execute(run) == 0
    assert journal.read_text().split() == [f"{number:05d}" for number in range(NUM_FILES)]


def test_several_processes_give_the_same_manifests(numbers: Path, tmp_path: Path) -> None:
    one, two = number_run(numbers, tmp_path / "one"), number_run(numbers, tmp_path / "two", processes=2)
    execute(one)
    execute(two)
    assert manifests(one) == manifests(two)
    assert runner.verify(two, two.stages) == []


def test_receipts_account_for_every_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"even/00000: 10 rows in, but 7 kept \+ 2 dropped"):
        Receipt("even", "00000", "", "", (), 10, 7, {"odd": 2}, 0.0)
    run = Run(str(tmp_path / "run"), 0, "local", 1, (Stage("lossy", "", 1, None, (), one_task, lose_rows),))
    with pytest.raises(ValueError, match=r"lossy/all: 10 rows in"):
        execute(run)
    assert not store.exists(store.join(run.folder, "lossy", "receipts", "all.json"))
    assert states(run) == [State.TO_DO]


def ask_for_many(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    left = context.parents["even"].num_kept
    raise too_few(ConfigError(f"[batch] size = 100, but there are {left} numbers"), left)


def test_an_error_of_too_few_rows_names_the_funnel(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run", EvenConfig(below=20))
    batch = Stage("batch", "", 1, None, ("even",), one_task, ask_for_many)
    with pytest.raises(ConfigError) as caught:
        execute(dataclasses.replace(run, stages=(*run.stages, batch)))
    assert str(caught.value) == (
        "[batch] size = 100, but there are 10 numbers; 10 samples are left of 40: even dropped 30"
        " (odd 20, large 10)"
    )


def test_no_rows_left_names_the_rules(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run", EvenConfig(below=0))
    with pytest.raises(InputError) as caught:
        execute(run)
    message = str(caught.value)
    assert "no rows left of 40 after even" in message
    assert "odd removed 20" in message
    assert "large removed 20" in message
    assert read_manifest(run, "even") is None


def test_manifests_and_receipts_hold_no_times(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run")
    execute(run)
    assert "seconds" not in json.loads(manifests(run)[1])
    receipt = Receipt.from_json(store.read_text(store.join(run.folder, "even", "receipts", "00000.json")))
    assert receipt.seconds >= 0
    assert Receipt.from_json(receipt.to_json()) == receipt


def test_selecting_stages(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run")
    assert [stage.name for stage in select(run, None, None, "source")] == ["source"]
    assert [stage.name for stage in select(run, None, "even", None)] == ["even"]
    assert [stage.name for stage in select(run, "even", None, None)] == ["even"]
    with pytest.raises(ConfigError, match="evn: no such stage in this run; it has source, even"):
        select(run, "evn", None, None)
    with pytest.raises(ConfigError, match="comes after"):
        select(run, None, "even", "source")
    with pytest.raises(ConfigError, match="even comes after source, which is not done"):
        runner.execute(run, [run.stage("even")], redo=False)


def test_a_run_in_an_object_store(numbers: Path, tmp_path: Path) -> None:
    whole = number_run(numbers, tmp_path / "run")
    execute(whole)
    remote = Run(f"memory://{tmp_path.name}-runner", 0, "local", 1, whole.stages)
    assert execute(remote) == 2
    assert execute(remote) == 0
    assert manifests(remote) == manifests(whole)
    assert runner.verify(remote, remote.stages) == []


def test_a_run_ends_with_its_report_only_while_that_is_of_its_state(numbers: Path, tmp_path: Path) -> None:
    def named_report(below: int) -> Run:
        run = number_run(numbers, tmp_path / "run", EvenConfig(below=below))
        return dataclasses.replace(
            run, stages=(run.stages[0], dataclasses.replace(run.stages[1], name="report"))
        )

    run = named_report(1000)
    runner.execute(run, run.stages[:1], redo=False)
    assert closing_words(run, 1, 1) == "stages done: 1; `cnclip plan` shows what the run still has to do"
    runner.execute(run, run.stages, redo=False)
    store.write_text(str(tmp_path / "run" / "report" / "headline.txt"), "R@1 82.5")
    assert closing_words(run, 1, 2).startswith("R@1 82.5\n\nreport: ")
    assert closing_words(run, 0, 2).startswith("nothing to do: all 2 stages are done\n\nR@1 82.5")
    assert "82.5" not in closing_words(named_report(10), 1, 2)  # its report is of other settings
