"""The command line: a module for each group of commands; heavy imports are inside the commands."""

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from pipeline.cli import (
    analyses,
    corpus,
    embed,
    evaluate,
    index,
    index_rows,
    init,
    law,
    plan,
    push,
    report,
    runs,
    serve,
    status,
    weights,
)  # fmt: skip
from pipeline.cli.app import Commands, application
from pipeline.cli.errors import usage_line
from pipeline.core.processes import TRACKERS, without
from pipeline.core.terminal import Verbosity, guarded_output, set_verbosity

# In the order of the help; groups with the same heading share it.
GROUPS = (
    init.INIT,
    runs.RUN,
    plan.PLAN,
    status.STATUS,
    report.REPORT,
    runs.REST,
    corpus.CORPUS,
    weights.WEIGHTS,
    push.PUSH,
    evaluate.EVALUATE,
    analyses.ANALYSES,
    law.LAW,
    embed.EMBED,
    index.INDEX,
    index_rows.ROWS,
    serve.SERVE,
)

_SET_BY_OPTIONS = (
    "NO_COLOR",
    "HF_HUB_OFFLINE",
)  # environment variables that options set while a command runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0 done, 1 the work failed, 2 wrong configuration, 130 interrupted, 143 stopped by
    a signal.

    Raises:
        SystemExit: with 0 after --help and --version, with 2 after wrong usage.
    """
    with guarded_output(), _own_settings(), without(*TRACKERS):
        words = list(sys.argv[1:] if arguments is None else arguments)
        try:
            # Not standalone: `pipeline.cli.errors` reports what ends a command.
            return int(program().main(args=words or ["--help"], prog_name="cnclip", standalone_mode=False))
        except typer.TyperException as error:
            print(usage_line(error), file=sys.stderr)
            raise SystemExit(error.exit_code) from None


@functools.cache
def program() -> Commands:
    """Return the program with all its commands."""
    return application(GROUPS)


@contextmanager
def _own_settings() -> Iterator[None]:
    """Restore the process-wide settings that the options of one command change."""
    set_verbosity(Verbosity.NORMAL)
    before = {name: os.environ.get(name) for name in _SET_BY_OPTIONS}
    try:
        yield
    finally:
        set_verbosity(Verbosity.NORMAL)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
