"""The program that each rank of a training stage runs.

    python -m pipeline.rank JOB.json                        started by `cnclip run`
    torchrun … -m pipeline.rank RUN.toml stage1 [KEY=VALUE …]
    deepspeed … --module pipeline.rank RUN.toml stage1 [KEY=VALUE …]

The ranks find each other by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or by Slurm's variables.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from pipeline.core import store
from pipeline.core.processes import die_with_run, importing, leave, say
from pipeline.core.records import ConfigError, InputError, Stopped
from pipeline.core.terminal import one_line
from training.config.job import TrainJob


def main() -> int:
    """Train, with zero-shot recall on the run's evaluation sets from eval, which training never imports.

    Return the exit status: 143 if a signal stopped the training after a checkpoint.
    """
    die_with_run()
    os.environ.update(ranks_of_slurm(os.environ))
    if missing := [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]:
        print(
            f"error: no {missing[0]} in the environment: start ranks with torchrun, deepspeed, srun or"
            " `cnclip run`; `cnclip launch` prints the lines",
            file=sys.stderr,
        )
        return ConfigError.exit_status
    # DeepSpeed's launcher puts --local_rank before other arguments.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local")]
    try:
        job = read_job(arguments)

        with importing():
            from eval.features.evaluation_set import validator
            from training.model.tokenizer import Tokenizer
            from training.pretrain import pretrain

        validate = None
        if job.evaluations:
            validate = validator(job.evaluations, Tokenizer.load(job.vocabulary), job.config.context_length)
        pretrain(job, validate)
    except (ConfigError, InputError, Stopped) as error:
        kind = "stopped" if isinstance(error, Stopped) else "error"
        say(f"{kind}: {one_line(str(error))}", sys.stderr)
        return error.exit_status
    return 0


def read_job(arguments: Sequence[str]) -> TrainJob:
    """Return the job in a JSON file, or that of a run's stage whose parents are done."""
    path, *rest = arguments
    if path.endswith(".json"):
        return TrainJob.from_json(store.read_text(path), path)

    from pipeline.catalog import load
    from pipeline.core.run import make_context
    from training.stages import TrainStageConfig, given_weights, make_job
    from training.weights.hub.locate import is_pinned

    if not rest:
        raise ConfigError(f"{path}: no stage given; put its name after the run, such as stage1")
    run, _ = load(path, rest[1:])
    stage = run.stage(rest[0])
    if not isinstance(stage.config, TrainStageConfig):
        raise ConfigError(f"{path}: {stage.name} is not a training stage")
    context = make_context(run, stage)
    if context is None:
        raise ConfigError(f"{path}: {stage.name} waits for {', '.join(stage.parents)}; run those first")
    for text in given_weights(stage.config).values():  # otherwise many ranks would look up a name at once
        if not is_pinned(run.folder, text):
            raise ConfigError(
                f"{path}: this run has not looked up the weights {text} yet; run `cnclip launch {path}` first"
            )
    return make_job(stage.config, context)


def ranks_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torch's variables from those of srun; empty without srun, or if torch's are set."""
    if "SLURM_PROCID" not in environment or "RANK" in environment:
        return {}
    of_nodes = list[str]()  # ranks of each machine; Slurm writes 8,8,4 as 8(x2),4
    for part in environment["SLURM_TASKS_PER_NODE"].split(","):
        ranks, _, times = part.rstrip(")").partition("(x")
        of_nodes += [ranks] * int(times or 1)
    local_ranks = of_nodes[int(environment.get("SLURM_NODEID", "0"))]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_SIZE": local_ranks,
        "LOCAL_WORLD_SIZE": local_ranks,
    }


if __name__ == "__main__":
    leave(main())
