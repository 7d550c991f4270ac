"""The command line: what acts on runs and on weights; `eval.command_line` adds what measures."""

import argparse
import sys
from collections.abc import Sequence

from eval.command_line import add_commands as add_evaluation_commands
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
    from pipeline.tables import notes, status_table

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
    from pipeline.why import explain

    run, config = load(options.run, options.set)
    lines = explain(run, config.filter_text, options.key)
    print("\n".join(lines))
    return EXIT_DONE


def _doctor(options: argparse.Namespace) -> int:
    from pipeline.doctor import examine

    return EXIT_DONE if examine(options.folder) else EXIT_FAILED


def _convert(options: argparse.Namespace) -> int:
    from training.model.convert import convert

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
    from training.model.convert import inspect

    print("\n".join(inspect(options.file)))
    return EXIT_DONE


def _embed(options: argparse.Namespace) -> int:
    from eval.embed_files import embed_files
    from training.model.encoder import load

    if options.images is None and options.texts is None:
        raise ConfigError("embed: nothing to embed; give --images, --texts or both")
    encoder = load(options.model, vocabulary=options.vocab)
    positions = encoder.model.config.text.max_positions
    if not 3 <= options.context <= positions:
        raise ConfigError(f"--context {options.context}: {options.model} takes 3 to {positions} tokens")
    done = embed_files(
        encoder, images=options.images, texts=options.texts, out=options.out, context_length=options.context
    )
    if done.num_truncated:
        print(
            f"{done.num_truncated} of {done.num_texts} texts have more than {options.context} tokens and are"
            " cut; raise --context to keep more"
        )
    print(f"{options.out}: {done.num_images} pictures, {done.num_texts} texts, {done.dim} dimensions")
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

    summary = "features of pictures and texts in clip-retrieval's layout"
    embed = commands.add_parser("embed", help=summary, description=summary)
    embed.set_defaults(command=_embed)
    embed.add_argument("model", metavar="MODEL", help="weights of any known format")
    embed.add_argument(
        "--images", metavar="FOLDER|TABLE", help="folder of pictures, or table with a column of them"
    )
    embed.add_argument("--texts", metavar="FILE", help="one text a line, or a table with a column of them")
    embed.add_argument("--out", required=True, metavar="DIR", help="folder for the features")
    embed.add_argument("--vocab", metavar="V", help=vocab)
    embed.add_argument(
        "--context", type=int, default=52, metavar="N", help="tokens a text is cut at (default: 52)"
    )


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

    add("plan", _plan, "show every stage with done, stale or to do")
    command = add("run", _run, "do what is missing, and nothing twice", stages=True)
    command.add_argument(
        "--redo", action="store_true", help="do stale stages again; with --stage, that stage in any case"
    )
    add("status", _status, "show what each stage did: rows, drops, seconds, bytes")
    add("verify", _verify, "hash every output again and compare it with the manifests", stages=True)
    command = add("why", _why, "where a row went: kept, or dropped by which stage and why")
    command.add_argument("key", metavar="KEY-or-URL", help="a sample's key or a picture's URL")
    command = add(
        "doctor", _doctor, "is this machine fit: Python, disk, memory, accelerator, ranks, compiler"
    )
    command.add_argument("folder", nargs="?", default=".", help="where runs will live (default: here)")
    add_evaluation_commands(commands)
    _add_weight_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
