"""An S3 on loopback for tests: moto's server in a separate process, a bucket in it, the environment set."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "corpora"
LIMIT_SECONDS = 90
_PROGRAM = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """Yield `s3://<bucket>`; processes started inside the block find it by their environment."""
    pytest.importorskip("moto", reason="moto is in the extra `dev`")
    pytest.importorskip("s3fs", reason="s3fs is in the extra `s3`")
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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
