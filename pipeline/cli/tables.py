"""Build what the commands print."""

import contextlib
from collections.abc import Sequence

from data_prep.accounting.funnel import STEPS, threshold_notes
from pipeline.core import drops, store
from pipeline.core.records import InputError, Receipt
from pipeline.core.run import Run, StageStatus, State, read_manifest, survey_stage
from pipeline.core.stage import receipt_at
from pipeline.core.text_table import align


def plan_table(statuses: Sequence[StageStatus]) -> str:
    """Return a row for each stage: its state, tasks done of all, rows kept, what it does."""
    rows = [("stage", "state", "tasks", "rows kept", "what it does")]
    for status in statuses:
        tasks = "" if status.num_tasks is None else f"{status.tasks_done}/{status.num_tasks}"
        kept = f"{status.manifest.num_kept:,}" if status.manifest and status.state is State.DONE else ""
        state = status.state.value + (f" ({status.why})" if status.why else "")
        rows.append((status.stage.name, state, tasks, kept, status.stage.title))
    return align(rows, (False, False, True, True, False))


def status_table(run: Run, statuses: Sequence[StageStatus]) -> str:
    """Return a row for each stage: what it did so far, from its receipts."""
    rows = [("stage", "state", "tasks", "in", "kept", "dropped", "seconds", "MB")]
    for status in statuses:
        receipts, num_damaged = read_receipts(run, status.stage.name)
        tasks = f"{len(receipts)}/{'?' if status.num_tasks is None else status.num_tasks}"
        rows.append(
            (
                status.stage.name,
                status.state.value + (f" ({num_damaged} damaged receipts)" if num_damaged else ""),
                tasks,
                f"{sum(receipt.num_in for receipt in receipts):,}",
                f"{sum(receipt.num_kept for receipt in receipts):,}",
                f"{sum(sum(receipt.dropped.values()) for receipt in receipts):,}",
                f"{sum(receipt.seconds for receipt in receipts):,.1f}",
                f"{sum(out.num_bytes for receipt in receipts for out in receipt.outputs) / 1e6:,.1f}",
            )
        )
    return align(rows, (False, False, True, True, True, True, True, True))


def notes(run: Run) -> list[str]:
    """Return notes on the funnel: thresholds that remove nothing, stages that removed much."""
    manifests = []
    for stage in ("corpus", *STEPS):
        with contextlib.suppress(InputError):  # the table says what is damaged
            manifests.append(read_manifest(run, stage))
    found = [manifest for manifest in manifests if manifest]
    notes = [note for manifest in found for note in threshold_notes(manifest)]
    return notes + [said for manifest in found if (said := drops.warning(manifest))]


def read_receipts(run: Run, stage: str) -> tuple[list[Receipt], int]:
    """Return the receipts of a stage, in order of task names, and the number of those that are damaged."""
    folder = store.join(run.folder, stage, "receipts")
    names = [name for name in store.list_files(folder) if name.endswith(".json") and not name.startswith(".")]
    receipts = [receipt for name in names if (receipt := receipt_at(store.join(folder, name)))]
    return receipts, len(names) - len(receipts)


def closing_words(run: Run, num_run: int, num_stages: int) -> str:
    """Return what `cnclip run` ends with: headline table and report path if the report is current."""
    lines = [] if num_run else [f"nothing to do: all {num_stages} stages are done"]
    report = survey_stage(run, run.stage("report"))
    if report.state is State.DONE:
        headline = store.read_text(store.join(run.folder, "report", "headline.txt"))
        lines += ["", headline, "", f"report: {store.join(run.folder, 'report', 'report.html')}"]
    elif num_run:
        lines.append(f"stages done: {num_run}; `cnclip plan` shows what the run still has to do")
    return "\n".join(lines).strip("\n")
