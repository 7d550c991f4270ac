"""The commands that act on a run: run, verify, why, retry, diff, launch and doctor."""

from typing import Annotated

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import (
    EXIT_DONE,
    EXIT_FAILED,
    AsJson,
    FirstStage,
    LastStage,
    OneStage,
    Overrides,
    RunFile,
    corpus_folder,
)
from pipeline.cli.documents import doctor_document, print_document, why_document
from pipeline.cli.errors import with_run_file
from pipeline.core import store
from pipeline.core.config import find_recipe
from pipeline.core.records import InputError
from pipeline.core.run import select
from pipeline.core.terminal import print_lines
from pipeline.core.text_table import align

RUN, REST = Group("Run"), Group("Run")


@RUN.add("run", "run all stages that are not up to date", "demo --to shards")
def run(
    run_file: RunFile,
    overrides: Overrides = None,
    only: OneStage = None,
    first: FirstStage = None,
    last: LastStage = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="redo stale stages; with --stage, redo that stage in any case")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="hash the outputs of finished tasks and redo tasks whose files are missing or damaged",
        ),
    ] = False,
    without_failed: Annotated[
        bool,
        typer.Option(
            "--without-failed",
            help="continue without tasks of filter_text, download and filter_image that fail three times, and"
            " drop their rows as partition_failed; other stages stop",
        ),
    ] = False,
    mend: Annotated[bool, typer.Option("--mend", hidden=True)] = False,
) -> int:
    from pipeline.cli.tables import closing_words
    from pipeline.last_start import start

    resolved, num_run, num_stages = start(
        run_file,
        overrides or (),
        only=only,
        first=first,
        last=last,
        redo=redo,
        repair=repair or mend,
        without_failed=without_failed,
    )
    print(closing_words(resolved, num_run, num_stages))
    return EXIT_DONE


@REST.add("verify", "hash all outputs and compare them with the manifests", "demo --stage shards")
def verify(
    run_file: RunFile,
    overrides: Overrides = None,
    only: OneStage = None,
    first: FirstStage = None,
    last: LastStage = None,
) -> int:
    from pipeline.last_start import load_as_started
    from pipeline.runner import unseen
    from pipeline.runner import verify as verify_stages

    resolved, _ = load_as_started(run_file, overrides or ())
    stages = select(resolved, only, first, last)
    if not store.exists(resolved.folder):
        raise InputError(f"{resolved.folder}: no such folder; run {run_file} first, or check [run] folder")
    missing = unseen(resolved, stages)
    if len(missing) == len(stages):
        raise InputError(
            f"{resolved.folder}: nothing to verify: no stage of {', '.join(missing)} is finished; run"
            f" `cnclip run {run_file}` first"
        )
    complaints = verify_stages(resolved, stages)
    print_lines([with_run_file(line, run_file) for line in complaints])
    print(f"{len(complaints)} differ" if complaints else "all outputs match their manifests")
    if missing:
        print(
            f"not verified because they are not finished: {', '.join(missing)}"
            f" ({len(missing)} of {len(stages)} stages; their outputs were not read)"
        )
    return EXIT_FAILED if complaints else EXIT_DONE


@REST.add(
    "why",
    "show whether a row was kept, or which stage dropped it and why",
    "my.toml https://example.com/cat.jpg",
)
def why(
    run_file: RunFile,
    key_or_url: Annotated[
        str, typer.Argument(metavar="KEY-or-URL", help="a sample's key, or an image's URL or path")
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    from pipeline.last_start import load_as_started
    from pipeline.tools.why import follow

    resolved, config = load_as_started(run_file, overrides or ())
    fates = follow(resolved, config.filter_text, key_or_url)
    if as_json:
        print_document(why_document(run_file, resolved, key_or_url, fates))
    else:
        print_lines(line for fate in fates for line in fate.lines())
    return EXIT_DONE


@REST.add(
    "retry",
    "retry downloads whose failure may be transient, and merge the results",
    "my.toml --plan",
)
def retry(
    run_file: RunFile,
    overrides: Overrides = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="only show what would be retried")] = False,
) -> int:
    from pipeline.last_start import load_as_started
    from pipeline.tools import retry as retries

    resolved, _ = load_as_started(run_file, overrides or ())
    failures = retries.plan(resolved)
    rows = [("failure", "rows", "retried")]
    rows += [(item.name, f"{item.num_rows:,}", "yes" if item.is_worth_it else "no") for item in failures]
    print(align(rows, (False, True, False)))
    if only_plan:
        return EXIT_DONE
    done = retries.do(resolved)
    if not done.number:
        print("no failed downloads are worth retrying")
    else:
        print(f"pass {done.number}: recovered {done.recovered:,} of {done.asked:,} rows")
    if done.redone:
        print(f"redid {', '.join(done.redone)} with them; later stages are stale")
    return EXIT_DONE


_BUILD = "a run's folder or TOML file, finished up to the stage lock"


@REST.add(
    "diff",
    "compare two builds of a corpus: settings, funnel and rows",
    "runs/old runs/new --rows rows.parquet",
)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_BUILD)],
    b: Annotated[str, typer.Argument(metavar="B", help=_BUILD)],
    rows: Annotated[
        str | None,
        typer.Option(metavar="FILE.parquet", help="also write the rows that only one of them has"),
    ] = None,
) -> int:
    from pipeline.tools.diff import compare

    print_lines(compare(corpus_folder(a), corpus_folder(b), rows))
    return EXIT_DONE


@REST.add(
    "launch",
    "write Slurm scripts and print command lines for torchrun and deepspeed",
    "my.toml",
)
def launch(run_file: RunFile, overrides: Overrides = None) -> int:
    from pipeline.catalog import load
    from pipeline.launch.slurm import write_scripts

    given = overrides or []
    resolved, config = load(run_file, given)
    print("\n".join(write_scripts(resolved, config.launch, find_recipe(run_file), given)))
    return EXIT_DONE


@REST.add(
    "doctor",
    "check Python, packages, disk, memory, compiler, accelerator and DNS",
    "/data/runs",
)
def doctor(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="check the disk that will hold this folder of runs (default: .)"
        ),
    ] = ".",
    as_json: AsJson = False,
) -> int:
    from pipeline.tools.doctor import examine, table

    findings = examine(folder)
    if as_json:
        print_document(doctor_document(folder, findings))
    else:
        print(table(findings))
    return EXIT_DONE if all(finding.fit for finding in findings) else EXIT_FAILED
