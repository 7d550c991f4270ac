"""What the launcher starts in tests: one rank of the job whose path is the last argument."""

import os
import sys
from pathlib import Path

from pipeline.core.processes import importing, leave, say
from pipeline.core.records import ConfigError, InputError, Stopped
from pipeline.rank import ranks_of_slurm
from training.config.job import TrainJob

with importing():
    import training.pretrain  # noqa: F401  `train_rank` imports it
    from tests.helpers.train_jobs import train_rank


def main(path: str) -> int:
    os.environ.update(ranks_of_slurm(os.environ))
    try:
        train_rank(TrainJob.from_json(Path(path).read_text(), path))
    except (ConfigError, InputError, Stopped) as error:
        kind = "stopped" if isinstance(error, Stopped) else "error"
        say(f"{kind}: {error}", sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[-1]))
