"""The command line: what acts on runs and on weights.

`pipeline.cli.corpus` adds what acts on corpora outside a run, `eval.commands` what measures and
searches.
"""

import argparse
import sys
from collections.abc import Sequence

from pipeline.cli.corpus import add_commands as add_corpus_commands
from pipeline.cli.evaluation import add_commands as add_evaluation_commands
from pipeline.core.records import ConfigError, InputError, Stopped

# What training is planned with where nothing is said of it.
_HARDWARE = "A100"
_UTILISATION = 0.4  # share of its 16-bit peak
_TOKENS = 22  # mean length of a caption

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 the work failed, 2 wrong usage or configuration."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return stopped.exit_status
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_DONE  # the reader of our output (head, less) has seen enough
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; {_remedy(error)}", file=sys.stderr)
        return EXIT_FAILED


def _remedy(error: OSError) -> str:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space or move [run] folder, then run the same command to go on"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it readable and writable, or choose another [run] folder"
    return "mend it, then run the same command to go on"


def _plan(options: argparse.Namespace) -> int:
    from pipeline.planning.requirements import RECIPES, hardware, trainings_of_recipe, trainings_of_run
    from pipeline.planning.table import training_table

    if options.samples is not None and options.samples <= 0:
        raise ConfigError(f"--samples {options.samples}: must be above 0")
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
    from pipeline.runner import survey_what_is_there

    run, _ = load(options.run, options.set)
    needs = training_table(trainings_of_run(run, options.samples), on, tokens) if on is not None else ""
    statuses, complaints = survey_what_is_there(run)
    print(f"{options.run} → {run.folder}")
    print(plan_table(statuses))
    if needs:
        print(f"\n{needs}")
    for complaint in complaints:
        print(f"error: {complaint}", file=sys.stderr)
    return EXIT_USAGE if complaints else EXIT_DONE


def _run(options: argparse.Namespace) -> int:
    from pipeline.catalog import load, write_resolved
    from pipeline.cli.tables import closing_words
    from pipeline.runner import execute, select
    from training.stages import TrainStageConfig, check_given_files

    run, config = load(options.run, options.set)
    stages = select(run, options.stage, options.first, options.last)
    for stage in stages:  # a corpus takes days: what training after it lacks is said before it
        if isinstance(stage.config, TrainStageConfig):
            check_given_files(stage.config, stage.name)
    force = options.redo and options.stage is not None
    num_run = execute(run, stages, redo=options.redo, force=force, mend=options.mend)
    if num_run:
        write_resolved(run, config)
    print(closing_words(run, num_run, len(stages)))
    return EXIT_DONE


def _status(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.cli.tables import notes, status_table
    from pipeline.runner import survey

    run, _ = load(options.run, options.set)
    print(status_table(run, survey(run)))
    for note in notes(run):
        print(f"note: {note}")
    return EXIT_DONE


def _verify(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.runner import select, verify

    run, _ = load(options.run, options.set)
    complaints = verify(run, select(run, options.stage, options.first, options.last))
    for line in complaints:
        print(line)
    print("every output has the bytes its manifest names" if not complaints else f"{len(complaints)} differ")
    return EXIT_FAILED if complaints else EXIT_DONE


def _why(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.tools.why import explain

    run, config = load(options.run, options.set)
    lines = explain(run, config.filter_text, options.key)
    print("\n".join(lines))
    return EXIT_DONE


def _launch(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.core.config import find_recipe
    from pipeline.launch.slurm import write_scripts

    run, config = load(options.run, options.set)
    print("\n".join(write_scripts(run, config.launch, find_recipe(options.run), options.set)))
    return EXIT_DONE


def _doctor(options: argparse.Namespace) -> int:
    from pipeline.tools.doctor import examine

    return EXIT_DONE if examine(options.folder) else EXIT_FAILED


def _convert(options: argparse.Namespace) -> int:
    from training.weights.convert import convert

    lines = convert(
        options.source,
        options.out,
        to=options.to,
        vocabulary=options.vocab,
        image_size_px=options.image_size,
    )
    print("\n".join(lines))
    return EXIT_DONE


def _inspect(options: argparse.Namespace) -> int:
    from training.weights.convert import inspect

    print("\n".join(inspect(options.file)))
    return EXIT_DONE


def _add_weight_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands that take weights instead of a run."""
    vocab = "vocab.txt, a folder with one, or a model id (default: looked for)"

    summary = "weights of any known format to another one"
    convert = commands.add_parser("convert", help=summary, description=summary)
    convert.set_defaults(command=_convert)
    convert.add_argument("source", metavar="IN", help="weights: a file or a folder")
    convert.add_argument("out", metavar="OUT", help="NAME.pt, NAME.safetensors, NAME.onnx, or a folder")
    convert.add_argument(
        "--to",
        choices=("cn_clip", "hugging_face", "safetensors", "onnx"),
        help="format to write (default: by OUT's ending; a folder is for Hugging Face)",
    )
    convert.add_argument("--vocab", metavar="V", help=vocab)
    convert.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="another resolution; positions are interpolated",
    )

    summary = "what a file of weights is, which model it holds, what is missing in it"
    inspect = commands.add_parser("inspect", help=summary, description=summary)
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("file", metavar="FILE", help="weights: a file or a folder")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cnclip",
        description="Rebuild the Chinese CLIP corpus, pretrain in two stages, measure retrieval.",
        epilog="Exit status: 0 done, 1 the work failed, 2 wrong usage or configuration.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, function: object, summary: str, stages: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(command=function)
        if name != "doctor":
            command.add_argument(
                "run", metavar="RUN.toml", help="a run's file, or a shipped recipe such as demo"
            )
            command.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="override a setting, as in --set stage1.epochs=2; may be repeated",
            )
        if stages:
            command.add_argument("--stage", metavar="NAME", help="this stage alone")
            command.add_argument("--from", dest="first", metavar="NAME", help="from this stage on")
            command.add_argument("--to", dest="last", metavar="NAME", help="up to and with this stage")
        return command

    command = add("plan", _plan, "show every stage with done, stale or to do; what training needs")
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
    command = add("run", _run, "do what is missing, and nothing twice", stages=True)
    command.add_argument(
        "--redo", action="store_true", help="do stale stages again; with --stage, that stage in any case"
    )
    command.add_argument(
        "--mend",
        action="store_true",
        help="hash what is done again; do the tasks again whose files are missing or damaged",
    )
    add("status", _status, "show what each stage did: rows, drops, seconds, bytes")
    add("verify", _verify, "hash every output again and compare it with the manifests", stages=True)
    command = add("why", _why, "where a row went: kept, or dropped by which stage and why")
    command.add_argument("key", metavar="KEY-or-URL", help="a sample's key or a picture's URL")
    add("launch", _launch, "write Slurm scripts, and print command lines for torchrun and deepspeed")
    command = add(
        "doctor",
        _doctor,
        "is this machine fit: Python, disk, memory, accelerator, ranks, DNS resolver, compiler",
    )
    command.add_argument("folder", nargs="?", default=".", help="where runs will live (default: here)")
    add_corpus_commands(commands)
    add_evaluation_commands(commands)
    _add_weight_commands(commands)
    return parser
