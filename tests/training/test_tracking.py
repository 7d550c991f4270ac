"""Curves in Weights & Biases and MLflow: the real packages, offline and in a local store."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import build, digest
from pipeline.core.processes import TRACKERS, without
from pipeline.core.records import ConfigError
from tests.helpers.launched_jobs import losses
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import make_job, train_rank
from training.config.job import TrainJob
from training.config.tracking import MlflowConfig, TrackingConfig, WandbConfig
from training.stages import TrainStageConfig
from training.tracking import check_packages

_BLOCK = 32_768  # bytes of a block of a LevelDB log


def _needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def tracked_job(folder: Path, **tracking: Any) -> TrainJob:
    return dataclasses.replace(make_job(folder, "run", epochs=2), tracking=TrackingConfig(**tracking))


class _AskedError(Exception):
    """What `train_offline` fails with if it is asked to."""


def train_offline(job: TrainJob, fail_at: int = 0) -> list[str]:
    """Train without a network, where asked to until the batch after a step cannot be read.

    Returns temporary folders of wandb that are left.
    """
    from training.trainer import Trainer

    os.environ["WANDB_MODE"] = "offline"
    tempfile.tempdir = str(Path(job.folder).parent / "temporary")
    os.makedirs(tempfile.tempdir, exist_ok=True)
    begin = Trainer.begin

    def failing(self: Trainer, batch: Any) -> None:
        if batch.step == fail_at:
            raise _AskedError
        begin(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        if fail_at:
            patch.setattr(Trainer, "begin", failing)
        with contextlib.suppress(_AskedError):
            train_rank(job)
    return [name for name in os.listdir(tempfile.tempdir) if "wandb" in name]


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format, which `.wandb` files have after a header of 7 bytes."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:  # padding: no header fits
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + length]
        position += 7 + length
        parts = part if kind in (1, 2) else parts + part  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            yield parts


def wandb_history(job: TrainJob) -> tuple[set[str], list[tuple[int, dict[str, float]]]]:
    """Ids of the tracked runs in a stage's folder, and their (step, numbers) in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, history = set[str](), []
    for path in sorted(Path(job.folder).glob("wandb/offline-run-*/*.wandb")):
        for data in _leveldb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
                }
                values = {name: json.loads(text) for name, text in items.items()}
                history.append((int(values["_step"]), values))
    return ids, history


def mlflow_runs(uri: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("test")
    return list(client.search_runs([experiment.experiment_id]))


def mlflow_history(uri: str, run: str, name: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    return [(item.step, item.value) for item in MlflowClient(tracking_uri=uri).get_metric_history(run, name)]


def notices(job: TrainJob) -> list[str]:
    lines = [json.loads(line) for line in (Path(job.folder) / "log.jsonl").read_text().splitlines()]
    return [line["notice"] for line in lines if "notice" in line]


@_needs("wandb", "mlflow", "sqlalchemy")
def test_both_trackers_hold_the_losses_of_the_metrics_log_and_a_resumed_training_continues_them(
    tmp_path: Path,
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    job = tracked_job(
        tmp_path,
        wandb=WandbConfig(project="test"),
        mlflow=MlflowConfig(uri=uri, experiment="test"),
    )
    run_ranks(train_offline, 1, job, 5)  # step 6 fails before step 5 is logged; the checkpoint is of step 3
    (run,) = mlflow_runs(uri)
    assert run.info.status == "FAILED"
    assert [step for step, _ in mlflow_history(uri, run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert run_ranks(train_offline, 1, job) == [[]]  # no temporary folder of wandb's is left

    expected = list(enumerate(losses(job), start=1))
    assert len(expected) == 6
    (run,) = mlflow_runs(uri)
    assert run.info.status == "FINISHED"
    assert run.data.params["peak_learning_rate"] == "0.002"
    assert mlflow_history(uri, run.info.run_id, "train/loss") == expected
    means = mlflow_history(uri, run.info.run_id, "mean_recall/toy")
    assert [step for step, _ in means] == [0, 4, 6]

    ids, history = wandb_history(job)
    assert len(ids) == 1  # both starts are one run
    found = [(step, values["train/loss"]) for step, values in history if "train/loss" in values]
    assert found == expected
    assert {step for step, values in history if "mean_recall/toy" in values} == {0, 4, 6}
    assert notices(job) == []


@_needs("wandb", "mlflow")
def test_a_tracker_that_fails_gives_one_notice_and_the_training_goes_to_its_end(tmp_path: Path) -> None:
    job = tracked_job(
        tmp_path,
        tensorboard=False,
        wandb=WandbConfig(project="test"),
        mlflow=MlflowConfig(uri="http://me:secret@127.0.0.1:9", experiment="test"),  # nobody listens
    )
    Path(job.folder, "wandb").symlink_to("/dev/full")  # a folder that cannot be
    plain = dataclasses.replace(make_job(tmp_path, "plain", epochs=2))
    run_ranks(train_offline, 1, job)
    run_ranks(train_rank, 1, plain)
    assert Path(job.output_model).read_bytes() == Path(plain.output_model).read_bytes()
    assert losses(job) == losses(plain)
    said = sorted(notices(job))
    assert len(said) == 2
    for text, name in zip(said, ("mlflow", "wandb"), strict=True):
        assert text.startswith(f"[tracking] {name}: ")
        assert "secret" not in text
        assert text.endswith("; training continues without it")
    assert not Path(job.folder, "tensorboard").exists()
    assert Path(plain.folder, "tensorboard").is_dir()


def test_tracking_is_in_no_digest() -> None:
    from tests.helpers.train_jobs import CONFIG

    one = TrainStageConfig(train=CONFIG, model="ViT-B-16")
    other = dataclasses.replace(
        one, tracking=TrackingConfig(tensorboard=False, wandb=WandbConfig(project="test"))
    )
    assert digest(one) == digest(other)


def test_a_missing_package_is_named_before_ranks_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.meta_path", [])
    with pytest.raises(
        ConfigError, match=r"\[tracking\] wandb: .* pip install 'cnclip-pretraining\[wandb\]'"
    ):
        check_packages(TrackingConfig(wandb=WandbConfig(project="test")))
    check_packages(TrackingConfig())


def test_a_package_that_is_hidden_from_imports_is_installed() -> None:
    pytest.importorskip("wandb")
    with without(*TRACKERS):  # as in a command
        check_packages(TrackingConfig(wandb=WandbConfig(project="test")))


def test_the_tables_of_a_runs_file_are_checked() -> None:
    table = {"wandb": {"project": "clip"}, "mlflow": {"uri": "sqlite:///m.db", "experiment": "clip"}}
    assert build(TrackingConfig, table, "run.toml").wandb == WandbConfig(project="clip")
    with pytest.raises(ConfigError, match="projekt"):
        build(TrackingConfig, {"wandb": {"projekt": "clip"}}, "run.toml")
