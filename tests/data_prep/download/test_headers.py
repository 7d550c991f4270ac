"""Headers as servers send them, well-formed or not."""

import http.client
import io

import pytest

from data_prep.download.web.headers import read_headers


def test_values_by_name() -> None:
    lines = [
        b"CONTENT-LENGTH: 3\r\n", b"X-Robots-Tag:noai\r\n", b"x-robots-tag : noindex,\r\n", b"\t none \r\n",
        b"no header\r\n", b" of no header\r\n", b"Server: nginx\r\n", b" goes on\r\n", b": x\r\n",
        b"Location: \xe7\x8c\xab \n", b"\r\n", b"Connection: of the body\r\n",
    ]  # fmt: skip
    found = read_headers(io.BytesIO(b"".join(lines)))
    assert found.get("content-length") == "3"
    assert found.get_all("x-robots-tag") == ["noai", "noindex, none"]
    assert found.get("location") == b"\xe7\x8c\xab".decode("latin-1")
    assert found.get("connection") is None
    assert (found.get("retry-after"), found.get_all("retry-after")) == (None, [])


def test_there_are_limits() -> None:
    assert read_headers(io.BytesIO(b"X: y\r\n" * 100 + b"\r\n")).get_all("x") == []
    with pytest.raises(http.client.HTTPException, match="more than 100 headers"):
        read_headers(io.BytesIO(b"X: y\r\n" * 101 + b"\r\n"))
    with pytest.raises(http.client.LineTooLong):
        read_headers(io.BytesIO(b"X: " + b"y" * 70_000 + b"\r\n\r\n"))
