"""Training with its shards and checkpoints in an object store; moto's server stands in for S3."""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest

from pipeline.core import store
from pipeline.core.records import ConfigError, Manifest, Shard
from pipeline.core.shard_format import sidecar_of
from pipeline.core.stage import Context
from tests.helpers.counting_proxy import CountingProxy, counting_proxy
from tests.helpers.launched_jobs import outputs
from tests.helpers.rank_processes import run_ranks
from tests.helpers.s3_server import s3_server
from tests.helpers.train_jobs import make_job, train_rank
from tests.training.test_pretrain import train_rank_until_killed
from training.checkpoint import object_store
from training.checkpoint.folders import STATE_FILE, checkpoints_folder, step_folder, steps_in
from training.config.job import TrainJob
from training.config.train import TrainConfig
from training.stages import TrainStageConfig, check

ENVIRONMENT = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
SIZES = (40, 40, 40, 40, 40, 23)
STAGE = "memory://run/stage2"


def train_rank_there(job: TrainJob, environment: Mapping[str, str], killed_at: int | None = None) -> None:
    os.environ.update(environment)
    train_rank(job) if killed_at is None else train_rank_until_killed(job, killed_at)


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, CountingProxy]]:
    with s3_server() as url:
        port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
        assert port is not None
        with counting_proxy(port) as proxy, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            yield url, proxy


def put_shards(job: TrainJob, url: str) -> TrainJob:
    """Return the job with its shards, checkpoints and outputs in a bucket."""
    shards = []
    for shard in job.shards:
        for path in (shard.path, sidecar_of(shard.path)):
            store.write_bytes(store.join(url, "shards", Path(path).name), Path(path).read_bytes())
        path = store.join(url, "shards", Path(shard.path).name)
        shards.append(dataclasses.replace(shard, path=path))
    return dataclasses.replace(job, shards=tuple(shards), store_folder=store.join(url, job.stage))


@pytest.mark.slow
def test_two_ranks_train_from_a_store_as_from_the_disk(
    bucket: tuple[str, CountingProxy], tmp_path: Path
) -> None:
    """Bytes and losses are those of the disk, also after a kill and a start on another machine."""
    url, proxy = bucket
    changes: dict[str, Any] = {
        "ranks": 2,
        "sizes": SIZES,
        "epochs": 1,
        "save_every_steps": 5,
        "window_shards": 1,
    }
    here = make_job(tmp_path, "here", **changes)
    run_ranks(train_rank, 2, here)
    environment = {name: os.environ[name] for name in ENVIRONMENT}
    there = put_shards(make_job(tmp_path, "there", **changes), url)
    before = proxy.num_bytes
    run_ranks(train_rank_there, 2, there, environment)
    read = proxy.num_bytes - before
    assert outputs(there) == outputs(here)
    needed = sum(shard.num_bytes + store.num_bytes(sidecar_of(shard.path)) for shard in here.shards)
    assert needed < read <= 1.1 * needed
    assert not [path for path in Path(there.folder, "shard_cache").rglob("*") if path.is_file()]

    killed = put_shards(make_job(tmp_path, "killed", **changes), store.join(url, "killed"))
    with pytest.raises(AssertionError, match="the rank died"):
        run_ranks(train_rank_there, 2, killed, environment, 8)
    assert killed.store_folder is not None
    assert max(steps_in(checkpoints_folder(killed.store_folder))) == 5
    shutil.rmtree(killed.folder)
    (tmp_path / "elsewhere").mkdir()
    resumed = dataclasses.replace(
        killed, folder=str(tmp_path / "elsewhere"), output_model=str(tmp_path / "elsewhere/model.safetensors")
    )
    run_ranks(train_rank_there, 2, resumed, environment)
    assert outputs(resumed) == outputs(here)
    steps = [int(path.name[5:]) for path in Path(resumed.folder, "checkpoints").iterdir()]
    assert sorted(steps_in(checkpoints_folder(killed.store_folder))) == sorted(steps)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Path]:
    """A stage at STAGE that has begun its work in this folder."""
    yield Path(object_store.prepare(STAGE, str(tmp_path / "cache")))
    fsspec.filesystem("memory").rm("/run", recursive=True)


def write_checkpoint(folder: Path, step: int, state: str = "") -> None:
    place = Path(step_folder(checkpoints_folder(str(folder)), step))
    place.mkdir(parents=True, exist_ok=True)
    (place / "weights.safetensors").write_text(f"weights of {state or step}")
    (place / STATE_FILE).write_text(state or str(step))


