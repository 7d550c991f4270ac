"""One line of TOML moves the work to Ray: two nodes, one of them killed, the same bytes."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from data_prep import corpus
from data_prep.corpus import CorpusStageConfig, TablesConfig
from data_prep.sources.table import TableSource
from pipeline import runner
from pipeline.core import store
from pipeline.core.files.known_digests import digests_of_files
from pipeline.core.records import InputError
from pipeline.core.run import Run
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task
from pipeline.executors import sources

DATA_STAGES = ("corpus", "filter_text", "dedup", "download", "filter_image", "shards")
SMALL = {
    "run.processes": 1,
    "corpus.num_clean": 120,
    "corpus.num_evaluation": 12,
    "corpus.dirt": 0.08,
    "dedup.partitions": 8,
    "download.timeout_seconds": 5.0,
    "download.retries": 0,
    "download.processes": 1,
    "shards.samples_per_shard": 16,
}
LIMIT_SECONDS = 400
NUM_TASKS = 30


def command(folder: Path, *words: str) -> list[str]:
    sets = [f"--set=run.folder={folder}", *(f"--set={key}={value}" for key, value in SMALL.items())]
    return [sys.executable, "-m", "pipeline", "run", "demo", "--to", "shards", *sets, *words]


def manifests(folder: Path) -> dict[str, str]:
    return {stage: (folder / stage / "manifest.json").read_text() for stage in DATA_STAGES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without Ray."""
    folder = tmp_path_factory.mktemp("local") / "demo"
    subprocess.run(command(folder), check=True, timeout=LIMIT_SECONDS)
    return folder


@contextlib.contextmanager
def cluster_of(num_nodes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of a head that takes no work and some nodes of one core, for this process to use."""
    ray = pytest.importorskip("ray", reason="Ray is in the extra `ray`")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def three_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with cluster_of(3, monkeypatch) as cluster:
        yield cluster


@pytest.fixture
def one_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with cluster_of(1, monkeypatch) as cluster:
        yield cluster


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A Ray cluster of a head that takes no work and two nodes of one core; yields it and a node."""
    pytest.importorskip("ray", reason="Ray is in the extra `ray`")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster, nodes[1]
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["download", "filter_image", "shards"])
def test_a_node_killed_half_way_changes_no_byte(
    stage: str, finished: Path, two_nodes: tuple[Any, Any], tmp_path: Path
) -> None:
    cluster, node = two_nodes
    folder = tmp_path / "demo"
    errors = tmp_path / "errors"
    with open(errors, "wb") as log:
        process = subprocess.Popen(command(folder, '--set=run.executor="ray"'), stderr=log, env=os.environ)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not any((folder / stage / "receipts").glob("[!.]*.json")):
        assert process.poll() is None, errors.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    cluster.remove_node(node, allow_graceful=False)
    half_way = not (folder / stage / "manifest.json").exists()
    assert process.wait(LIMIT_SECONDS) == 0, errors.read_text()
    assert half_way, "the stage was over before the node was killed"
    for name in DATA_STAGES:
        assert (folder / name / "manifest.json").read_text() == manifests(finished)[name], name
    left = [path for path in folder.rglob("*") if path.name.endswith((".partial", ".scratch"))]
    assert left == []


