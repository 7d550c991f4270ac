"""The command line: cnclip plan | run | status | verify | why | guard | doctor."""

import argparse
import sys
from collections.abc import Sequence

from pipeline.records import ConfigError, InputError

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 the work failed, 2 wrong usage or configuration."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
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
    from pipeline.catalog import load
    from pipeline.runner import survey
    from pipeline.tables import plan_table

    run, _ = load(options.run, options.set)
    print(f"{options.run} → {run.folder}")
    print(plan_table(survey(run)))
    return EXIT_DONE


def _run(options: argparse.Namespace) -> int:
    from pipeline.catalog import load, write_resolved
    from pipeline.runner import execute, select
    from pipeline.tables import closing_words

    run, config = load(options.run, options.set)
    stages = select(run, options.stage, options.first, options.last)
    num_run = execute(run, stages, redo=options.redo, force=options.redo and options.stage is not None)
    if num_run:
        write_resolved(run, config)
    print(closing_words(run, num_run, len(stages)))
    return EXIT_DONE


def _status(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.runner import survey
    from pipeline.tables import status_table

    run, _ = load(options.run, options.set)
    print(status_table(run, survey(run)))
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
    from pipeline.why import explain

    run, config = load(options.run, options.set)
    lines = explain(run, config.filter_text, options.key)
    print("\n".join(lines))
    return EXIT_DONE


def _guard(options: argparse.Namespace) -> int:
    from data_prep.guard import make_guard

    count = make_guard(options.evaluation_set, options.family, options.out)
    print(f"{options.out}: {count:,} pictures; name it in [corpus] guards")
    return EXIT_DONE


def _doctor(options: argparse.Namespace) -> int:
    from pipeline.doctor import examine

    return EXIT_DONE if examine(options.folder) else EXIT_FAILED


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
        if name not in ("doctor", "guard"):
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

    add("plan", _plan, "show every stage with done, stale or to do")
    command = add("run", _run, "do what is missing, and nothing twice", stages=True)
    command.add_argument(
        "--redo", action="store_true", help="do stale stages again; with --stage, that stage in any case"
    )
    add("status", _status, "show what each stage did: rows, drops, seconds, bytes")
    add("verify", _verify, "hash every output again and compare it with the manifests", stages=True)
    command = add("why", _why, "where a row went: kept, or dropped by which stage and why")
    command.add_argument("key", metavar="KEY-or-URL", help="a sample's key or a picture's URL")
    command = add("guard", _guard, "the list that keeps an evaluation set out of training")
    command.add_argument(
        "evaluation_set",
        metavar="EVALUATION-SET",
        help="NAME_imgs.tsv, a folder with it or with pictures, or a .txt with one picture id a line",
    )
    command.add_argument("--out", required=True, metavar="FILE.parquet", help="the guard to write")
    command.add_argument(
        "--family",
        choices=("coco", "flickr", "own"),
        default="own",
        help="whose picture numbers the ids are; own: ids of no source (default)",
    )
    command = add(
        "doctor", _doctor, "is this machine fit: Python, disk, memory, accelerator, ranks, compiler"
    )
    command.add_argument("folder", nargs="?", default=".", help="where runs will live (default: here)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
