"""The JSON documents that commands print with --json, and what their keys mean.

docs/reference/cli.md lists `KEYS`; `[]` follows a key that holds a list, `{}` one that maps names, which are
not listed. Keys are never removed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.core import store
from pipeline.core.run import Run, StageStatus

if TYPE_CHECKING:
    from pipeline.cli.tables import Done
    from pipeline.planning.requirements import Hardware, Training
    from pipeline.tools.doctor import Finding
    from pipeline.tools.why import Fate

_STAGE = {
    "stages[].name": "the stage",
    "stages[].state": "done, damaged, stale or to do",
    "stages[].why": "what changed, or what the stage waits for; empty if neither",
    "stages[].tasks_done": "number of finished tasks",
    "stages[].num_tasks": "number of all tasks; null while earlier stages are not done",
}
_TRAINING = {
    "hardware": "the device that training is planned for; null if it is not planned",
    "hardware.name": "the device",
    "hardware.memory_gib": "its memory",
    "hardware.usable_gib": "memory that the plan uses",
    "hardware.utilisation": "share of its 16-bit peak, 0 to 1",
    "trainings": "a list, empty if training is not planned",
    "trainings[].model": "the model's size",
    "trainings[].name": "the stage, or the data set to finetune on",
    "trainings[].global_batch": "samples per step",
    "trainings[].epochs": "epochs",
    "trainings[].ranks": "training processes",
    "trainings[].num_samples": "pairs; null if unknown",
    "trainings[].num_steps": "steps; null if unknown",
    "trainings[].micro_batch": "samples that a rank holds at once; 0 if not even one fits",
    "trainings[].memory_gib": "peak memory of a rank's tensors",
    "trainings[].flops": "FLOPs of all steps; null if unknown",
    "trainings[].gpu_days": "GPU-days; null if unknown",
    "trainings[].step_seconds": "seconds of a step",
    "trainings[].exposed_seconds": "of these, on the network while devices wait",
    "trainings[].bytes_sent": "bytes that a rank sends in a step",
    "trainings[].utilisation": "share of the peak that a step uses, 0 to 1",
    "trainings[].suitable_ranks": "the most ranks that use their devices well",
    "trainings[].cores": "cores of a rank that decode, or read cached features",
    "trainings[].bytes_read_per_second": "bytes that a rank reads in a second",
    "trainings[].paper_gpu_days": "GPU-days of the paper (A.2); null if it gives none",
    "sums": 'what trainings by `recipe = "fast"` and the paper\'s need, one after the other',
    "sums[].model": "the model's size",
    "sums[].recipe": "`fast` or `paper`",
    "sums[].num_steps": "steps of all stages",
    "sums[].samples": "samples seen",
    "sums[].flops": "FLOPs of all steps",
    "sums[].gpu_days": "GPU-days on this hardware",
}
_ERRORS = {"errors": "a list of lines, one for each missing or unusable input"}

KEYS: Mapping[str, Mapping[str, str]] = {
    "plan": {
        "run": "the run as it was given",
        "folder": "the run's folder; null for the paper's recipes",
        "stages": "a list in order",
        **_STAGE,
        "stages[].rows_kept": "rows that a finished stage kept; null for other stages",
        "stages[].title": "what the stage does",
        **_TRAINING,
        "downloads": "a list of lines: weights given by name that unfinished stages would download",
        "notes": "a list of lines: settings that are out of proportion to the corpus",
        **_ERRORS,
    },
    "status": {
        "run": "the run as it was given",
        "folder": "the run's folder",
        "stages": "a list in order; rows are those of finished tasks",
        **_STAGE,
        "stages[].damaged_receipts": "receipts that cannot be read",
        "stages[].rows_in": "rows that came in",
        "stages[].rows_kept": "rows kept",
        "stages[].rows_dropped": "rows dropped",
        "stages[].share_kept": "rows kept divided by rows that came in, 0 to 1; null if none came in",
        "stages[].rows_per_second": "rows per second of one process; null if nothing was measured",
        "stages[].seconds": "time of all tasks; of a resumed training, since it resumed",
        "stages[].bytes": "size of the outputs",
        "stages[].dropped{}": "drop reason → rows",
        "notes": "a list of lines: idle thresholds, captions that rows lost, stages that drop many rows",
        "examples": "with --examples: a list of dropped rows",
        "examples[].stage": "the stage that dropped the row",
        "examples[].reason": "the drop reason",
        "examples[].key": "the sample's key; null for a malformed row",
        "examples[].source": "the source; null for a row that reached no caption table",
        "examples[].url": "the image's address; null as above",
        "examples[].caption": "the caption; null as above",
        "examples[].score": "the source's score; null if it has none",
        "examples[].detail": "a word, an HTTP status or the key of a copy's original; null if there is none",
        "examples[].text": "a malformed row as it was read; null for other rows",
        **_ERRORS,
    },
    "why": {
        "run": "the run as it was given",
        "folder": "the run's folder",
        "key_or_url": "the key or URL as it was given",
        "rows": "a list of the rows with this key or URL",
        "rows[].key": "the sample's key; null for a malformed row",
        "rows[].source": "the source",
        "rows[].row": "the row's number in its caption table; null if it reached none",
        "rows[].url": "the image's address; null if the row reached no caption table",
        "rows[].caption": "the caption; null as above",
        "rows[].stage": "the stage that dropped the row; null if it is kept",
        "rows[].reason": "the drop reason; null if it is kept",
        "rows[].detail": "more about the reason, in words; null if there is none",
        "rows[].place": "the shard and member that hold the sample; null if there is none yet",
        "rows[].text": "a malformed row as it was read, or the text that further captions became part of",
        "rows[].count": "rows of one image that share this fate",
    },
    "inspect": {
        "origin": "the path or name that was given, with the revision that it stands for",
        "path": "the file or folder; for a name, the one in the cache",
        "format": "what wrote the file, in words",
        "model": "the model in the file, in words",
        "parameters": "number of parameters",
        "tensors": "number of tensors",
        "dtypes": "a list of their types",
        "facts{}": "metadata in the file",
        "missing": "a list of tensors that the model needs and the file lacks",
        "unexpected": "a list of tensors that the model does not know",
        "of_another_shape": "a list of tensors whose shape differs from the model's",
        "left_out": "a list of tensors that do not belong to a model",
        "notes": "a list of remarks",
        "not_finite": "a list of tensors with NaN or infinity",
    },
    "doctor": {
        "folder": "the folder for runs",
        "fit": "whether every check passed",
        "checks": "a list",
        "checks[].check": "what is checked",
        "checks[].fit": "whether the check passed",
        "checks[].found": "what was found",
        "checks[].remedy": "what to do if it did not pass",
    },
    "eval": {
        "model": "the model's size",
        "checkpoint": "the weights",
        "checkpoint_sha256": "their digest",
        "setup": "zero-shot or finetuned",
        "context_length": "largest number of tokens in a text",
        "ensemble": "what is averaged over templates: features or scores",
        "templates": "own, general, paper or a file",
        "decode": "upright or reference",
        "precision": "float32 or bf16",
        "published": "source of the paper's figures",
        "tables": "a list, one for each table of the paper and each of your sets",
        "tables[].number": "the table's number in the paper; null for your own set",
        "tables[].title": "what was measured",
        "tables[].setup": "zero-shot or finetuned",
        "tables[].model": "the model's size",
        "tables[].paper_model": "the row of the paper for comparison; null if there is none",
        "tables[].notes": "a list of remarks, such as why a figure is not comparable",
        "tables[].lines": "a list of figures",
        "tables[].lines[].label": "the metric or set",
        "tables[].lines[].ours": "our figure in percent; null if it was not measured",
        "tables[].lines[].ours.value": "the figure",
        "tables[].lines[].ours.low": "lower end of its 95% interval",
        "tables[].lines[].ours.high": "upper end",
        "tables[].lines[].paper": "the published figure; null if there is none",
        "tables[].lines[].difference": "ours minus the paper's; null if either is missing",
        "tables[].lines[].difference.value": "the difference",
        "tables[].lines[].difference.low": "lower end of its 95% interval",
        "tables[].lines[].difference.high": "upper end",
        "tables[].lines[].others{}": "published figures of other models, by name",
    },
}


def print_document(document: Mapping[str, Any]) -> None:
    """Print one JSON document to standard output."""
    print(json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False))


def print_document_of(path: str) -> None:
    """Print the JSON document in a file; NaN becomes null."""
    print_document(json.loads(store.read_text(path), parse_constant=lambda constant: None))


def _stage(status: StageStatus) -> dict[str, Any]:
    return {
        "name": status.stage.name,
        "state": status.state.value,
        "why": status.why,
        "tasks_done": status.tasks_done,
        "num_tasks": status.num_tasks,
    }


def plan_document(
    name: str,
    folder: str | None,
    statuses: Sequence[StageStatus],
    trainings: Sequence["Training"],
    on: "Hardware | None",
    tokens: int,
    errors: Sequence[str],
    downloads: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return what `plan --json` prints."""
    from pipeline.core.run import State

    stages = [
        {
            **_stage(status),
            "rows_kept": status.manifest.num_kept if status.manifest and status.state is State.DONE else None,
            "title": status.stage.title,
        }
        for status in statuses
    ]
    planned = (
        {"hardware": None, "trainings": [], "sums": []} if on is None else _trainings(trainings, on, tokens)
    )
    return {
        "run": name,
        "folder": folder,
        "stages": stages,
        **planned,
        "downloads": list(downloads),
        "notes": list(notes),
        "errors": list(errors),
    }


