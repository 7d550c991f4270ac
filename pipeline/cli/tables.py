"""Builds the tables that commands print."""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.accounting.funnel import STEPS, lost_captions, no_op_thresholds
from data_prep.concepts import stages as concepts
from pipeline.core import drops, store
from pipeline.core.files.lock import holder
from pipeline.core.records import InputError
from pipeline.core.run import Run, StageStatus, State, read_manifest, read_receipts, survey_stage
from pipeline.core.text_table import align


def plan_table(statuses: Sequence[StageStatus]) -> str:
    """Return a row for each stage: its state, finished tasks, rows kept, what it does."""
    rows = [("stage", "state", "tasks", "rows kept", "what it does")]
    for status in statuses:
        tasks = "" if status.num_tasks is None else f"{status.tasks_done}/{status.num_tasks}"
        kept = f"{status.manifest.num_kept:,}" if status.manifest and status.state is State.DONE else ""
        state = status.state.value + (f" ({status.why})" if status.why else "")
        rows.append((status.stage.name, state, tasks, kept, status.stage.title))
    return align(rows, (False, False, True, True, False))


@dataclass(frozen=True, slots=True)
class Done:
    """What a stage has done so far, from the receipts of its finished tasks."""

    num_tasks: int
    num_damaged: int  # receipts that cannot be read
    rows_in: int
    rows_kept: int
    dropped: Mapping[str, int]  # reason → rows, the most frequent first
    seconds: float  # sum over all its tasks, including parallel ones
    num_bytes: int

    @property
    def rows_dropped(self) -> int:
        return sum(self.dropped.values())

    @property
    def share_kept(self) -> float | None:
        """Return the share of the input rows that were kept, 0 to 1; None without input rows."""
        return self.rows_kept / self.rows_in if self.rows_in else None

    @property
    def rows_per_second(self) -> float | None:
        """Return the rows per second of one process; None if nothing was measured."""
        return self.rows_in / self.seconds if self.rows_in and self.seconds > 0 else None


def done_of(run: Run, stage: str) -> Done:
    """Return what a stage has done so far."""
    receipts, num_damaged = read_receipts(run, stage)
    dropped = Counter[str]()
    for receipt in receipts:
        dropped.update(receipt.dropped)
    return Done(
        num_tasks=len(receipts),
        num_damaged=num_damaged,
        rows_in=sum(receipt.num_in for receipt in receipts),
        rows_kept=sum(receipt.num_kept for receipt in receipts),
        dropped=dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0]))),
        seconds=sum(receipt.seconds for receipt in receipts),
        num_bytes=sum(out.num_bytes for receipt in receipts for out in receipt.outputs),
    )


def status_table(run: Run, statuses: Sequence[StageStatus]) -> str:
    """Return a row for each stage: what it has done so far, from its receipts.

    While a command works on the run, the first stage that is to do is the one that it works on.
    """
    current = next((status for status in statuses if status.state is not State.DONE), None)
    is_working = current is not None and current.state is State.TO_DO and holder(run.folder) != ""
    rows = [("stage", "state", "tasks", "in", "kept", "dropped", "kept %", "rows/s", "seconds", "MB")]
    for status in statuses:
        done = done_of(run, status.stage.name)
        damaged = f" ({done.num_damaged} damaged receipts)" if done.num_damaged else ""
        rows.append(
            (
                status.stage.name,
                ("working" if is_working and status is current else status.state.value) + damaged,
                f"{done.num_tasks}/{'?' if status.num_tasks is None else status.num_tasks}",
                f"{done.rows_in:,}",
                f"{done.rows_kept:,}",
                f"{done.rows_dropped:,}",
                _percent(done.share_kept),
                _rate(done.rows_per_second),
                f"{done.seconds:,.1f}",
                f"{done.num_bytes / 1e6:,.1f}",
            )
        )
    return align(rows, (False, False, *(True,) * 8))


def reasons_table(run: Run, statuses: Sequence[StageStatus]) -> str:
    """Return a row for each reason of each stage: rows, and their share of the stage's input."""
    rows = [("stage", "drop reason", "rows", "share")]
    for status in statuses:
        done = done_of(run, status.stage.name)
        for reason, count in done.dropped.items():
            rows.append((status.stage.name, reason, f"{count:,}", f"{_percent(count / done.rows_in)}%"))
    return align(rows, (False, False, True, True)) if len(rows) > 1 else "no rows were dropped"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _rate(rows_per_second: float | None) -> str:
    if rows_per_second is None:
        return ""
    return f"{rows_per_second:,.0f}" if rows_per_second >= 10 else f"{rows_per_second:.1f}"


def notes(run: Run) -> list[str]:
    """Return notes: thresholds that remove nothing, captions lost, concepts, stages that removed much."""
    manifests = []
    for stage in ("corpus", *STEPS, "count_concepts"):
        with contextlib.suppress(InputError):  # the table shows damage
            manifests.append(read_manifest(run, stage))
    found = [manifest for manifest in manifests if manifest]
    notes = [str(note) for manifest in found for note in no_op_thresholds(manifest)]
    notes += [said for manifest in found if (said := lost_captions(manifest))]
    notes += [concepts.note(manifest) for manifest in found if manifest.stage == "count_concepts"]
    return notes + [said for manifest in found if (said := drops.warning(manifest))]


def closing_words(run: Run, num_run: int, num_stages: int) -> str:
    """Return the last lines of `cnclip run`: headline table and report path if the report is current."""
    lines = [] if num_run else [f"nothing to do: all {num_stages} stages are done"]
    report = survey_stage(run, run.stage("report"))
    if report.state is State.DONE:
        headline = store.read_text(store.join(run.folder, "report", "headline.txt"))
        lines += ["", headline, "", f"report: {store.join(run.folder, 'report', 'report.html')}"]
    elif num_run:
        lines.append(f"stages done: {num_run}; `cnclip plan` shows what the run still has to do")
    return "\n".join(lines).strip("\n")
