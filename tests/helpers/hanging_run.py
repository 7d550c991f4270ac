"""A run whose data stages never end: its images' server takes every request and answers none."""

import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers.evaluation_files import small_evaluation

_RUN = """
[run]
folder = "{folder}/run"
processes = 1
[corpus]
kind = "sources"
[[corpus.sources]]
kind = "table"
name = "table"
path = "{folder}/table.csv"
[[evaluation]]
name = "valid"
folder = "{folder}"
[dedup]
partitions = 1
[download]
allowed_networks = ["127.0.0.0/8"]
timeout_seconds = 3600.0
retries = 0
processes = 1
threads = 1
[model]
name = "tiny-rn"
[stage1]
epochs = 1
global_batch = 8
lanes = 1
ranks = 1
[launch]
cpus_prepare = 1
"""


@contextlib.contextmanager
def hanging_run(folder: Path) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yield (path of the run's file, has it begun to ask for images?); inside, its server listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        rows = [f"http://127.0.0.1:{port}/{number}.jpg,一只黑色的猫在看第{number}本书" for number in range(8)]
        (folder / "table.csv").write_text("\n".join(["url,caption", *rows]) + "\n")
        small_evaluation(folder, "valid", count=10)
        path = folder / "hanging.toml"
        path.write_text(_RUN.format(folder=folder))
        # A connection is made without our accepting it; the server can be read once there is one.
        yield str(path), lambda: bool(select.select([server], [], [], 0)[0])
