"""Measure how long a stage of many finished tasks takes to survey in an object store, and what it asks.

    python benchmarks/pipeline/survey.py

An S3 on loopback answers each request after 20 ms. The tasks are as those of the download: three outputs and
a receipt with the funnel of two sources. The peer is the same survey without the file in which the driver
folds receipts: it reads each by itself. `seconds` are by the clock, longer on a busy machine;
`seconds_alone` are what it shows at most if nothing else runs: the CPU seconds, and every answer after the
one before.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import time
from collections.abc import Iterator

from benchmarks.harness import line, parse, parser, record, report
from benchmarks.pipeline.slow_store import BUCKET, SlowStore, slow_store
from pipeline.core import store
from pipeline.core.files.folded_receipts import fold_receipts
from pipeline.core.records import Receipt, Shard
from pipeline.core.run import Run, StageStatus, survey_stage
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task, task_digest

LATENCY_SECONDS = 0.02
FEW, MANY = 3_000, 30_000
NAME = "download"


def plan(num_tasks: int, context: Context) -> list[Task]:
    """Plan tasks that read one partition each."""
    return [
        Task(f"{number:05d}", {"rows": f"{number:064x}"}, {"path": f"kept/{number:05d}.parquet"})
        for number in range(num_tasks)
    ]


def run(num_tasks: int, context: Context, task: Task, progress: Progress) -> Outcome:
    """Refuse to do what is done already."""
    raise AssertionError(f"task {task.name} is done")


def receipts_of(stage: Stage) -> Iterator[Receipt]:
    """Yield the receipts of a stage whose tasks are all done."""
    drops = {"http_404": 1500, "timeout": 900, "dns": 600}
    for task in plan(stage.config, Context("", NAME, 0, {})):
        paths = (f"pictures/{task.name}.tar", f"pictures/{task.name}.parquet", f"dropped/{task.name}.parquet")
        yield Receipt(
            NAME,
            task.name,
            task_digest(task),
            stage.config_digest,
            tuple(Shard(path, 7000, 1, task.inputs["rows"]) for path in paths),
            num_in=10_000,
            num_kept=7_000,
            dropped=drops,
            seconds=100.0,
            extra={"sources": {f"part{n}": {"in": 5000, "kept": 3500, "dropped": drops} for n in range(2)}},
        )


def survey(stage: Stage, served: SlowStore) -> tuple[StageStatus, dict[str, float]]:
    """Return what a survey finds; its CPU seconds, its seconds by the clock, its requests."""
    served.counts()
    started, worked = time.perf_counter(), time.process_time()
    status = survey_stage(Run(f"s3://{BUCKET}", 0, "local", 1, (stage,)), stage)
    facts = {"CPU s": time.process_time() - worked, "seconds": time.perf_counter() - started}
    return status, {**facts, "requests": float(served.counts().total())}


def main() -> int:
    """Measure a stage of 3,000 tasks both ways, and one of 30,000."""
    parse(parser(__doc__, full="also read 30,000 receipts one by one"))
    found = []
    for num_tasks in (FEW, MANY):
        stage = Stage(NAME, "", 1, num_tasks, (), plan, run)
        receipts = {receipt.task: receipt for receipt in receipts_of(stage)}
        files = {f"{NAME}/receipts/{task}.json": item.to_file().encode() for task, item in receipts.items()}
        files |= {f"{NAME}/{out.path}": b"x" for item in receipts.values() for out in item.outputs}
        with slow_store(files, LATENCY_SECONDS) as served:
            peer = None
            if num_tasks == FEW or "--full" in sys.argv:
                alone, peer = survey(stage, served)
            fold_receipts(store.join(f"s3://{BUCKET}", NAME, "receipts"), receipts)
            status, ours = survey(stage, served)
        is_right = status.tasks_done == num_tasks and (peer is None or status.receipts == alone.receipts)
        for what, unit in (("requests", "requests"), ("time", "CPU s")):
            more = {
                "seconds": round(ours["seconds"], 1),
                "seconds_alone": round(ours["CPU s"] + LATENCY_SECONDS * ours["requests"], 1),
                "requests_a_task": round(ours["requests"] / num_tasks, 4),
            }
            found.append(
                record(
                    f"survey/{what}@{num_tasks}",
                    ours[unit],
                    peer and peer[unit],
                    unit,
                    equal=is_right,
                    **more,
                )
            )
            print(line(found[-1]), f"({more['seconds']} s by the clock)")
    return report(found)


if __name__ == "__main__":
    sys.exit(main())
