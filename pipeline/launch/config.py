"""`[launch]` of a run's TOML: what a Slurm cluster needs to know."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How ranks are started, and what `cnclip launch` writes into its scripts."""

    launcher: Literal["local", "srun"] = (
        "local"  # the scripts say srun; by itself it needs a Slurm job around it
    )
    ranks_per_node: Annotated[int, Gt(0)] = 8  # accelerators of a machine that are used, one a rank
    gpus_per_node: Annotated[int, Ge(0)] = 8  # that a machine has; one a rank is asked of Slurm; 0: none
    cpus_per_rank: Annotated[int, Gt(0)] = 8  # cores asked of Slurm for each rank
    cpus_prepare: Annotated[int, Gt(0)] = 16  # cores of the jobs before and after training
    time_limit_minutes: Annotated[int, Gt(0)] = 24 * 60  # of each job; one that reaches it is requeued
    stop_seconds: Annotated[int, Gt(0)] = 300  # before the limit: time for a step and a checkpoint
    partition: str | None = None
    account: str | None = None
    setup: tuple[str, ...] = ()  # shell lines before the command, such as "module load cuda"
    options: tuple[str, ...] = ()  # more for sbatch, such as "--qos=low" or "--exclusive"

    def __post_init__(self) -> None:
        if 60 * self.time_limit_minutes <= self.stop_seconds:
            raise ValueError(
                f"stop_seconds = {self.stop_seconds} leaves nothing of time_limit_minutes ="
                f" {self.time_limit_minutes}"
            )
