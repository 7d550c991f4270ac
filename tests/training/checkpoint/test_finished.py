import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.train_jobs import make_job
from training.checkpoint.finished import is_finished, mark_finished
from training.config.job import TrainJob


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    job = make_job(tmp_path, "run", sizes=(2,))
    Path(job.output_model).write_bytes(b"weights")
    (Path(job.folder) / "metrics.jsonl").write_text("{}\n")
    mark_finished(job)
    return job


def changed(job: TrainJob, **changes: Any) -> TrainJob:
    return dataclasses.replace(job, config=dataclasses.replace(job.config, **changes))


def test_a_training_is_finished_on_whatever_ranks(job: TrainJob) -> None:
    assert is_finished(job)
    assert is_finished(changed(job, ranks=3, deepspeed="zero3", micro_batch=2))
    for other in ({"peak_learning_rate": 1e-9}, {"epochs": 3}, {"choose": "best"}, {"global_batch": 8}):
        assert not is_finished(changed(job, **other)), other
    assert not is_finished(dataclasses.replace(job, seed=job.seed + 1))


def test_a_note_of_an_earlier_release_counts_for_its_very_job(job: TrainJob) -> None:
    path = Path(job.folder) / "finished.json"
    note = json.loads(path.read_text())
    del note["training"]
    path.write_text(json.dumps(note))
    assert is_finished(job)
    assert not is_finished(changed(job, ranks=2))


def test_changed_outputs_do_not_count(job: TrainJob) -> None:
    Path(job.output_model).write_bytes(b"Weights")
    assert not is_finished(job)
