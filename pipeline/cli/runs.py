"""The commands that act on a run: run, plan, verify, why, retry, diff, launch and doctor."""

import sys
from typing import Annotated

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USAGE,
    AsJson,
    FirstStage,
    LastStage,
    OneStage,
    Overrides,
    RunFile,
    corpus_folder,
)
from pipeline.cli.documents import doctor_document, plan_document, print_document, why_document
from pipeline.core import store
from pipeline.core.config import find_recipe
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import select, survey_what_is_there
from pipeline.core.terminal import one_line, print_lines
from pipeline.core.text_table import align

RUN, REST = Group("Run"), Group("Run")

# Defaults of the training plan.
_HARDWARE = "A100"
_UTILISATION = 0.4  # share of its 16-bit peak
_TOKENS = 22  # mean length of a caption


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
            help="drop the rows of tasks that fail three times (as partition_failed) and continue",
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


@RUN.add("plan", "show the state of every stage and what training needs", "demo --hardware A100")
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="NAME",
            help=f"plan training for a device, such as V100, A100-40GB or H100 (default: {_HARDWARE})",
        ),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(
            metavar="U",
            help=f"assume this share of the 16-bit peak while a device computes (default: {_UTILISATION})",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="assume this much device memory (default: from its data sheet)"),
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(
            metavar="GB/S",
            help="assume this bandwidth of collectives for each device (default: 350 in one node, 45 beyond)",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="plan for N pairs (default: those in the shards; 200 million for pretrain, larger and fast;"
            " finetune needs it only for sets of unknown size)",
        ),
    ] = None,
    mean_tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", metavar="L", help=f"assume a mean caption length of L tokens (default: {_TOKENS})"
        ),
    ] = None,
    vectors: Annotated[
        float | None, typer.Option(metavar="N", help="with index: plan for N vectors, such as 1e9")
    ] = None,
    dim: Annotated[
        int | None, typer.Option(metavar="D", help="with index: width of the vectors (default: 512)")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(metavar="R", help="with index: aim for this recall (default: 0.95)")
    ] = None,
    nprobe: Annotated[
        int | None,
        typer.Option(metavar="N", help="with index: assume that a query searches N lists (default: 64)"),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.toml",
            help="with index: compare this price table's machines (default: this one)",
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    if run_file == "index":
        if overrides or any(each is not None for each in (device, utilisation, memory, samples, mean_tokens)):
            raise ConfigError(
                "cnclip plan index takes only --vectors, --dim, --recall, --nprobe, --prices and --json"
            )
        return _plan_index(
            vectors, dim or 512, 0.95 if recall is None else recall, nprobe or 64, prices, as_json=as_json
        )
    if any(value is not None for value in (vectors, dim, recall, nprobe, prices)):
        raise ConfigError("--vectors, --dim, --recall, --nprobe and --prices belong to `cnclip plan index`")
    from pipeline.planning.requirements import (
        RECIPES,
        hardware,
        is_fast,
        trainings_of_recipe,
        trainings_of_run,
    )
    from pipeline.planning.table import training_table

    if samples is not None and samples <= 0:
        raise ConfigError(f"--samples {samples}: must be greater than 0")
    recipe = run_file.removeprefix("training/recipes/").removesuffix(".toml")
    asked = (device, utilisation, memory, network, samples, mean_tokens)
    tokens = _TOKENS if mean_tokens is None else mean_tokens
    on = None
    if recipe in RECIPES or any(value is not None for value in asked):
        used = _UTILISATION if utilisation is None else utilisation
        on = hardware(device or _HARDWARE, used, memory, network)
    if recipe in RECIPES and on is not None:
        if overrides:
            raise ConfigError(
                f"--set {overrides[0]}: {recipe} is a fixed recipe without settings to override; plan a run"
                ' of your own with [stage1] recipe = "paper" and --hardware'
            )
        trainings = trainings_of_recipe(recipe, samples)
        table = training_table(trainings, on, tokens)
        if as_json:
            print_document(plan_document(recipe, None, [], trainings, on, tokens, [], [], []))
        else:
            print(table)
        return EXIT_DONE
    from pipeline.cli.tables import plan_table
    from pipeline.last_start import load_to_start
    from pipeline.planning.downloads import downloads
    from pipeline.planning.proportions import notes_on_training

    resolved, _ = load_to_start(run_file, overrides or ())
    trainings = trainings_of_run(resolved, samples)
    if on is None and is_fast(trainings):  # what it costs is what it is for
        on = hardware(_HARDWARE, _UTILISATION, None)
    needs = ""
    if on is not None:
        needs = training_table(trainings, on, tokens) if trainings else "this run trains no model"
    statuses, complaints = survey_what_is_there(resolved)
    notes = notes_on_training(resolved, resolved.stages)
    if as_json:
        folder = resolved.folder
        loads = downloads(resolved)
        document = plan_document(run_file, folder, statuses, trainings, on, tokens, complaints, loads, notes)
        print_document(document)
    else:
        print(f"{run_file} → {resolved.folder}")
        print(plan_table(statuses))
        print_lines(downloads(resolved))
        print_lines(f"note: {text}" for text in notes if text not in needs)
        if needs:
            print(f"\n{needs}")
    for complaint in complaints:
        print(f"error: {one_line(complaint)}", file=sys.stderr)
    return EXIT_USAGE if complaints else EXIT_DONE


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
    print_lines(complaints)
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


def _plan_index(
    vectors: float | None, dim: int, recall: float, nprobe: int, prices: str | None, *, as_json: bool
) -> int:
    """Plan an index; no run is read."""
    import os
    from dataclasses import asdict

    import psutil

    from eval.index.planning import Machine, plan_index, plan_table, read_machines

    if vectors is None or not 1 <= vectors <= 1e15 or vectors != int(vectors):
        raise ConfigError("cnclip plan index needs --vectors N, a whole number such as 1e9")
    if prices is not None:
        machines = read_machines(prices)
    else:
        memory = psutil.virtual_memory().total / 2**30
        machines = [Machine("this machine", len(os.sched_getaffinity(0)), memory)]
    plans = [plan_index(int(vectors), dim, recall, nprobe, machine) for machine in machines]
    if as_json:
        print_document({"vectors": int(vectors), "plans": [asdict(plan) for plan in plans]})
    else:
        print(plan_table(int(vectors), dim, recall, nprobe, plans))
        if prices is None:
            print("give --prices FILE.toml for prices and other machines")
    return EXIT_DONE
