"""Records that a training job is done, for a later start and for the stage's receipt."""

import json

from pipeline.core import store
from pipeline.core.config import Binds, digest, plain
from pipeline.core.files.foreign import parse_json
from training.config.job import TrainJob

_NAME = "finished.json"


def mark_finished(job: TrainJob) -> None:
    """Write the digest of the job and the digests of its outputs, as the last step of a job."""
    outputs = {path: store.digest_file(path) for path in _outputs(job)}
    note = {"job": digest(job), "training": _training(job), "outputs": outputs}
    store.write_text(_path(job), json.dumps(note, indent=1))


def is_finished(job: TrainJob) -> bool:
    """Return whether this training wrote its outputs, on any number of ranks, and they are intact."""
    if not store.exists(_path(job)):
        return False
    try:
        note = parse_json(store.read_text(_path(job)))
        outputs: dict[str, str] = note["outputs"]
        same = digest(job) == note["job"] or note.get("training") == _training(job)
        same = same and set(outputs) == set(_outputs(job))
    except (ValueError, KeyError, TypeError):
        return False
    return same and all(
        store.exists(path) and store.digest_file(path) == sha256 for path, sha256 in outputs.items()
    )


def _training(job: TrainJob) -> str:
    """Return the digest of a job without the settings that only affect how it is computed."""
    how: tuple[Binds] = ("never",)
    return digest(plain(job, without=how))


def _outputs(job: TrainJob) -> list[str]:
    """Return the output files including the metrics, so that a receipt never names half of them."""
    paths = [job.output_model, store.join(job.folder, "metrics.jsonl")]
    if job.config.averages is not None:
        paths += [store.join(job.folder, name) for name in job.config.averages.files]
    return paths if job.openai_model is None else [*paths, job.openai_model]


def _path(job: TrainJob) -> str:
    return store.join(job.folder, _NAME)