def _trainings(trainings: Sequence["Training"], on: "Hardware", tokens: int) -> dict[str, Any]:
    from pipeline.planning.requirements import GIB, need, next_to_the_paper, paper_gpu_days

    rows = []
    for item in trainings:
        needed = need(item, on, tokens)
        rows.append(
            {
                "model": item.model,
                "name": item.name,
                "global_batch": item.config.global_batch,
                "epochs": item.config.epochs,
                "ranks": item.config.ranks,
                "num_samples": item.num_samples,
                "num_steps": needed.num_steps,
                "micro_batch": needed.micro_batch,
                "memory_gib": needed.memory_gib,
                "flops": needed.flops,
                "gpu_days": needed.gpu_days,
                "step_seconds": needed.step.total,
                "exposed_seconds": needed.step.exposed,
                "bytes_sent": needed.wire.total,
                "utilisation": needed.utilisation,
                "suitable_ranks": needed.suitable_ranks,
                "cores": needed.feed.cores,
                "bytes_read_per_second": needed.feed.bytes_a_second,
                "paper_gpu_days": paper_gpu_days(item),
            }
        )
    hardware = {
        "name": on.name,
        "memory_gib": on.memory_bytes / GIB,
        "usable_gib": on.usable_gib,
        "utilisation": on.utilisation,
    }
    sums = [asdict(each) for pair in next_to_the_paper(trainings, on, tokens) for each in pair]
    return {"hardware": hardware, "trainings": rows, "sums": sums}


