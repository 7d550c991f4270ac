"""`[launch]` of a run's TOML: what a Slurm cluster needs to know."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How ranks are started, and what `cnclip launch` writes into its scripts."""

    launcher: Literal["local", "srun"] = "local"  # the scripts say srun; alone it needs a Slurm job around it
    ranks_per_node: int = 8  # accelerators of a machine that are used, one a rank
    gpus_per_node: int = 8  # that a machine has; one a rank is asked of Slurm; 0 on a machine without
    cpus_per_rank: int = 8  # cores asked of Slurm for each rank
    cpus_prepare: int = 16  # cores of the jobs before and after training
    time_limit_minutes: int = 24 * 60  # of each job; one that reaches it goes on in the queue
    stop_seconds: int = 300  # before the limit: time for a step and a checkpoint
    partition: str | None = None
    account: str | None = None
    setup: tuple[str, ...] = ()  # shell lines before the command, such as "module load cuda"
    options: tuple[str, ...] = ()  # more for sbatch, such as "--qos=low" or "--exclusive"

    def __post_init__(self) -> None:
        for name in ("ranks_per_node", "cpus_per_rank", "cpus_prepare", "time_limit_minutes", "stop_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")
        if self.gpus_per_node < 0:
            raise ValueError(f"gpus_per_node = {self.gpus_per_node}: must not be negative (0: none)")
        if 60 * self.time_limit_minutes <= self.stop_seconds:
            raise ValueError(
                f"stop_seconds = {self.stop_seconds} leaves nothing of time_limit_minutes ="
                f" {self.time_limit_minutes}"
            )
