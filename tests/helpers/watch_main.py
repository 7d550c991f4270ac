"""What `cnclip run` does with a training job, with the ranks of tests: start, watch, say how it ended."""

import os
import sys
from pathlib import Path

from pipeline.core.records import Stopped
from training.config.job import TrainJob
from training.ranks.launcher import failure, free_port, launcher_command, launcher_environment, watch


def main(path: str, entry: str) -> int:
    job = TrainJob.from_json(Path(path).read_text(), path)
    log_path = str(Path(job.folder) / "train.log")
    command = launcher_command("local", entry, path, job.config.ranks, free_port())
    try:
        status = watch(
            command, launcher_environment(os.environ, 1), log_path, lambda done, total, text="": None, print
        )
    except Stopped as stopped:
        print(f"stopped: {stopped}")
        return stopped.exit_status
    if status:
        print(f"error: {failure(log_path, status)}")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
