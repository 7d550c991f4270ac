"""How long a stage of many finished tasks takes to survey on an S3 of 20 ms, and what it asks."""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dataclasses, tempfile, time, os
from benchmarks.harness import parse, parser, record, report
from benchmarks.pipeline.slow_store import BUCKET, slow_store
from pipeline.core.records import Receipt, Shard
from pipeline.core.run import Run, survey
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task, task_digest

def many(config, context):
    return [Task(f"{n:05d}", {"rows": f"{n:064x}"}, {"path": f"kept/{n:05d}.parquet"}) for n in range(config)]

def run_one(config, context, task, progress): raise AssertionError

def build(folder, n):
    stage = Stage("made", "", 1, n, (), many, run_one)
    ctx = Context(str(folder), "made", 0, {})
    for sub in ("receipts", "pictures", "dropped"):
        os.makedirs(folder / "made" / sub)
    for task in many(n, ctx):
        outs = []
        for p in (f"pictures/{task.name}.tar", f"pictures/{task.name}.parquet", f"dropped/{task.name}.parquet"):
            (folder / "made" / p).write_bytes(b"x")
            outs.append(Shard(p, 7000, 1, f"{int(task.name):064x}"))
        src = {f"laion{i}": {"in": 1000, "kept": 700, "dropped": {"http_404": 100, "timeout": 100, "dns": 100}} for i in range(2)}
        r = Receipt("made", task.name, task_digest(task), stage.config_digest, tuple(outs), 10000, 7000, {"http_404": 1000, "timeout": 1000, "dns": 1000}, 100.0, {"sources": src})
        (folder / "made" / "receipts" / f"{task.name}.json").write_text(r.to_file())
    return stage

if __name__ == "__main__":
    n = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as f:
        f = Path(f)
        stage = build(f, n)
        t=time.time(); c=time.process_time()
        [s] = survey(Run(str(f), 0, "local", 1, (stage,)))
        print("local", s.tasks_done, time.time()-t, time.process_time()-c)
        with slow_store(f, 0.02) as st:
            t=time.time(); c=time.process_time()
            [s] = survey(Run(f"s3://{BUCKET}", 0, "local", 1, (stage,)))
            print("s3", s.tasks_done, time.time()-t, time.process_time()-c, st.counts())
