"""`[launch]` of a run's TOML: the settings for a Slurm cluster."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How ranks are started, and what `cnclip launch` writes into its scripts."""

    launcher: Literal["local", "srun"] = "local"
    """How cnclip starts ranks. The Slurm scripts choose `srun`, which only works inside a Slurm job."""
    ranks_per_node: Annotated[int, Gt(0)] = 8
    """Ranks on each machine, one for each used accelerator."""
    gpus_per_node: Annotated[int, Ge(0)] = 8
    """GPUs of each machine; the scripts request one for each rank. 0: none."""
    cpus_per_rank: Annotated[int, Gt(0)] = 8
    """Cores requested for each rank."""
    cpus_prepare: Annotated[int, Gt(0)] = 16
    """Cores of the jobs before and after training."""
    gpus_measure: Annotated[int, Ge(0)] = 1
    """GPUs of the job after training, which embeds and measures; at most `gpus_per_node`."""
    memory_per_rank_gb: Annotated[int, Gt(0)] | None = None
    """Memory requested for each rank, in GB. Unset: the cluster's default."""
    memory_prepare_gb: Annotated[int, Gt(0)] | None = None
    """Memory requested for the jobs before and after training, in GB. Unset: the cluster's default."""
    time_limit_minutes: Annotated[int, Gt(0)] = 24 * 60
    """Time limit of each job, in minutes; a job that reaches it is requeued."""
    stop_seconds: Annotated[int, Gt(0)] = 300
    """Seconds before the limit at which Slurm signals training: time for a step and a checkpoint."""
    partition: str | None = None
    """Slurm partition. Unset: the cluster's default."""
    partition_prepare: str | None = None
    """Slurm partition of the jobs without a GPU, such as the data stages. Unset: `partition`."""
    account: str | None = None
    """Slurm account. Unset: yours."""
    setup: tuple[str, ...] = ()
    """Shell lines to run before the command, such as `module load cuda`."""
    options: tuple[str, ...] = ()
    """Further sbatch options, such as `--qos=low` or `--exclusive`."""

    def __post_init__(self) -> None:
        if 60 * self.time_limit_minutes <= self.stop_seconds:
            raise ValueError(
                f"stop_seconds = {self.stop_seconds} must be less than time_limit_minutes ="
                f" {self.time_limit_minutes}"
            )
