"""A download that cannot go well says so soon: a full disk, a worker that died, addresses that hang."""

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.download.board import Board, Boards, name_open, report
from data_prep.download.config import DownloadConfig
from tests.data_prep.download.test_public_web import NEAR, _download

NOISE = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(NOISE, "JPEG")


def test_a_board_tells_what_its_worker_is_at(tmp_path: Path) -> None:
    boards = Boards(tmp_path / "workers")
    board = Board(str(boards.folder), num_threads=4)
    board.begin_shard(7)
    with board.open("http://a.cn/1.jpg"), board.decode("http://a.cn/0.jpg"):
        long = "http://a.cn/" + "长" * 500
        other = board.open(long)
        inner = threading.Thread(target=other.__enter__)
        inner.start()
        inner.join()
        view = boards.look()
        addresses = [item.address for item in view.open]
        assert addresses[:2] == ["http://a.cn/1.jpg", "decoding http://a.cn/0.jpg"]
        assert len(addresses[2]) > 100
        assert long.startswith(addresses[2])  # as much as fits
        assert (view.num_done, view.num_working, view.death) == (0, 1, None)
        words = name_open(view.open, most=2)
        assert words == "http://a.cn/1.jpg (for 0 s), decoding http://a.cn/0.jpg (for 0 s), and 1 more"
    assert boards.look().num_done == 1
    board.end_shard()
    assert (boards.look().num_working, boards.look().open) == (0, [])


def test_more_threads_than_slots_share_them(tmp_path: Path) -> None:
    boards = Boards(tmp_path / "workers")
    board = Board(str(boards.folder), num_threads=1000)
    board.begin_shard(0)

    def work(number: int) -> None:
        with board.open(f"http://a.cn/{number}"):
            pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    view = boards.look()
    assert (view.num_done, view.open) == (300, [])


@pytest.mark.parametrize("is_at_work", [True, False])
def test_a_death_is_told_from_an_end(tmp_path: Path, is_at_work: bool) -> None:
    boards = Boards(tmp_path / "workers")
    code = (
        "import os, sys; from data_prep.download.board import Board\n"
        "board = Board(sys.argv[1], 2)\n"
        "board.begin_shard(3); held = board.open('http://a.cn/1'); held.__enter__()\n"
        f"{'' if is_at_work else 'board.end_shard()'}\nos._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(boards.folder)], check=True)
    death = boards.look().death
    if is_at_work:
        assert death is not None
        assert (death[0], [item.address for item in death[1]]) == (3, ["http://a.cn/1"])
    else:
        assert death is None
    assert [path.name for path in boards.folder.iterdir()] == ["fault"]


def test_the_first_fault_counts(tmp_path: Path) -> None:
    boards = Boards(tmp_path / "workers")
    assert boards.fault() is None
    report(str(boards.folder), OSError(28, "No space left on device"))
    report(str(boards.folder), OSError(5, "Input/output error"))
    fault = boards.fault()
    assert fault is not None
    assert (fault.errno, fault.strerror) == (28, "No space left on device")


class _Images(BaseHTTPRequestHandler):
    silent = False  # until it is set

    def do_GET(self) -> None:
        while type(self).silent:
            time.sleep(0.05)
        self.send_response(200)
        self.send_header("Content-Length", str(len(NOISE.getvalue())))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(NOISE.getvalue())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def images() -> Iterator[str]:
    _Images.silent = False
    with ThreadingHTTPServer(("127.0.0.1", 0), _Images) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        _Images.silent = False
        running.shutdown()


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_said_at_once(tmp_path: Path, images: str) -> None:
    """A limit on the size of files fails a write as a full disk does; the real one needs a mount."""
    urls = [f"{images}/{number}.jpg" for number in range(60)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            _download(tmp_path, [urls], DownloadConfig(**NEAR))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "raw" in str(caught.value.filename)
    assert not list(tmp_path.glob("download/pictures/*"))
    assert not list(tmp_path.glob("download/raw*"))


@pytest.mark.slow
def test_a_worker_that_dies_is_noticed_and_its_partition_asked_for_again(
    tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _Images.silent = True
    urls = [f"{images}/{number}.jpg" for number in range(4)]

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for path in tmp_path.glob("download/raw*/workers/[0-9]*"):
                with contextlib.suppress(OSError):
                    if images.encode() in path.read_bytes():
                        os.kill(int(path.name), signal.SIGKILL)
                        _Images.silent = False
                        return
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    done = _download(tmp_path, [urls], DownloadConfig(**NEAR, timeout_seconds=60.0))
    killer.join()
    assert done["00000"].num_kept == 4
    said = capsys.readouterr().err
    assert "retrying 1 partitions: 00000: its worker died" in said
    assert f"as if killed or out of memory, while at {images}/" in said
