"""Writes Slurm scripts: one job for each training stage, each of which waits for the previous one.

Before the time limit Slurm signals the ranks of a training job, and the script of any other job; it also
signals ranks on pre-emption. Ranks then write a checkpoint, other stages keep their finished tasks, all exit
with status 143, and the script requeues its job. A job that is killed without a signal resumes from its last
checkpoint or task when Slurm restarts it.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core import store
from pipeline.core.records import ConfigError, Stopped
from pipeline.core.run import Run
from pipeline.core.stage import Stage
from pipeline.launch.config import LaunchConfig
from pipeline.planning.downloads import obtain_weights
from training.config.train import TrainConfig
from training.stages import TrainStageConfig

_BEFORE, _AFTER = "prepare", "measure"  # jobs before and after training
_LOGS = "logs"
_PORT = 29_500  # torchrun's default


@dataclass(frozen=True, slots=True)
class Job:
    """One Slurm job, which runs some stages of a run in order."""

    name: str
    stages: tuple[str, ...]
    train: TrainConfig | None  # for a training stage, which has ranks

    def nodes(self, launch: LaunchConfig) -> int:
        return 1 if self.train is None else -(-self.train.ranks // launch.ranks_per_node)

    def gpus(self, launch: LaunchConfig) -> int:
        """Return the number of GPUs that the job needs on each machine."""
        if self.train is not None:
            return self.ranks_a_node(launch) if launch.gpus_per_node else 0
        return min(launch.gpus_measure, launch.gpus_per_node) if self.name == _AFTER else 0

    def ranks_a_node(self, launch: LaunchConfig) -> int:
        return 1 if self.train is None else min(self.train.ranks, launch.ranks_per_node)


def plan_jobs(run: Run) -> list[Job]:
    """Return the stages before training as one job, each training stage as one, and the later ones as one."""
    jobs: list[Job] = []
    for stage in run.stages:
        train = _training(stage)
        if train is not None:
            jobs.append(Job(stage.name, (stage.name,), train))
        elif jobs and jobs[-1].train is None:
            jobs[-1] = Job(jobs[-1].name, (*jobs[-1].stages, stage.name), None)
        else:
            jobs.append(Job(_AFTER if jobs else _BEFORE, (stage.name,), None))
    return jobs


def write_scripts(run: Run, launch: LaunchConfig, run_path: str, overrides: Sequence[str]) -> list[str]:
    """Write `<run>/launch/*.sbatch` and `submit.sh`, and return lines that explain how to use them.

    This downloads weights that are given by name.

    Raises:
        ConfigError: if the ranks do not fill whole machines or lack a GPU each, or the run is not on a file
            system.
    """
    if not store.is_local(run.folder):
        raise ConfigError(f"{run.folder}: scripts need a folder on a file system that all machines see")
    jobs = plan_jobs(run)
    for job in jobs:
        _check_ranks(job, launch)
    obtain_weights(run, run.stages)  # here, because compute nodes often have no network
    folder = os.path.join(os.path.abspath(run.folder), "launch")
    arguments = [os.path.abspath(run_path), *(part for item in overrides for part in ("--set", item))]
    for job in jobs:
        store.write_text(os.path.join(folder, f"{job.name}.sbatch"), script(job, launch, folder, arguments))
    os.makedirs(os.path.join(folder, _LOGS), exist_ok=True)  # Slurm does not make the folder for its output
    submit = os.path.join(folder, "submit.sh")
    store.write_text(submit, submission(jobs, folder))
    lines = [
        f"{len(jobs)} jobs written to {folder}: {', '.join(job.name for job in jobs)}; their logs: {_LOGS}/"
    ]
    lines += ["submit them, each waiting for the one before:", f"  bash {shlex.quote(submit)}"]
    for job in jobs:
        if job.train is not None:
            lines += [
                "",
                f"{job.name} without Slurm, instead of its job:",
                *command_lines(job, launch, arguments),
            ]
    return lines


def script(job: Job, launch: LaunchConfig, folder: str, arguments: Sequence[str]) -> str:
    """Return the sbatch script of one job; `arguments` are those of `cnclip run`, the run's path first."""
    options = [
        f"--job-name={os.path.basename(os.path.dirname(folder))}-{job.name}",
        f"--nodes={job.nodes(launch)}",
        f"--time={_clock(launch.time_limit_minutes)}",
        "--requeue",
        "--open-mode=append",
        f"--output={folder}/{_LOGS}/{job.name}.log",
    ]
    if job.train is not None:
        ranks = job.ranks_a_node(launch)
        options += [
            f"--ntasks-per-node={ranks}",
            f"--cpus-per-task={launch.cpus_per_rank}",
            f"--signal=TERM@{launch.stop_seconds}",
        ]
        memory_gb = launch.memory_per_rank_gb and ranks * launch.memory_per_rank_gb
    else:
        # B: the script itself, because it starts no srun whose tasks Slurm could signal.
        options += ["--ntasks=1", f"--cpus-per-task={launch.cpus_prepare}"]
        options.append(f"--signal=B:TERM@{launch.stop_seconds}")
        memory_gb = launch.memory_prepare_gb
    if gpus := job.gpus(launch):
        options.append(f"--gpus-per-node={gpus}")
    if memory_gb is not None:
        options.append(f"--mem={memory_gb}G")
    is_plain = job.train is None and not gpus
    partition = launch.partition_prepare if is_plain and launch.partition_prepare else launch.partition
    for key, value in (("partition", partition), ("account", launch.account)):
        if value is not None:
            options.append(f"--{key}={value}")
    options += launch.options
    chosen = ["--stage", job.name] if job.train else ["--from", job.stages[0], "--to", job.stages[-1]]
    srun = ["--set", "launch.launcher=srun"] if job.train else []
    command = [sys.executable, "-m", "cnclip", "run", *arguments, *chosen, *srun]
    cpus = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"] if job.train else []
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "",
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        *requeued(shlex.join(command), [*launch.setup, *cpus]),
        "",
    ]
    return "\n".join(lines)


