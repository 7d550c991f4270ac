"""The same run with all its paths on S3 gives the same manifests; moto's server stands in for S3."""

import http.client
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import polars as pl
import pytest

from data_prep.accounting.judged import publish_judged
from data_prep.dedup import near_duplicates
from data_prep.dedup.near_duplicates import DedupImageConfig
from data_prep.shards import split
from data_prep.shards.split import SplitConfig
from data_prep.sources.local_server import serve
from pipeline import runner
from pipeline.core import store
from pipeline.core.records import ConfigError
from pipeline.core.run import Run, manifest_path, read_manifest, survey
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task
from tests.helpers.corpus_files import finish
from tests.helpers.fake_web import fake_web, load
from tests.helpers.numbered_run import numbered_rows, numbered_run
from tests.helpers.s3_server import requests_in, s3_server

NUM_TASKS = 100
ROWS_OF_TABLE = 8
DATA_STAGES = ("corpus", "filter_text", "dedup", "download", "filter_image", "shards")
DEMO = {
    "run.processes": 1,
    "corpus.num_clean": 60,
    "corpus.num_evaluation": 12,
    "corpus.dirt": 0.08,
    "dedup.partitions": 2,
    "download.timeout_seconds": 5.0,
    "download.retries": 0,
    "shards.samples_per_shard": 32,
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s3") / "requests"


@pytest.fixture(scope="module")
def bucket(log: Path) -> Iterator[str]:
    with s3_server(str(log)) as url:
        yield url


def _manifests(run: Run) -> list[str]:
    return [store.read_text(manifest_path(run, stage.name)) for stage in run.stages]


def test_files_on_s3(bucket: str, tmp_path: Path) -> None:
    path = store.join(bucket, "files", "a.txt")
    assert not store.exists(path)
    assert store.list_files(store.join(bucket, "files")) == []
    store.write_text(path, "汉字")
    assert (store.exists(path), store.num_bytes(path), store.read_text(path)) == (True, 6, "汉字")
    with store.open_read(path) as file:
        file.seek(3)
        assert file.read() == "字".encode()
    assert store.digest_file(path) == store.digest_bytes("汉字".encode())
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.bin").write_bytes(bytes(3_000_000))
    store.put_folder(str(tmp_path), store.join(bucket, "files"))
    with store.local_folder(store.join(bucket, "files")) as copy:
        assert sorted(p.relative_to(copy).as_posix() for p in Path(copy).rglob("*.*")) == [
            "a.txt",
            "deep/b.bin",
        ]
        assert Path(copy, "deep", "b.bin").stat().st_size == 3_000_000
    assert not Path(copy).exists()
    assert store.list_files(store.join(bucket, "files")) == ["a.txt"]
    assert store.list_folders(store.join(bucket, "files")) == ["deep"]
    assert store.list_files(path) == store.list_folders(path) == []
    assert store.digest_tree(path) == store.digest_file(path)
    store.remove(store.join(bucket, "files"))
    assert not store.exists(path)


def test_what_another_process_writes_is_seen(bucket: str) -> None:
    """A listing kept from before would hide the receipts of other machines."""
    folder = store.join(bucket, "shared")
    store.write_text(store.join(folder, "a"), "1")
    assert store.list_files(folder) == ["a"]
    path = store.join(folder, "b")
    program = f"from pipeline.core import store; store.write_text({path!r}, '2')"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    assert store.list_files(folder) == ["a", "b"]
    assert store.exists(path)


def test_tables_and_run_on_s3_give_the_same_manifests(bucket: str, tmp_path: Path) -> None:
    pl.DataFrame(numbered_rows(), schema=["url", "caption"], orient="row").write_csv(tmp_path / "0.csv")
    table = store.join(bucket, "tables", "0.csv")
    with store.publish(table) as temporary:
        shutil.copy(tmp_path / "0.csv", temporary)
    # The paths of the tables are in the configuration of the corpus stage: both runs read the same one.
    here = finish(numbered_run(tmp_path / "run", [table]))
    there = finish(numbered_run(store.join(bucket, "run"), [table]))
    assert _manifests(there) == _manifests(here)
    assert runner.verify(there, there.stages) == []
    assert runner.execute(there, there.stages, redo=False) == 0  # all is done, and seen to be


@pytest.mark.parametrize(
    ("samples_per_shard", "most_up", "most_down"),
    [(None, 1, 0), pytest.param(1000, 2, 1, marks=pytest.mark.slow)],
)
def test_images_pass_through_the_machine_once(
    samples_per_shard: int | None,
    most_up: int,
    most_down: int,
    bucket: str,
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to finished shards each image is uploaded once and never read; packing it anew doubles that."""
    fake_web(monkeypatch, lambda number: "timeout: 10 s" if number < 5 else None)
    here = finish(load(tmp_path, samples_per_shard=samples_per_shard))
    there = finish(replace(here, folder=store.join(bucket, f"once-{samples_per_shard}")))
    assert _manifests(there) == _manifests(here)
    total = sum(path.stat().st_size for path in Path(here.folder, "download", "pictures").glob("*.tar"))
    of_tars = [
        request
        for request in requests_in(str(log))
        if request.path.endswith(".tar") and f"/once-{samples_per_shard}/" in request.path
    ]
    assert total <= sum(request.bytes_up for request in of_tars) <= 1.05 * most_up * total
    assert (
        sum(request.bytes_down for request in of_tars if request.method == "GET") <= 1.05 * most_down * total
    )
    assert runner.verify(there, there.stages) == []


def made_tables(num_tables: int, context: Context) -> list[Task]:
    return [Task(f"{number:05d}", {}) for number in range(num_tables)]


def make_table(num_tables: int, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write a table of images that all differ, but for the first, which is in every table."""
    number, rng = int(task.name), np.random.default_rng(int(task.name))
    images = [bytes(432), *(rng.bytes(432) for _ in range(ROWS_OF_TABLE - 1))]
    rows = pl.DataFrame(
        {
            "key": [f"{number:08x}{row:024x}" for row in range(ROWS_OF_TABLE)],
            "source": "made",
            "url": [f"http://made.cn/{number}/{row}" for row in range(ROWS_OF_TABLE)],
            "image_sha256": [store.digest_bytes(image) for image in images],
            "perceptual_hash": [image[:48] for image in images],
            "image_signature": [image[48:] for image in images],
        }
    )
    return publish_judged(context, task, rows, rows.clear().with_columns(reason=pl.lit(None, pl.String)))


@pytest.mark.slow
def test_requests_for_copies_of_images_grow_as_the_tables(bucket: str, log: Path) -> None:
    """Four times the tables, and as many more parts: four times the requests, not sixteen times."""
    counts = []
    for num_tables in (2, 8):
        config = DedupImageConfig(max_distance=0, partitions=num_tables // 2)
        stages = (
            Stage("corpus", "", 1, 0, (), made_tables, make_table, may_be_empty=True),
            Stage("filter_image", "", 1, num_tables, (), made_tables, make_table),
            *near_duplicates.stages(config, rows="filter_image"),
            split.stage(SplitConfig(count=2), rows="dedup_image"),
        )
        run = finish(Run(store.join(bucket, f"copies-{num_tables}"), 0, "local", 1, stages))
        manifest = read_manifest(run, "dedup_image")
        assert manifest is not None
        assert manifest.dropped == {"duplicate_image": num_tables - 1}
        asked = Counter(
            request.path.split("/")[3]
            for request in requests_in(str(log))
            if f"/copies-{num_tables}/" in request.path and request.path.endswith(".parquet")
        )
        counts.append(asked)
    assert set(counts[1]) == {
        "filter_image",
        "gather_hashes",
        "find_copies",
        "merge_copies",
        "dedup_image",
        "split",
    }
    for stage, few in counts[0].items():
        assert counts[1][stage] <= 4 * few, (stage, counts)


def test_pictures_on_s3_are_served(bucket: str) -> None:
    folder = store.join(bucket, "图片")
    store.write_bytes(store.join(folder, "猫 1.jpg"), b"picture")
    store.write_bytes(store.join(bucket, "secret"), b"secret")
    with serve(None, {"own": folder}, {"own": folder}) as address:
        for path, found in (
            (quote("/pictures/own/猫 1.jpg"), (200, b"picture")),
            (quote("/packed/own/猫 1.jpg") + "?offset=2&size=3", (200, b"ctu")),
            ("/pictures/own/none.jpg", (404, b"")),
            ("/pictures/own/../secret", (404, b"")),
        ):
            connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
            connection.request("GET", urlsplit(address).path + path)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == found, path


def test_an_unknown_scheme_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"s4://bucket/a: no file system for s4://"):
        store.exists("s4://bucket/a")


def _cnclip(folder: str, *words: str) -> None:
    sets = [f"--set=run.folder={folder}", *(f"--set={key}={value}" for key, value in DEMO.items())]
    command = [sys.executable, "-m", "pipeline", words[0], "demo", *sets, *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_demo_on_s3_gives_the_same_manifests(bucket: str, tmp_path: Path) -> None:
    """Made, downloaded, judged and packed there: from the local run only the place differs."""
    here, there = str(tmp_path / "demo"), store.join(bucket, "demo")
    for folder in (here, there):
        _cnclip(folder, "run", "--to", "shards")
    for stage in DATA_STAGES:
        parts = (stage, "manifest.json")
        assert store.read_text(store.join(there, *parts)) == store.read_text(store.join(here, *parts)), stage
    _cnclip(there, "verify", "--to", "shards")


def write_one(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    store.write_text(context.path("made", task.name), task.name)
    return Outcome({f"made/{task.name}": 1}, 1, 1)


def many_tasks(config: None, context: Context) -> list[Task]:
    return [Task(f"{number:05d}", {"rows": str(number)}) for number in range(NUM_TASKS)]


def test_a_stage_is_surveyed_with_little_more_than_a_request_a_task(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receipts are read once and many at a time; outputs are known by a listing."""
    stage = Stage("made", "", 1, None, (), many_tasks, write_one)
    run = finish(Run(store.join(bucket, "counted"), 0, "local", 1, (stage,)))
    store.remove(manifest_path(run, "made"))
    store.remove(store.join(run.folder, "made", "receipts", "00007.json"))
    store.remove(store.join(run.folder, "made", "made", "00009"))
    s3fs = pytest.importorskip("s3fs")
    requests = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        requests.append(method)
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    [status] = survey(run)
    assert status.tasks_done == NUM_TASKS - 2
    assert requests.count("get_object") <= NUM_TASKS
    assert len(requests) <= 1.2 * NUM_TASKS, Counter(requests)
    monkeypatch.undo()
    assert runner.execute(run, run.stages, redo=False) == 1
