"""The command that estimates: plan, for a run, a recipe, a corpus or an index of any size."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE, EXIT_USAGE, AsJson, Overrides, RunFile
from pipeline.cli.documents import plan_document, print_document
from pipeline.core.records import ConfigError
from pipeline.core.run import survey_what_is_there
from pipeline.core.terminal import one_line, print_lines

PLAN = Group("Run")

# Defaults of the training plan.
_HARDWARE = "A100"
_UTILISATION = 0.4  # share of its 16-bit peak
_TOKENS = 22  # mean length of a caption


@PLAN.add(
    "plan",
    "show the state of every stage and what training needs",
    "demo --hardware A100",
    more="`cnclip plan corpus` estimates hours, bytes and failures of a corpus of any size on a cluster, and"
    " `cnclip plan index --vectors N` an index, before there is either.",
)
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
    if run_file == "corpus":
        given = (device, utilisation, memory, network, samples, mean_tokens)
        if any(each is not None for each in (*given, vectors, dim, recall, nprobe, prices)):
            raise ConfigError("cnclip plan corpus takes only --set and --json")
        return _plan_corpus(overrides or (), as_json=as_json)
    if run_file == "index":
        if overrides or any(each is not None for each in (device, utilisation, memory, samples, mean_tokens)):
            raise ConfigError(
                "cnclip plan index takes only --vectors, --dim, --recall, --nprobe, --prices and --json"
            )
        return _plan_index(
            vectors,
            512 if dim is None else dim,
            0.95 if recall is None else recall,
            64 if nprobe is None else nprobe,
            prices,
            as_json=as_json,
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


def _plan_corpus(overrides: Sequence[str], *, as_json: bool) -> int:
    """Plan a corpus of any size; no run is read."""
    from dataclasses import asdict

    from pipeline.planning.corpus import assumed, failures, plan_table, steps

    on = assumed(overrides)
    if as_json:
        print_document(
            {
                "assumed": asdict(on),
                "steps": [asdict(step) for step in steps(on)],
                "failures": [asdict(failure) for failure in failures(on)],
            }
        )
    else:
        print(plan_table(on))
    return EXIT_DONE


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
