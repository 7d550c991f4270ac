"""A whole run as jobs of a real Slurm: pre-empted, cut by the time limit, with an undisturbed run's bytes."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch.slurm import requeued
from tests.helpers import slurm_job
from tests.helpers.hanging_run import hanging_run
from tests.helpers.rank_processes import run_ranks
from tests.helpers.slurm_machine import output, slurm, state, wait_for, why_not
from tests.helpers.train_jobs import make_job, train_rank

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
SETTINGS = {
    "corpus.num_clean": 200,
    "corpus.num_evaluation": 24,
    "corpus.dirt": 0.1,
    "dedup.partitions": 2,
    "download.timeout_seconds": 5.0,
    "download.retries": 0,
    "shards.samples_per_shard": 64,
    **{f"{stage}.epochs": 2 for stage in ("english", "stage1")},
    "stage2.epochs": 60,
    **{f"{stage}.global_batch": 32 for stage in ("english", "stage1", "stage2")},
    **{f"{stage}.save_every_steps": 100_000 for stage in ("english", "stage1", "stage2")},
    **{f"{stage}.validate_every_steps": 50 for stage in ("stage1", "stage2")},
    "finetune.epochs": 2,
    "finetune.global_batch": 32,
    "finetune.peak_learning_rate": 2e-4,
    "finetune.warmup_steps": 2,
    "finetune.lanes": 4,
    "finetune.ranks": 2,
    "finetune.choose": "best",
    "finetune.choose_on": '["unseen"]',
    "finetune.validate_every_epoch": "true",
    "finetune.augment.horizontal_flip": 0.0,
    "finetune.augment.auto_augment": "none",
    "launch.ranks_per_node": 2,
    "launch.gpus_per_node": 0,
    "launch.cpus_per_rank": 1,
    "launch.cpus_prepare": 2,
    "launch.partition": "low",
    "launch.stop_seconds": 30,
}
JOBS = ("prepare", "english", "stage1", "stage2", "finetune", "measure")


def command(folder: Path, word: str) -> list[str]:
    sets = [f"--set=run.folder={folder}", *(f"--set={key}={value}" for key, value in SETTINGS.items())]
    return [sys.executable, "-m", "pipeline", word, "demo", *sets]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        root = Path(__file__).parents[3]
        yield environment | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def submit(cluster: dict[str, str], folder: Path) -> dict[str, str]:
    """Submit the scripts that `cnclip launch` wrote; job ids by name."""
    said = output(cluster, "bash", str(folder / "launch" / "submit.sh"))
    return dict(line.split(": job ") for line in said.splitlines())


def steps_done(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count('"samples_per_second"') if log.exists() else 0


def submit_urgent(cluster: dict[str, str]) -> str:
    """A job that takes the whole machine from the partition `low`."""
    options = ("--parsable", "--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 3")
    return output(cluster, "sbatch", *options).strip()


def wait_for_a_restart(cluster: dict[str, str], job: str, log: Path) -> None:
    """Wait until a job whose limit is two minutes is in the queue again."""
    end = time.monotonic() + 240
    while "Restarts=0" in output(cluster, "scontrol", "show", "job", job, "--oneliner"):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.5)


def script(folder: Path, job_path: Path) -> Path:
    """A batch script as `cnclip launch` writes it, around the ranks of one job."""
    command = shlex.join([sys.executable, str(Path(slurm_job.__file__)), str(job_path)])
    options = ("ntasks=2", "requeue", "open-mode=append", f"output={folder}/slurm.log")
    lines = ["#!/bin/bash", *(f"#SBATCH --{option}" for option in options), *requeued(command)]
    path = folder / "job.sbatch"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ranks_under_srun_stop_for_an_urgent_job_and_go_on_with_the_same_bytes(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    changes: dict[str, Any] = {"ranks": 2, "epochs": 40, "save_every_steps": 10_000}
    whole, stopped = (make_job(tmp_path, run, **changes) for run in ("whole", "stopped"))
    run_ranks(train_rank, 2, whole)
    job_path = Path(stopped.folder) / "job.json"
    job_path.write_text(stopped.to_json())
    job = output(cluster, "sbatch", "--parsable", str(script(tmp_path, job_path))).strip()
    end = time.monotonic() + 120
    while steps_done(Path(stopped.folder)) < 5:
        assert time.monotonic() < end, (tmp_path / "slurm.log").read_text()
        time.sleep(0.05)
    wait_for(cluster, submit_urgent(cluster), "COMPLETED", seconds=200)
    wait_for(cluster, job, "COMPLETED", "FAILED", seconds=300)
    assert "Restarts=1" in output(cluster, "scontrol", "show", "job", job, "--oneliner")
    log = (Path(stopped.folder) / "train.log").read_text()
    assert "by SIGTERM after step" in log, log
    assert "resuming from" in log
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (Path(stopped.folder) / name).read_bytes() == (Path(whole.folder) / name).read_bytes(), name


def test_pre_empted_and_requeued_gives_the_bytes_of_a_run_without_slurm(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    plain, jobs = tmp_path / "plain", tmp_path / "jobs"
    subprocess.run(command(plain, "run"), env=cluster, check=True, capture_output=True, timeout=900)
    subprocess.run(command(jobs, "launch"), env=cluster, check=True, capture_output=True, timeout=60)
    ids = submit(cluster, jobs)
    assert tuple(ids) == JOBS
    end = time.monotonic() + 900
    while steps_done(jobs / "stage2") < 60:  # the log is written every second
        assert time.monotonic() < end, (jobs / "launch" / "logs" / "stage2.log").read_text()
        assert state(cluster, ids["measure"]) == "PENDING"
        time.sleep(0.2)
    urgent = submit_urgent(cluster)
    wait_for(cluster, urgent, "COMPLETED", seconds=300)
    stopped = max((jobs / "stage2" / "checkpoints").iterdir())  # next to that of the warm-up's end
    assert (
        ", a checkpoint is written; rerun the same command to resume"
        in (jobs / "launch" / "logs" / "stage2.log").read_text()
    )
    wait_for(cluster, ids["measure"], "COMPLETED", seconds=900)
    assert "Restarts=1" in output(cluster, "scontrol", "show", "job", ids["stage2"], "--oneliner")
    assert f"resuming from {stopped}" in (jobs / "stage2" / "train.log").read_text()
    for stage in ("english", "stage1", "stage2", "finetune"):
        for name in ("model.safetensors", "metrics.jsonl"):
            assert (jobs / stage / name).read_bytes() == (plain / stage / name).read_bytes(), (stage, name)
    report = (jobs / "report" / "report.json").read_bytes()
    assert report == (plain / "report" / "report.json").read_bytes()
    assert set(json.loads(report)["evaluations"]) == {"unseen", "unseen/stage1", "unseen/stage2"}


def test_a_job_that_reaches_its_time_limit_goes_on_in_the_queue(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    job = make_job(tmp_path, "run", ranks=2, epochs=10**6, save_every_steps=10**9, validate_every_steps=10**9)
    job_path = Path(job.folder) / "job.json"
    job_path.write_text(job.to_json())
    # Slurm looks once in a while: the signal may come up to a minute early.
    limited = ["--time=2", "--signal=TERM@60", str(script(tmp_path, job_path))]
    number = output(cluster, "sbatch", "--parsable", *limited).strip()
    wait_for_a_restart(cluster, number, tmp_path / "slurm.log")
    output(cluster, "scancel", number)
    assert "by SIGTERM after step" in (Path(job.folder) / "train.log").read_text()
    # Nothing but the warm-up's end and the signal asked for one.
    warm, saved = sorted((Path(job.folder) / "checkpoints").iterdir())
    assert warm.name == f"step_{job.config.warmup_steps:09d}"
    assert json.loads((saved / "state.json").read_text())["step"] > 0


def test_data_that_reach_their_time_limit_go_on_in_the_queue(tmp_path: Path, cluster: dict[str, str]) -> None:
    with hanging_run(tmp_path) as (path, is_asked):
        limit = ("--set=launch.time_limit_minutes=2", "--set=launch.stop_seconds=60")
        write = [sys.executable, "-m", "pipeline", "launch", path, *limit]
        subprocess.run(write, env=cluster, check=True, capture_output=True, timeout=60)
        scripts = tmp_path / "run" / "launch"
        job = output(cluster, "sbatch", "--parsable", str(scripts / "prepare.sbatch")).strip()
        wait_for_a_restart(cluster, job, scripts / "logs" / "prepare.log")
        output(cluster, "scancel", job)
        assert is_asked()  # the download was under way
    assert (tmp_path / "run" / "dedup" / "manifest.json").exists()
    assert "DUE TO TIME LIMIT" not in (scripts / "logs" / "prepare.log").read_text()
