"""The commands that act on a run: plan, run, status, verify, why, retry, diff, launch and doctor."""

import argparse
import sys
from typing import Any

from pipeline.cli.arguments import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USAGE,
    add,
    add_offline,
    add_run,
    add_stages,
    corpus_folder,
)
from pipeline.core import store
from pipeline.core.config import find_recipe
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import select, survey_what_is_there
from pipeline.core.terminal import one_line, print_lines
from pipeline.core.text_table import align

# What training is planned with unless the command line says otherwise.
_HARDWARE = "A100"
_UTILISATION = 0.4  # share of its 16-bit peak
_TOKENS = 22  # mean length of a caption


def add_commands(commands: Any) -> None:
    """Add the commands to `argparse`'s sub-parsers."""
    _add_plan(commands)
    _add_run(commands)
    command = add(
        commands, "status", _status, "show what each stage did: rows, drops, seconds, bytes", "demo"
    )
    add_run(command)
    command = add(
        commands,
        "verify",
        _verify,
        "hash every output again and compare it with the manifests",
        "demo --stage shards",
    )
    add_run(command)
    add_stages(command)
    command = add(
        commands,
        "why",
        _why,
        "show where a row went: kept, or dropped by which stage and why",
        "demo http://a.cn/1.jpg",
    )
    add_run(command)
    command.add_argument("key", metavar="KEY-or-URL", help="a sample's key or an image's URL")
    command = add(
        commands,
        "launch",
        _launch,
        "write Slurm scripts and print command lines for torchrun and deepspeed",
        "my_run.toml",
    )
    add_run(command)
    command = add(
        commands,
        "doctor",
        _doctor,
        "check the environment: Python, disk, memory, accelerator, ranks, DNS resolver, compiler",
        "/data/runs",
    )
    command.add_argument("folder", nargs="?", default=".", help="where runs will live (default: here)")
    command = add(
        commands,
        "retry",
        _retry,
        "retry failed downloads that may be transient and merge the results",
        "my_run.toml --plan",
    )
    add_run(command)
    command.add_argument("--plan", action="store_true", help="only show what would be retried")
    command = add(
        commands,
        "diff",
        _diff,
        "compare two builds of a corpus: settings, funnel, rows in and out and why",
        "runs/old runs/new --rows rows.parquet",
    )
    for name in ("A", "B"):
        command.add_argument(name.lower(), metavar=name, help="a run's folder or RUN.toml, done up to `lock`")
    command.add_argument(
        "--rows", metavar="FILE.parquet", help="also write the rows that only one of them has"
    )


def _add_plan(commands: Any) -> None:
    command = add(
        commands,
        "plan",
        _plan,
        "show every stage with done, stale or to do, and what training needs",
        "demo --hardware A100",
    )
    add_run(command)
    command.add_argument(
        "--hardware",
        metavar="NAME",
        help=f"device to plan training for, such as V100, A100-40GB or H100 (default: {_HARDWARE})",
    )
    command.add_argument(
        "--utilisation", type=float, metavar="U", help=f"share of its 16-bit peak (default: {_UTILISATION})"
    )
    command.add_argument("--memory", type=float, metavar="GIB", help="its memory (default: the data sheet's)")
    command.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="pairs to train on (default: the shards'; of pretrain 200 million); of finetune, those of the"
        " sets whose number is not known here",
    )
    command.add_argument(
        "--tokens", type=int, metavar="L", help=f"mean length of a caption (default: {_TOKENS})"
    )


def _plan(options: argparse.Namespace) -> int:
    from pipeline.planning.requirements import RECIPES, hardware, trainings_of_recipe, trainings_of_run
    from pipeline.planning.table import training_table

    if options.samples is not None and options.samples <= 0:
        raise ConfigError(f"--samples {options.samples}: must be greater than 0")
    recipe = options.run.removeprefix("training/recipes/").removesuffix(".toml")
    asked = (options.hardware, options.utilisation, options.memory, options.samples, options.tokens)
    utilisation = _UTILISATION if options.utilisation is None else options.utilisation
    tokens = _TOKENS if options.tokens is None else options.tokens
    on = None
    if recipe in RECIPES or any(value is not None for value in asked):
        on = hardware(options.hardware or _HARDWARE, utilisation, options.memory)
    if recipe in RECIPES and on is not None:
        if options.set:
            raise ConfigError(
                f"--set {options.set[0]}: {recipe} is the paper's and has no settings to override; plan a run"
                ' of your own with [stage1] recipe = "paper" and --hardware'
            )
        print(training_table(trainings_of_recipe(recipe, options.samples), on, tokens))
        return EXIT_DONE
    from pipeline.catalog import load
    from pipeline.cli.tables import plan_table
    from pipeline.planning.downloads import downloads

    run, _ = load(options.run, options.set)
    needs = training_table(trainings_of_run(run, options.samples), on, tokens) if on is not None else ""
    statuses, complaints = survey_what_is_there(run)
    print(f"{options.run} → {run.folder}")
    print(plan_table(statuses))
    print_lines(downloads(run))
    if needs:
        print(f"\n{needs}")
    for complaint in complaints:
        print(f"error: {one_line(complaint)}", file=sys.stderr)
    return EXIT_USAGE if complaints else EXIT_DONE


