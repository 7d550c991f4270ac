"""`cnclip report`."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.arguments import EXIT_DONE, add, add_overrides
from pipeline.core import store
from pipeline.core.records import ConfigError, InputError
from pipeline.core.terminal import one_line

if TYPE_CHECKING:
    from pipeline.core.run import Run

_EVERY_SECONDS = 30


def add_commands(commands: Any) -> None:
    """Add the command to `argparse`'s sub-parsers."""
    command = add(
        commands,
        "report",
        _report,
        "write the page of a run as it is now, or compare two runs",
        "runs/old runs/new --output compared.html",
    )
    command.add_argument(
        "run", metavar="RUN", help="a run's file, its folder, or a shipped recipe such as demo"
    )
    command.add_argument("other", metavar="RUN", nargs="?", help="a second run, to compare with the first")
    add_overrides(command)
    command.add_argument(
        "--output",
        metavar="FILE",
        help="the page (default: report.html in the run's folder; of two runs compared_with_NAME.html in the"
        " second one's)",
    )
    command.add_argument(
        "--watch",
        type=int,
        nargs="?",
        const=_EVERY_SECONDS,
        metavar="SECONDS",
        help=f"write the page again until the run is finished (default: every {_EVERY_SECONDS} seconds)",
    )


def _report(options: argparse.Namespace) -> int:
    if options.watch is not None and options.watch < 1:
        raise ConfigError(f"--watch {options.watch}: must be at least 1 second")
    run = _load(options.run, options.set)
    if options.other is not None:
        if options.watch is not None:
            raise ConfigError("--watch goes with one run: leave it out to compare two")
        from eval.report.compare import write_comparison
        from eval.report.run_page import run_name

        other = _load(options.other, options.set)
        path = options.output or store.join(other.folder, f"compared_with_{run_name(run)}.html")
        write_comparison(run, other, path)
    else:
        path = options.output or store.join(run.folder, "report.html")
        _write(run, path, options.watch)
    print(f"report: {path}")
    return EXIT_DONE


def _write(run: "Run", path: str, every_seconds: int | None) -> None:
    """Write the page once, or until the run is finished."""
    from eval.report.run_page import write_run_page

    is_done = write_run_page(run, path, refresh_seconds=every_seconds)
    if every_seconds is not None and not is_done:
        print(f"{path}  (Ctrl-C stops)", file=sys.stderr, flush=True)
    while every_seconds is not None and not is_done:
        time.sleep(every_seconds)
        try:
            is_done = write_run_page(run, path, refresh_seconds=every_seconds)
        except (InputError, OSError) as error:  # a stage was being redone: its files are there again soon
            print(f"note: the page stays as it was: {one_line(str(error))}", file=sys.stderr, flush=True)


def _load(target: str, overrides: list[str]) -> "Run":
    """Return the run of a TOML file, a shipped recipe or a folder with `run.resolved.toml`."""
    from pipeline.catalog import load

    resolved = store.join(target, "run.resolved.toml")
    if target.endswith(".toml") or not store.exists(resolved):
        if Path(target).is_dir():
            raise ConfigError(
                f"{target}: holds no run.resolved.toml, which `cnclip run` writes at its end; give the run's"
                " TOML file"
            )
        return load(target, overrides)[0]
    return dataclasses.replace(load(resolved, overrides)[0], folder=target.rstrip("/"))