def status_document(
    name: str,
    run: Run,
    stages: Sequence[tuple[StageStatus, "Done"]],
    notes: Sequence[str],
    errors: Sequence[str],
) -> dict[str, Any]:
    """Return what `status --json` prints."""
    rows = [
        {
            **_stage(status),
            "tasks_done": done.num_tasks,
            "damaged_receipts": done.num_damaged,
            "rows_in": done.rows_in,
            "rows_kept": done.rows_kept,
            "rows_dropped": done.rows_dropped,
            "share_kept": done.share_kept,
            "rows_per_second": done.rows_per_second,
            "seconds": done.seconds,
            "bytes": done.num_bytes,
            "dropped": dict(done.dropped),
        }
        for status, done in stages
    ]
    return {"run": name, "folder": run.folder, "stages": rows, "notes": list(notes), "errors": list(errors)}


def why_document(name: str, run: Run, key_or_url: str, fates: Sequence["Fate"]) -> dict[str, Any]:
    """Return what `why --json` prints."""
    rows = [asdict(fate) for fate in fates]
    return {"run": name, "folder": run.folder, "key_or_url": key_or_url, "rows": rows}


def doctor_document(folder: str, findings: Sequence["Finding"]) -> dict[str, Any]:
    """Return what `doctor --json` prints."""
    checks = [asdict(finding) for finding in findings]
    return {"folder": folder, "fit": all(finding.fit for finding in findings), "checks": checks}