@pytest.mark.slow
def test_source_tables_are_hashed_on_the_cluster(
    one_node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_FEW_BYTES", 0)
    folder = tmp_path / "tables"
    folder.mkdir()
    tables = [str(folder / f"{number}.parquet") for number in range(3)]
    for number, table in enumerate(tables):
        urls = pl.Series([store.digest_bytes(f"{number} {row}".encode()) for row in range(40_000)])
        pl.DataFrame({"url": urls, "caption": urls}).write_parquet(table)
        os.utime(table, ns=(10**18, 10**18))
    right = [store.digest_file(table) for table in tables]
    digest_file = store.digest_file

    def not_of_a_table(path: str) -> str:
        assert path not in tables, f"{path} is hashed by the driver"
        return digest_file(path)

    monkeypatch.setattr(store, "digest_file", not_of_a_table)
    config = CorpusStageConfig(
        corpus=TablesConfig(kind="tables", tables=(TableSource(path=str(folder), name="t"),))
    )
    run = Run(str(tmp_path / "run"), 0, "ray", 1, (corpus.stage(config),))
    assert runner.execute(run, run.stages, redo=False) == 1
    assert digests_of_files(tables) == right


@pytest.mark.slow
def test_no_cluster_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is in the extra `ray`")
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(
        command(tmp_path / "demo", "--set=run.executor=ray"), capture_output=True, text=True, env=environment,
        timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers" in done.stderr
    assert "Traceback" not in done.stderr


@dataclass(frozen=True, slots=True)
class Plan:
    """What each task does at each try; `nodes` of the cluster with a full disk are named by their place."""

    journal: str
    fails: dict[str, tuple[str, ...]]
    full: int = 0  # of the machines on which tasks ran first


def plan_tasks(config: Plan, context: Context) -> list[Task]:
    return [Task(f"{number:05d}", {"rows": str(number)}) for number in range(NUM_TASKS)]


def do_task(config: Plan, context: Context, task: Task, progress: Progress) -> Outcome:
    import ray

    node = ray.get_runtime_context().get_node_id()
    tries = len([name for name in os.listdir(config.journal) if name.startswith(f"{task.name}.")])
    Path(config.journal, f"{task.name}.{tries}.{node}").touch()
    places = sorted(Path(config.journal).glob("node.*"), key=lambda path: path.read_text())
    if not any(path.name == f"node.{node}" for path in places):
        Path(config.journal, f"node.{node}").write_text(str(time.monotonic()))
        places = sorted(Path(config.journal).glob("node.*"), key=lambda path: path.read_text())
    if f"node.{node}" in [path.name for path in places[: config.full]]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data")
    time.sleep(0.1)
    planned = config.fails.get(task.name, ())
    if tries < len(planned):
        if planned[tries] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputError(f"part {task.name}: bad row")
    store.write_text(context.path(f"{task.name}.txt"), "done")
    return Outcome({f"{task.name}.txt": 1}, 1, 1)


def run_of(folder: Path, fails: dict[str, tuple[str, ...]], full: int = 0, max_failed_tasks: int = 0) -> Run:
    (folder / "journal").mkdir(parents=True, exist_ok=True)
    plan = Plan(str(folder / "journal"), fails, full)
    stage = Stage("work", "", 1, plan, (), plan_tasks, do_task)
    return Run(str(folder / "run"), 0, "ray", 1, (stage,), max_failed_tasks)


def num_done(folder: Path) -> int:
    return len(list((folder / "run" / "work").glob("*.txt")))


def places_of(folder: Path, task: str) -> list[str]:
    return [path.name.rpartition(".")[2] for path in sorted((folder / "journal").glob(f"{task}.*"))]


@pytest.mark.slow
def test_a_task_that_fails_is_tried_elsewhere_and_named(three_nodes: Any, tmp_path: Path) -> None:
    fails = {"00001": ("kill",) * 9, "00004": ("input",) * 9, "00007": ("input", "kill"), "00009": ("kill",)}
    run = run_of(tmp_path, fails)
    with pytest.raises(InputError) as caught:
        runner.execute(run, run.stages, redo=False)
    said = str(caught.value)
    assert said.startswith("Ray lost the worker of this task, most often because memory ran out")
    assert "task 00001 of work failed 3 times" in said
    assert "and so did 1 of the other 29 (00004)" in said
    assert num_done(tmp_path) == NUM_TASKS - 2
    assert len(set(places_of(tmp_path, "00004"))) == 3
    assert len(places_of(tmp_path, "00001")) == 3


@pytest.mark.slow
def test_a_machine_with_a_full_disk_is_left_out_and_several_end_the_stage(
    three_nodes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "one", {}, full=1)
    assert runner.execute(run, run.stages, redo=False) == 1
    assert num_done(tmp_path / "one") == NUM_TASKS
    assert "gets no further task of this stage: /data: No space left on device" in capsys.readouterr().err
    run = run_of(tmp_path / "two", {}, full=2)
    with pytest.raises(InputError, match=r"/data: No space left on device \(task .*; /data: No space left"):
        runner.execute(run, run.stages, redo=False)


@pytest.mark.slow
def test_the_only_machine_beside_a_head_without_cores_gets_every_try(one_node: Any, tmp_path: Path) -> None:
    run = run_of(tmp_path / "failing", {"00004": ("input",) * 9})
    with pytest.raises(InputError, match="task 00004 of work failed 3 times"):
        runner.execute(run, run.stages, redo=False)
    assert num_done(tmp_path / "failing") == NUM_TASKS - 1
    run = run_of(tmp_path / "full", {}, full=1)
    with pytest.raises(InputError, match=r"/data: No space left on device \(task "):
        runner.execute(run, run.stages, redo=False)


@pytest.mark.slow
def test_a_cluster_that_grows_from_no_machine_takes_what_comes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A call that asks for more cores than the first machine has is made smaller."""
    from pipeline.executors import ray as executor

    monkeypatch.setattr(executor, "_PATIENCE_SECONDS", 1.0)
    said: list[str] = []
    with cluster_of(0, monkeypatch) as cluster:

        def grow(text: str, *_: Any) -> None:
            said.append(text)
            cluster.add_node(num_cpus=2)

        monkeypatch.setattr(executor, "say", grow)
        run = run_of(tmp_path / "grown", {})
        run = replace(run, stages=(replace(run.stages[0], processes=16),))
        assert runner.execute(run, run.stages, redo=False) == 1
    assert num_done(tmp_path / "grown") == NUM_TASKS
    (waits,) = said
    assert "the Ray cluster has no machine with cores yet: " in waits
    assert "calls of 16 cores wait for one" in waits