def _add_run(commands: Any) -> None:
    command = add(commands, "run", _run, "run all stages that are not up to date", "demo --to shards")
    add_run(command)
    add_offline(command)
    add_stages(command)
    command.add_argument(
        "--redo", action="store_true", help="redo stale stages; with --stage, redo that stage in any case"
    )
    command.add_argument(
        "--repair",
        action="store_true",
        help="hash the outputs of finished tasks; redo the tasks whose files are missing or damaged",
    )
    command.add_argument("--mend", dest="repair", action="store_true", help=argparse.SUPPRESS)


def _run(options: argparse.Namespace) -> int:
    from pipeline.catalog import load, write_resolved
    from pipeline.cli.tables import closing_words
    from pipeline.runner import execute
    from training.stages import TrainStageConfig, check_given_files

    run, config = load(options.run, options.set)
    stages = select(run, options.stage, options.first, options.last)
    for stage in stages:  # a corpus takes days: what training lacks is reported before it starts
        if isinstance(stage.config, TrainStageConfig):
            check_given_files(stage.config, stage.name)
    force = options.redo and options.stage is not None
    num_run = execute(run, stages, redo=options.redo, force=force, repair=options.repair)
    if num_run:
        write_resolved(run, config)
    print(closing_words(run, num_run, len(stages)))
    return EXIT_DONE


def _status(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.cli.tables import notes, status_table

    run, _ = load(options.run, options.set)
    statuses, complaints = survey_what_is_there(run)
    print(status_table(run, statuses))
    for note in notes(run):
        print(f"note: {one_line(note)}")
    for complaint in complaints:
        print(f"error: {one_line(complaint)}", file=sys.stderr)
    return EXIT_FAILED if complaints else EXIT_DONE


def _verify(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.runner import unseen, verify

    run, _ = load(options.run, options.set)
    stages = select(run, options.stage, options.first, options.last)
    if not store.exists(run.folder):
        raise InputError(f"{run.folder}: no such folder: {options.run} has not been run; check [run] folder")
    missing = unseen(run, stages)
    if len(missing) == len(stages):
        raise InputError(
            f"{run.folder}: nothing to verify: no stage of {', '.join(missing)} is finished; run"
            f" `cnclip run {options.run}` first"
        )
    complaints = verify(run, stages)
    print_lines(complaints)
    print(f"{len(complaints)} differ" if complaints else "all outputs match their manifests")
    if missing:
        print(
            f"not verified, since not finished: {', '.join(missing)}"
            f" ({len(missing)} of {len(stages)} stages; their outputs were not read)"
        )
    return EXIT_FAILED if complaints else EXIT_DONE


def _why(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.tools.why import explain

    run, config = load(options.run, options.set)
    print_lines(explain(run, config.filter_text, options.key))
    return EXIT_DONE


def _launch(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.launch.slurm import write_scripts

    run, config = load(options.run, options.set)
    print("\n".join(write_scripts(run, config.launch, find_recipe(options.run), options.set)))
    return EXIT_DONE


def _doctor(options: argparse.Namespace) -> int:
    from pipeline.tools.doctor import examine

    return EXIT_DONE if examine(options.folder) else EXIT_FAILED


def _retry(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.tools import retry

    run, _ = load(options.run, options.set)
    failures = retry.plan(run)
    rows = [("failure", "rows", "asked for again")]
    rows += [(item.name, f"{item.num_rows:,}", "yes" if item.is_worth_it else "no") for item in failures]
    print(align(rows, (False, True, False)))
    if options.plan:
        return EXIT_DONE
    done = retry.do(run)
    if not done.number:
        print("no failed downloads are worth retrying")
    else:
        print(f"pass {done.number}: {done.recovered:,} of {done.asked:,} rows came back")
    if done.redone:
        print(f"redone with them: {', '.join(done.redone)}; later stages are stale")
    return EXIT_DONE


def _diff(options: argparse.Namespace) -> int:
    from pipeline.tools.diff import compare

    print_lines(compare(corpus_folder(options.a), corpus_folder(options.b), options.rows))
    return EXIT_DONE
