"""What a small Slurm job's script runs: the ranks of the job in argv[1], as `cnclip run` starts them."""

import os
import sys
from pathlib import Path

from pipeline.core.records import Stopped
from training.config.job import TrainJob
from training.ranks.launcher import failure, free_port, launcher_command, launcher_environment, watch


def main(path: str) -> int:
    job = TrainJob.from_json(Path(path).read_text(), path)
    port, log_path = free_port(), str(Path(job.folder) / "train.log")
    command = launcher_command("srun", "tests.helpers.rank_main", path, job.config.ranks, port)
    environment = launcher_environment(os.environ, 1, launcher="srun", port=port)
    try:
        status = watch(command, environment, log_path, lambda done, total, text="": None, print)
    except Stopped as stopped:
        print(f"stopped: {stopped}")
        return stopped.exit_status
    if status:
        print(f"error: {failure(log_path, status)}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
