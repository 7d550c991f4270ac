"""`cnclip report`."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE, Overrides
from pipeline.core import store
from pipeline.core.records import ConfigError, InputError
from pipeline.core.terminal import one_line

if TYPE_CHECKING:
    from pipeline.core.run import Run

_EVERY_SECONDS = 30


REPORT = Group("Run")


@REPORT.add(
    "report",
    "write a run's report in its current state, or compare two runs",
    "runs/old runs/new --output compared.html",
)
def report(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="a run's TOML file, the folder of a started run, or a shipped recipe such as demo",
        ),
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="RUN2", help="another run to compare the first one with")
    ] = None,
    overrides: Overrides = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="write the page to this file (default: report.html in the run's folder; for two runs,"
            " compared_with_NAME.html in the second one's)",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="keep rewriting the page until the run is finished")
    ] = False,
    every: Annotated[
        int, typer.Option(metavar="SECONDS", help="with --watch: wait this long between two pages")
    ] = _EVERY_SECONDS,
) -> int:
    if every < 1:
        raise ConfigError(f"--every {every}: must be at least 1 second")
    first = _load(run, overrides or [])
    if other is not None:
        if watch:
            raise ConfigError("--watch needs one run; leave it out to compare two")
        from eval.report.compare import write_comparison
        from eval.report.run_page import run_name

        second = _load(other, overrides or [])
        path = output or store.join(second.folder, f"compared_with_{run_name(first)}.html")
        write_comparison(first, second, path)
    else:
        path = output or store.join(first.folder, "report.html")
        _write(first, path, every if watch else None)
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
        except (InputError, OSError) as error:  # a stage is being redone and its files will return
            print(f"note: the page was not updated: {one_line(str(error))}", file=sys.stderr, flush=True)


def _load(target: str, overrides: list[str]) -> "Run":
    """Return the run of a TOML file, a shipped recipe or a run's folder."""
    from pipeline.last_start import RESOLVED, is_folder, load_as_started

    if Path(target).is_dir() and not is_folder(target):
        raise ConfigError(
            f"{target}: holds no {RESOLVED}, which `cnclip run` writes as it starts; give the run's TOML file"
        )
    return load_as_started(target, overrides)[0]
