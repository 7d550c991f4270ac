import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipeline.core.records import InputError
from tests.helpers.batches import WholeBatches
from tests.helpers.shard_files import write_shards
from tests.training.data.test_loader import make_reader
from training.config.train import AugmentConfig
from training.data.feeder import Feeder, Request
from training.data.image_workers import ImageWorkers
from training.data.loader import Batch
from training.data.views import ViewReader

CHANGES = AugmentConfig(crop_area=(0.3, 1.0))


def feed(whole: WholeBatches, first: int, end: int, *, number: int = 2) -> Feeder[Batch]:
    workers = ImageWorkers(number, whole.views, most_images=8)
    return Feeder(whole.reader.requests(first, end), workers, "cpu")


@pytest.mark.parametrize("number", [1, 3])
def test_any_number_of_workers_gives_the_same_bytes_in_order(tmp_path: Path, number: int) -> None:
    whole = make_reader(write_shards(tmp_path, [20, 20]), tmp_path, augment=CHANGES)
    with feed(whole, 3, 12, number=number) as feeder:
        batches = list(feeder)
    assert [batch.step for batch in batches] == list(range(3, 12))
    for batch in batches:  # what was taken out of the ring stays as it was
        alone = whole.read(batch.step)
        assert batch.image.equal(alone.image)
        assert batch.image.stride() == alone.image.stride()
        assert batch.tokens_BL.equal(alone.tokens_BL)
        assert batch.keys.tolist() == alone.keys.tolist()


def test_several_views_of_one_decoding_are_those_of_epochs(tmp_path: Path) -> None:
    whole = make_reader(write_shards(tmp_path, [20]), tmp_path, augment=CHANGES)
    visits = whole.reader.visits(0, range(3, 10))
    with ImageWorkers(2, whole.views, most_images=21) as workers:
        views = workers.request(visits, 3)
        assert views is not None
        found_BHWC = views.wait().copy()
    one = np.empty((7, 32, 32, 3), np.uint8)
    for epoch in range(3):
        visits["epoch"] = epoch
        ViewReader(whole.views).read(visits, one)
        np.testing.assert_array_equal(found_BHWC[epoch::3], one)


def test_errors_come_through_at_their_step(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [20, 20])
    whole = make_reader(shards, tmp_path)
    visits = [whole.reader.request(step).wanted for step in range(12)]
    first = next(step for step, found in enumerate(visits) if found is not None and found["shard"].any())
    tar = Path(shards[1].path)
    tar.write_bytes(b"\0" * len(tar.read_bytes()))
    with feed(whole, 0, 12) as feeder:
        batches = iter(feeder)
        assert [next(batches).step for _ in range(first)] == list(range(first))
        with pytest.raises(InputError, match=r"00001.tar: [0-9a-f]{32}.jpg is not the image"):
            next(batches)


def test_an_error_of_another_kind_says_where_it_was(tmp_path: Path) -> None:
    whole = make_reader(write_shards(tmp_path, [20]), tmp_path)
    os.remove(whole.views.paths[0])
    with feed(whole, 0, 2) as feeder, pytest.raises(FileNotFoundError) as found:
        list(feeder)
    assert "in an image worker:\nTraceback" in found.value.__notes__[0]


def test_a_worker_that_dies_is_named_and_ends_the_iteration(tmp_path: Path) -> None:
    whole = make_reader(write_shards(tmp_path, [20]), tmp_path)
    workers = ImageWorkers(2, whole.views, most_images=8)
    with Feeder(whole.reader.requests(0, 10_000), workers, "cpu") as feeder:
        batches = iter(feeder)
        next(batches)
        os.kill(workers.processes[1], signal.SIGKILL)
        message = rf"image worker 1 \(process {workers.processes[1]}\) was killed by SIGKILL: most often"
        with pytest.raises(InputError, match=message):
            list(batches)
    assert not any(map(psutil.pid_exists, workers.processes))


def test_a_worker_that_is_idle_when_it_dies_is_named_at_the_next_request(tmp_path: Path) -> None:
    whole = make_reader(write_shards(tmp_path, [20]), tmp_path)
    with ImageWorkers(1, whole.views, most_images=8) as workers:

        def ask() -> None:
            """Have eight views: the request fails if the death is known by then, the wait otherwise."""
            views = workers.request(whole.reader.visits(0, range(8)))
            assert views is not None
            views.wait()

        os.kill(workers.processes[0], signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(InputError, match=r"image worker 0 .* was killed by SIGKILL"):
                ask()


def test_signals_that_ask_a_rank_to_stop_leave_its_workers_alone(tmp_path: Path) -> None:
    whole = make_reader(write_shards(tmp_path, [20]), tmp_path)
    workers = ImageWorkers(1, whole.views, most_images=8)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(workers.processes[0], number)  # also while it starts
    steps = []
    with Feeder(whole.reader.requests(0, 5), workers, "cpu") as feeder:
        for item in feeder:
            steps.append(item.step)
            os.kill(workers.processes[0], signal.SIGTERM)
    assert steps == list(range(5))


def test_a_feeder_that_is_ahead_ends_when_it_is_closed(tmp_path: Path) -> None:
    whole = make_reader(write_shards(tmp_path, [20]), tmp_path)
    before = set(threading.enumerate())
    workers = ImageWorkers(2, whole.views, most_images=8)
    with Feeder(whole.reader.requests(0, 1000), workers, "cpu") as feeder:
        assert next(iter(feeder)).step == 0
    assert set(threading.enumerate()) == before
    assert not any(map(psutil.pid_exists, workers.processes))


def test_requests_stay_a_few_items_ahead(tmp_path: Path) -> None:
    whole = make_reader(write_shards(tmp_path, [20]), tmp_path)
    made: list[int] = []

    def counted() -> Iterator[Request[Batch]]:
        for step in range(1000):
            made.append(step)
            yield whole.reader.request(step)

    with Feeder(counted(), ImageWorkers(2, whole.views, most_images=8), "cpu") as feeder:
        batches = iter(feeder)
        for _ in range(5):
            next(batches)
        time.sleep(0.5)
        # 5 taken, one copied ahead, 3 in the ring, and the one that waits for room in it
        assert len(made) == 5 + 1 + 3 + 1


RANK = """
import sys
from training.config.train import AugmentConfig
from training.data.image_workers import ImageWorkers
from training.data.views import ViewConfig

views = ViewConfig(paths=[], image_size_px=32, augment=AugmentConfig(), seed=0, open_shards=1)
print(*ImageWorkers(2, views, most_images=8).processes, flush=True)
sys.stdin.read()
"""


def test_a_rank_that_is_killed_leaves_no_worker_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
        assert len(processes) == 2
        maps = Path(f"/proc/{rank.pid}/maps").read_text()
        assert "/memfd:cnclip images (deleted)" in maps  # it has no name, so that nothing of it can stay
        rank.kill()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def test_a_worker_does_without_torch() -> None:
    code = "import sys, training.data.image_worker; print([m for m in ('torch', 'timm') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_features_are_not_copied_again(tmp_path: Path) -> None:
    feature_BD = np.ones((4, 3), np.float16)
    with Feeder(iter([Request(lambda image: image, ready=feature_BD)]), None, "cpu") as feeder:
        (found,) = feeder
    assert found.equal(torch.from_numpy(feature_BD))
    assert found.data_ptr() == feature_BD.ctypes.data
