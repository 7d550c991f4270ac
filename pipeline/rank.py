"""What each rank of a training stage runs: `deepspeed --module pipeline.rank JOB.json`."""

import sys

from pipeline import store
from pipeline.processes import die_with_parent
from training.config import TrainJob


def main() -> None:
    """Train; zero-shot recall on the run's evaluation sets comes from eval, which training never imports."""
    die_with_parent()
    path = sys.argv[-1]  # the launcher puts --local_rank before it
    job = TrainJob.from_json(store.read_text(path), path)

    from eval.embed import validator
    from training.model.tokenizer import Tokenizer
    from training.pretrain import pretrain

    validate = None
    if job.evaluations:
        validate = validator(job.evaluations, Tokenizer.load(job.vocabulary), job.config.context_length)
    pretrain(job, validate)


if __name__ == "__main__":
    main()
