"""One line of TOML moves the work to Ray: two nodes, one of them killed, the same bytes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
