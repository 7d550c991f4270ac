"""What goes to another process with a task does not grow with the stage."""

import concurrent.futures
import pickle
from pathlib import Path
from typing import Any

import pytest

from pipeline import runner
from pipeline.core import store
from pipeline.core.records import InputError, Manifest, Shard
from pipeline.core.run import Run, make_context, manifest_path
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task
from pipeline.core.stored_manifests import without_manifests

NUM_SHARDS = 30_000
MOST_BYTES = 2_000


def few_tasks(config: None, context: Context) -> list[Task]:
    shards = context.parents["before"].shards[:3]
    return [Task(Path(shard.path).stem, {"rows": shard.digest}, {"path": shard.path}) for shard in shards]


def look(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write how many shards the parent has, as the task sees it."""
    assert "other" not in context.parents
    store.write_text(context.path(task.name), str(len(context.parents["before"].shards)))
    return Outcome({task.name: 1}, 1, 1)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose first stage is done and has many shards."""
    shards = tuple(Shard(f"kept/{n:05d}.parquet", 7_000, 1, f"{n:064x}") for n in range(NUM_SHARDS))
    before = Stage("before", "", 1, None, (), few_tasks, look)
    after = Stage("after", "", 1, None, ("before",), few_tasks, look)
    run = Run(str(tmp_path / "run"), 0, "local", 2, (before, after))
    manifest = Manifest("before", 1, "", "", {}, shards, 1, 1, {})
    store.write_text(manifest_path(run, "before"), manifest.to_file())
    return run


def test_a_task_takes_its_own_part_along_and_not_the_list_of_shards(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    submit = concurrent.futures.ProcessPoolExecutor.submit

    def measured(pool: Any, do: Any, *arguments: Any) -> Any:
        sizes.append(len(pickle.dumps((do, *arguments))))
        return submit(pool, do, *arguments)

    monkeypatch.setattr(concurrent.futures.ProcessPoolExecutor, "submit", measured)
    monkeypatch.setattr(
        runner, "_refuse_damaged_parents", lambda *_: None
    )  # the shards themselves are not there
    assert runner.execute(run, [run.stage("after")], redo=False) == 1
    assert len(sizes) == 3
    assert max(sizes) < MOST_BYTES
    assert store.read_text(store.join(run.folder, "after", "00002")) == str(NUM_SHARDS)
    context = make_context(run, run.stage("after"))
    assert len(pickle.dumps(context)) > 1000 * MOST_BYTES


def test_a_manifest_that_changed_meanwhile_is_refused(run: Run) -> None:
    context = make_context(run, run.stage("after"))
    assert context is not None
    sent = pickle.loads(pickle.dumps(without_manifests(context)))
    assert dict(sent.parents) == dict(context.parents)
    later = without_manifests(context)
    store.write_text(manifest_path(run, "before"), "{}")
    assert later.parents["before"] == context.parents["before"]  # this process has read it
    changed = without_manifests(context)
    store.write_text(manifest_path(run, "before"), "[]")
    with pytest.raises(
        InputError, match=r"before/manifest\.json: changed while a stage was reading it; rerun"
    ):
        changed.parents["before"]
