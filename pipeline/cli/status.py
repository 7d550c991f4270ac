"""`cnclip status`: shows what each stage did, drop reasons, and examples of dropped rows."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE, EXIT_FAILED, AsJson, Overrides, RunFile
from pipeline.cli.documents import print_document, status_document
from pipeline.cli.errors import did_you_mean
from pipeline.core.records import ConfigError
from pipeline.core.run import Run, survey_what_is_there
from pipeline.core.terminal import one_line
from pipeline.core.text_table import align

if TYPE_CHECKING:
    from data_prep.filters.text import FilterTextConfig
    from pipeline.tools.examples import Example

STATUS = Group("Run")


@STATUS.add(
    "status",
    "show rows, drops, rate, time and size of each stage",
    "demo --reasons",
    more="Counts cover finished tasks; rows/s is the rate of one process. A running command"
    " works on the stage that is `working`.",
)
def status(
    run_file: RunFile,
    overrides: Overrides = None,
    reasons: Annotated[
        bool, typer.Option("--reasons", help="count the rows that each stage dropped, by reason")
    ] = False,
    reason: Annotated[
        str | None,
        typer.Option(
            "--examples",
            metavar="REASON",
            help="show some rows dropped for this reason, such as too_short",
        ),
    ] = None,
    number: Annotated[
        int, typer.Option("-n", "--number", metavar="N", min=1, help="with --examples: show at most N rows")
    ] = 10,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="show what the run is doing until it is done or Ctrl-C: rates by machine, answers by reason"
            " and host, the last hours, failed tasks, time left",
        ),
    ] = False,
    page: Annotated[
        str | None,
        typer.Option(metavar="FILE.html", help="with --watch: also write a page that reloads itself"),
    ] = None,
    as_json: AsJson = False,
) -> int:
    from pipeline.cli.tables import done_of, notes, reasons_table, status_table
    from pipeline.last_start import load_as_started

    if watch and (as_json or reasons or reason is not None):
        raise ConfigError("--watch: goes with --page only; leave out --json, --reasons and --examples")
    if page is not None and not watch:
        raise ConfigError(f"--page {page}: is written while a run is watched; give --watch too")
    run, config = load_as_started(run_file, overrides or ())
    if watch:
        from pipeline.tools.watch.live import watch_run

        watch_run(run, page)
        return EXIT_DONE
    statuses, complaints = survey_what_is_there(run)
    shown = None if reason is None else _examples(run, config.filter_text, reason, number)
    if as_json:
        rows = [(item, done_of(run, item.stage.name)) for item in statuses]
        document = status_document(run_file, run, rows, notes(run), complaints)
        if shown is not None:
            document["examples"] = [asdict(example) for example in shown]
        print_document(document)
    elif shown is not None:
        print("\n".join(_lines(shown)))
        if reasons:
            print(f"\n{reasons_table(run, statuses)}")
    elif reasons:
        print(reasons_table(run, statuses))
    else:
        print(status_table(run, statuses))
        for note in notes(run):
            print(f"note: {one_line(note)}")
    for complaint in complaints:
        print(f"error: {one_line(complaint)}", file=sys.stderr)
    return EXIT_FAILED if complaints else EXIT_DONE


def _examples(run: Run, config: "FilterTextConfig", reason: str, number: int) -> "list[Example]":
    """Return dropped rows; ConfigError if no stage dropped a row for this reason."""
    from pipeline.core.run import read_receipts
    from pipeline.tools.examples import STAGES, examples, is_named

    names = {stage.name for stage in run.stages}
    receipts = [(stage, read_receipts(run, stage)[0]) for stage in STAGES if stage in names]
    known = {name for _, of_stage in receipts for receipt in of_stage for name in receipt.dropped}
    if not any(is_named(name, reason) for name in known):
        found = f"reasons: {', '.join(sorted(known))}" if known else "no rows have been dropped yet"
        raise ConfigError(
            f"--examples {reason}: no row of {run.folder} was dropped for this reason"
            f"{did_you_mean(reason, known) or f'; {found}'}"
        )
    return examples(run, config, receipts, reason, number)


def _lines(examples: "Sequence[Example]") -> list[str]:
    """Return a table of rows with known captions, followed by the text of malformed rows."""
    from data_prep.sources.local_server import shown_address

    rows: list[tuple[str, ...]] = [("stage", "drop reason", "key", "score", "caption", "url", "detail")]
    for example in examples:
        if example.text is None:
            score = "" if example.score is None else f"{example.score:.4f}"
            url = example.url and shown_address(example.url)
            cells = (example.key, score, example.caption, url, example.detail)
            rows.append((example.stage, example.reason, *(cell or "" for cell in cells)))
    filled = [column for column in range(len(rows[0])) if column < 2 or any(row[column] for row in rows[1:])]
    table = [[row[column] for column in filled] for row in rows]
    lines = [align(table, [column == 3 for column in filled])] if len(rows) > 1 else []
    return lines + [
        one_line(f"{example.stage}  {example.reason}  {example.text!r}")
        for example in examples
        if example.text is not None
    ]
