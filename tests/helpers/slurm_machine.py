"""A real Slurm on this machine for the length of a test: one controller, one node, two partitions.

`low` gives way to `high`, with time to write a checkpoint, and its jobs go back into the queue.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=30
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=low Nodes={host} Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE
PartitionName=high Nodes={host} PriorityTier=10 MaxTime=INFINITE
"""


def why_not() -> str:
    """Return why no Slurm can be started here; empty if one can."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)} (Debian: slurm-wlm, munge)"
    return "" if os.getuid() == 0 else "slurmd starts jobs for others: it needs root"


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start Slurm; gives the environment in which sbatch and its like find it."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(
            host=socket.gethostname(),
            folder=folder,
            controller_port=_free_port(),
            node_port=_free_port(),
        )
    )
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munge += [f"--key-file={folder}/munge.key", f"--pid-file={folder}/munge.pid"]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    processes = []
    try:
        for command in (munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-c"]):
            with open(folder / f"{command[0]}.out", "wb") as out:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
                )
            time.sleep(1)
        _wait_for_the_node(environment)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False, capture_output=True)
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def output(environment: dict[str, str], *command: str) -> str:
    """Return what one of Slurm's commands prints."""
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def state(environment: dict[str, str], job: str) -> str:
    """Return a job's state, such as PENDING, RUNNING or COMPLETED."""
    found = output(environment, "scontrol", "show", "job", job, "--oneliner")
    return found.split("JobState=")[1].split()[0]


def wait_for(environment: dict[str, str], job: str, *states: str, seconds: float) -> str:
    """Wait until a job is in one of the states; fail if that takes longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := state(environment, job)) in states:
            return found
        time.sleep(0.5)
    raise AssertionError(output(environment, "scontrol", "show", "job", job))


def _wait_for_the_node(environment: dict[str, str]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True
        )
        if "idle" in found.stdout:
            return
        time.sleep(0.5)
    raise AssertionError("the node does not come up")


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
