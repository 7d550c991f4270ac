"""An S3 on loopback for tests: moto's server in a separate process, a bucket in it, the environment set."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

BUCKET = "corpora"
LIMIT_SECONDS = 90
_PROGRAM = """
import json, sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
moto = DomainDispatcherApplication(create_backend_app)
log = open(sys.argv[1], "a", buffering=1)

def counted(environ, start):
    taken = int(environ.get("CONTENT_LENGTH") or 0)
    given = b"".join(moto(environ, start))
    method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
    log.write(json.dumps([method, path, taken, 0 if method == "HEAD" else len(given)]) + "\\n")
    return [given]

server = make_server("127.0.0.1", 0, counted, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class Request:
    """A request to the server: its path begins with the bucket, its bytes are those of the bodies."""

    method: str
    path: str
    bytes_up: int
    bytes_down: int


def requests_in(log: str) -> list[Request]:
    """Return the requests that a server has written into its log."""
    return [Request(*json.loads(line)) for line in Path(log).read_text(encoding="utf-8").splitlines()]


@contextmanager
def s3_server(log: str = os.devnull) -> Iterator[str]:
    """Yield `s3://<bucket>`; processes started inside the block find it by their environment.

    The server writes its requests into the file `log`.
    """
    pytest.importorskip("moto", reason="moto is in the extra `dev`")
    pytest.importorskip("s3fs", reason="s3fs is in the extra `s3`")
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, log], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port.isdigit(), "moto's server did not start"
        settings = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            _make_bucket()
            yield f"s3://{BUCKET}"
    finally:
        process.kill()
        process.wait()


def _make_bucket() -> None:
    import fsspec

    deadline = time.monotonic() + LIMIT_SECONDS
    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    while not fs.exists(BUCKET):
        assert time.monotonic() < deadline
        fs.mkdir(BUCKET)
