"""The command line: a module for each group of commands; a command imports what is heavy itself."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from pipeline.cli import analyses, corpus, embed, evaluate, index, report, runs, serve, weights
from pipeline.cli.arguments import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from pipeline.core.records import ConfigError, InputError, Stopped
from pipeline.core.terminal import guarded_output, one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0 done, 1 the work failed, 2 wrong usage or configuration, 130 interrupted,
    143 stopped by a signal.
    """
    with guarded_output():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (ConfigError, InputError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return error.exit_status
    except Stopped as stopped:
        print(f"stopped: {one_line(str(stopped))}", file=sys.stderr)
        return stopped.exit_status
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_DONE  # the reader of our output (head, less) has seen enough
    except MemoryError:
        print(
            "error: there is not enough memory: free some or take smaller settings, such as [run] processes,"
            " then rerun the same command to resume",
            file=sys.stderr,
        )
        return EXIT_FAILED
    except OSError as error:
        where = f"{one_line(os.fsdecode(error.filename))}: " if _has_name(error) else ""
        print(f"error: {where}{error.strerror or error}; {_remedy(error)}", file=sys.stderr)
        return EXIT_FAILED


def _has_name(error: OSError) -> bool:
    return isinstance(error.filename, str | bytes) and bool(error.filename)


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space or move [run] folder, then rerun the same command to resume"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it readable and writable, or choose another [run] folder"
    return "fix the problem and rerun the same command to resume"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cnclip",
        description="Rebuild the Chinese CLIP corpus, pretrain in two stages, measure retrieval.",
        epilog="Exit status: 0 done, 1 the work failed, 2 wrong usage or configuration.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    runs.add_commands(commands)
    report.add_commands(commands)
    corpus.add_commands(commands)
    evaluate.add_commands(commands)
    analyses.add_commands(commands)
    embed.add_commands(commands)
    index.add_commands(commands)
    serve.add_commands(commands)
    weights.add_commands(commands)
    return parser
