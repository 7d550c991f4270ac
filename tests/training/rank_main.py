"""What the launcher starts in tests: one rank of the job whose path is the last argument."""

import os
import sys
from pathlib import Path

from train_jobs import train_rank

from pipeline.rank import ranks_of_slurm
from pipeline.records import ConfigError, InputError, Stopped
from training.config import TrainJob

if __name__ == "__main__":
    os.environ.update(ranks_of_slurm(os.environ))
    try:
        train_rank(TrainJob.from_json(Path(sys.argv[-1]).read_text(), sys.argv[-1]))
    except (ConfigError, InputError, Stopped) as error:
        kind = "stopped" if isinstance(error, Stopped) else "error"
        print(f"{kind}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_status)  # as pipeline.rank does
