"""The training stages of a run: one task each, run by DeepSpeed's launcher in processes of their own."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline import store
from pipeline.evaluation_sets import evaluations_of
from pipeline.processes import die_with_parent
from pipeline.records import InputError
from pipeline.stage import Context, Outcome, Progress, Task
from training.config import TrainConfig, TrainJob, count_steps

MODEL_FILE = "model.safetensors"
OPENAI_FILE = "openai.pt"
METRICS_FILE = "metrics.jsonl"
_PROGRESS = re.compile(r"^@progress (\{.*\})$")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStageConfig:
    """A training stage with what it starts from."""

    train: TrainConfig
    model: str  # key of training.model.config.MODELS
    vocabulary: str | None = None  # given by path or model id; unset: the vocabulary stage's
    start_stage: str | None = None  # stage whose weights it goes on with
    image_stage: str | None = None  # stage whose OpenAI-layout file gives the image tower
    image_weights: str | None = None  # weights that give the image tower (training/model/formats.py)
    text_weights: str | None = None  # weights that give the text tower
    save_openai: bool = False  # write the OpenAI-layout file too, for the stage that starts from it
    validate: bool = True  # zero-shot recall on the run's evaluation sets while training


def tasks(config: TrainStageConfig, context: Context) -> list[Task]:
    """One task: a training run reads every shard."""
    inputs = {shard.path: shard.digest for shard in context.parents["shards"].shards}
    if config.vocabulary is None:
        inputs |= {f"vocabulary {shard.path}": shard.digest for shard in context.parents["vocabulary"].shards}
    for stage, name in ((config.start_stage, MODEL_FILE), (config.image_stage, OPENAI_FILE)):
        if stage is not None:
            inputs |= {f"{stage} {name}": shard.digest for shard in context.shards_of(stage, name)}
    for side in ("image_weights", "text_weights"):
        if (weights := getattr(config, side)) is not None:
            if not store.exists(weights):
                raise InputError(f"{weights}: no such file or folder; correct [model] {side}")
            inputs[side.replace("_", " ")] = store.digest_tree(weights)
    if config.train.distil is not None:
        teacher = config.train.distil.teacher
        if not store.exists(teacher):
            raise InputError(f"{teacher}: no such file or folder; correct [{context.stage}.distil] teacher")
        inputs["teacher"] = store.digest_tree(teacher)
    if config.validate:
        inputs |= {f"evaluation {item.name}": item.digest for item in evaluations_of(context)}
    return [Task("train", inputs)]


def make_job(config: TrainStageConfig, context: Context) -> TrainJob:
    """What the ranks are told."""
    train = config.train
    image_weights = config.image_weights
    if config.image_stage is not None:
        image_weights = context.path_in(config.image_stage, OPENAI_FILE)
    return TrainJob(
        stage=context.stage,
        model=config.model,
        seed=context.seed,
        shards=tuple(context.shards_of("shards", ".tar")),
        vocabulary=config.vocabulary or context.path_in("vocabulary", f"{train.caption_column}.txt"),
        image_weights=image_weights,
        text_weights=config.text_weights,
        start_checkpoint=context.path_in(config.start_stage, MODEL_FILE) if config.start_stage else None,
        config=train,
        evaluations={item.name: item.folder for item in evaluations_of(context)} if config.validate else {},
        folder=context.path(),
        output_model=context.path(MODEL_FILE),
        openai_model=context.path(OPENAI_FILE) if config.save_openai else None,
    )


def run(config: TrainStageConfig, context: Context, task: Task, progress: Progress, entry: str) -> Outcome:
    """Launch the ranks and wait; `entry` is the module each rank runs with the job's path.

    A run that was stopped goes on from its newest checkpoint. InputError with the end of the log where a
    rank fails.
    """
    job = make_job(config, context)
    num_samples = sum(shard.num_samples for shard in job.shards)
    count_steps(config.train, num_samples, context.stage)  # refuse before any process starts
    job_path = context.path("job.json")
    store.write_text(job_path, job.to_json())
    log_path = context.path("train.log")
    command = launcher_command(entry, job_path, config.train.ranks, free_port())
    status = _watch(
        command, launcher_environment(os.environ, config.train.threads_per_rank), log_path, progress
    )
    if status != 0:
        raise InputError(_failure(log_path, status))
    outputs = dict.fromkeys((MODEL_FILE, METRICS_FILE), 0)
    if config.save_openai:
        outputs[OPENAI_FILE] = 0
    return Outcome(outputs, num_in=num_samples, num_kept=num_samples)


def launcher_command(entry: str, job_path: str, ranks: int, port: int) -> list[str]:
    """Command line of DeepSpeed's launcher for ranks on this machine.

    It is the process that `deepspeed` starts on each machine; started directly, it is our own child and
    ends with us, however we end.
    """
    machines = json.dumps({"localhost": list(range(ranks))})
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={base64.urlsafe_b64encode(machines.encode()).decode()}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--module",
        entry,
        job_path,
    ]


def launcher_environment(environment: Mapping[str, str], threads_per_rank: int) -> dict[str, str]:
    """Environment for the launcher: this interpreter's folder on PATH (ninja is there), threads a rank."""
    scripts = os.path.dirname(sys.executable)
    settings = {
        "PATH": os.pathsep.join([scripts, environment.get("PATH", "")]),
        "OMP_NUM_THREADS": str(threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if shutil.which("nvidia-smi") is None:
        settings["DS_ACCELERATOR"] = "cpu"
    return {**environment, **settings}


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _watch(command: list[str], environment: Mapping[str, str], log_path: str, progress: Progress) -> int:
    """Run a launcher, show its `@progress` lines, keep every other line in the log; returns its status."""
    with (
        open(log_path, "a", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=die_with_parent,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := _PROGRESS.match(line.strip()):
                    fields = json.loads(found[1])
                    progress(fields["done"], fields["total"], fields["text"])
                else:
                    log.write(line)
                    log.flush()
            return process.wait()
        except BaseException:
            process.terminate()  # DeepSpeed's launcher ends its ranks on SIGTERM
            process.wait()
            raise


def _failure(log_path: str, status: int) -> str:
    """One line for a failed launch: the last error in the log, and where to read on."""
    with open(log_path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file.readlines()[-400:] if line.strip()]
    errors = [
        line for line in lines if re.match(r"^(\[rank\d+\]:? ?)?([\w.]+(Error|Exception)|error)\b", line)
    ]
    known = [line for line in errors if "CalledProcessError" not in line and "ChildFailed" not in line]
    said = known[-1] if known else (lines[-1] if lines else "no output")
    return f"{said} (training ended with status {status}; log: {log_path})"