def requeued(command: str, setup: Sequence[str] = ()) -> list[str]:
    """Return script lines that run a command and requeue the job if the command was stopped.

    Bash handles signals while it waits, but not while a command runs in the foreground. After an interrupted
    `wait` the command continues and has its own status. A signal during the `setup` lines, or before `$run`
    is set, is passed on as soon as the command runs.
    The lines also work if the setup contains `set -eu`.
    """
    return [
        "run= early=",
        "trap 'again=yes; kill -TERM $run 2> /dev/null || early=yes' TERM",
        *setup,
        f"{command} &",
        "run=$!",
        '[ -z "$early" ] || kill -TERM $run 2> /dev/null || :',
        "again=yes",
        "while [ $again = yes ]; do",
        "    again=no",
        "    wait $run && status=0 || status=$?",
        "done",
        "trap '' TERM",
        f"if [ $status -eq {Stopped.exit_status} ]; then",
        "    # What is done is kept: this job resumes when its turn comes again.",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $status",
    ]


def submission(jobs: Sequence[Job], folder: str) -> str:
    """Return a shell script that submits all jobs, each after the success of the one before."""
    lines = ["#!/bin/bash", "set -euo pipefail", f"cd {shlex.quote(folder)}"]
    before = ""
    for job in jobs:
        after = f"--dependency=afterok:${before} --kill-on-invalid-dep=yes " if before else ""
        lines.append(f"{job.name}=$(sbatch --parsable {after}{shlex.quote(job.name)}.sbatch)")
        lines.append(f'echo "{job.name}: job ${job.name}"')
        before = job.name
    return "\n".join(lines) + "\n"


def command_lines(job: Job, launch: LaunchConfig, arguments: Sequence[str]) -> list[str]:
    """Return lines that run the same training with torchrun or DeepSpeed, and one to publish its receipt."""
    assert job.train is not None
    nodes, ranks = job.nodes(launch), job.ranks_a_node(launch)
    path, *overrides = arguments
    values = overrides[1::2]
    rank = shlex.join(["pipeline.rank", path, job.name, *values])
    rendezvous = (
        f"--rdzv-backend=c10d --rdzv-endpoint=FIRST_MACHINE:{_PORT} " if nodes > 1 else "--standalone "
    )
    hosts = f"--hostfile HOSTFILE --num_nodes {nodes} " if nodes > 1 else ""
    where = f" (on each of the {nodes} machines)" if nodes > 1 else ""
    return [
        f"  torchrun --nnodes={nodes} --nproc-per-node={ranks} {rendezvous}-m {rank}{where}",
        f"  deepspeed {hosts}--num_accelerators {ranks} --module {rank}",
        f"  then: {shlex.join(['cnclip', 'run', *arguments, '--stage', job.name])}",
    ]


def _check_ranks(job: Job, launch: LaunchConfig) -> None:
    if job.train is None:
        return
    ranks = job.ranks_a_node(launch)
    if 0 < launch.gpus_per_node < ranks:
        raise ConfigError(
            f"[launch] gpus_per_node = {launch.gpus_per_node}, but [{job.name}] has {ranks} ranks on a"
            f" machine, each of which needs a GPU: set ranks_per_node = {launch.gpus_per_node}, or"
            " gpus_per_node = 0 for machines without GPUs"
        )
    if left := job.train.ranks % ranks:
        raise ConfigError(
            f"[{job.name}] ranks = {job.train.ranks}, but [launch] ranks_per_node = {launch.ranks_per_node}"
            f" leaves {left} over: set ranks = {job.train.ranks - left} or"
            f" {job.train.ranks - left + launch.ranks_per_node}"
        )


def _training(stage: Stage) -> TrainConfig | None:
    return stage.config.train if isinstance(stage.config, TrainStageConfig) else None


def _clock(minutes: int) -> str:
    """Return minutes as Slurm's days-hours:minutes:seconds."""
    days, rest = divmod(minutes, 24 * 60)
    return f"{days}-{rest // 60:02d}:{rest % 60:02d}:00"