def read_there(step: int, name: str = "weights.safetensors") -> str:
    return store.read_text(store.join(step_folder(checkpoints_folder(STAGE), step), name))


def refuse(text: str) -> None:
    raise AssertionError(text)


def test_the_work_of_a_stage_stays_in_one_folder_until_it_is_redone(stage: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    assert Path(object_store.work_folder(STAGE, cache)) == stage
    assert Path(object_store.prepare(STAGE, cache)) == stage
    (stage / "checkpoints").mkdir()
    store.remove(STAGE)  # what a redo does
    with pytest.raises(ConfigError, match=r"work.json: no such file: the stage was never started"):
        object_store.work_folder(STAGE, cache)
    again = Path(object_store.prepare(STAGE, cache))
    assert again != stage
    assert not stage.exists()
    assert object_store.prepare(str(tmp_path), None) == str(tmp_path)
    store.write_text(store.join(STAGE, "work.json"), '{"id": "/"}')
    with pytest.raises(
        ConfigError, match=r"work.json: holds no id of 16 hexadecimal digits; remove it: a rerun"
    ):
        object_store.prepare(STAGE, cache)


def test_checkpoints_go_there_and_come_back_whole(stage: Path, tmp_path: Path) -> None:
    (stage / "metrics.jsonl").write_text("{}\n")
    (stage / "log.jsonl").write_text("first\n")
    (stage / "tensorboard").mkdir()
    (stage / "tensorboard" / "events").write_text("curve")
    (stage / "tokens").mkdir()
    for step in (3, 6):
        write_checkpoint(stage, step)
    object_store.send(str(stage), STAGE, refuse)
    write_checkpoint(stage, 6, "6 anew")
    write_checkpoint(stage, 9)
    shutil.rmtree(step_folder(str(stage / "checkpoints"), 3))
    object_store.send(str(stage), STAGE, refuse)
    assert sorted(steps_in(checkpoints_folder(STAGE))) == [6, 9]
    assert (read_there(6), read_there(9)) == ("weights of 6 anew", "weights of 9")
    assert store.list_folders(STAGE) == ["checkpoints", "tensorboard"]
    store.remove(
        store.join(step_folder(checkpoints_folder(STAGE), 9), STATE_FILE)
    )  # a kill while it was copied
    other = tmp_path / "other"
    other.mkdir()
    write_checkpoint(other, 12)  # newer than any there: a kill came before it was copied
    object_store.bring(str(other), STAGE)
    assert sorted(steps_in(str(other / "checkpoints"))) == [6, 12]
    assert (other / "checkpoints/step_000000006/weights.safetensors").read_text() == "weights of 6 anew"
    assert (other / "log.jsonl").read_text() == "first\n"
    assert not list((other / "checkpoints").glob(".*"))


def test_a_finished_stage_is_there_and_leaves_nothing_here(stage: Path) -> None:
    write_checkpoint(stage, 3)
    for name in ("model.safetensors", "metrics.jsonl", "train.log"):
        (stage / name).write_text(name)
    object_store.finish(str(stage), STAGE, ["model.safetensors", "metrics.jsonl"])
    assert set(store.list_files(STAGE)) == {"model.safetensors", "metrics.jsonl", "train.log", "work.json"}
    assert read_there(3, STATE_FILE) == "3"
    assert not stage.exists()


def test_a_store_that_does_not_answer_costs_a_notice(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(stage, 3)

    def fail(*arguments: Any) -> None:
        raise OSError("no answer")

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "_put", fail)
        object_store.send(str(stage), STAGE, said.append)
    assert "memory://run/stage2: the checkpoint cannot be copied there (no answer): training" in said[0]
    object_store.send(str(stage), STAGE, refuse)
    assert read_there(3) == "weights of 3"


def test_cached_views_in_a_store_are_refused_before_ranks_start() -> None:
    train = TrainConfig(epochs=1, lock_image=True, cached_views=2)
    config = TrainStageConfig(train=train, model="tiny-vit", vocabulary="v.txt", validate=False)
    tar = Shard("00000.tar", 1, 1, "0" * 64)
    shards = Manifest("shards", 1, "", "", {}, (tar,), 1, 1, {})
    with pytest.raises(
        ConfigError,
        match=r"^\[stage1\] cached_views = 2, .* \(memory://run/shards\).* set cached_views = 0, or copy",
    ):
        check(config, Context("memory://run", "stage1", 0, {"shards": shards}))
