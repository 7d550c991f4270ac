"""Addresses that are not of the public web are refused at every hop; outages and hung workers are noticed."""

import contextlib
import dataclasses
import gzip
import socket
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from data_prep.download import stage as download
from data_prep.download.config import DownloadConfig
from data_prep.download.fetch import fetch_image
from data_prep.download.web.address import AddressRefusedError
from data_prep.download.web.opt_out import OPT_OUT_DIRECTIVES
from data_prep.download.web.public_web import ALLOWED_VARIABLE, is_public, open_public
from data_prep.formats.keys import with_key
from data_prep.formats.parquet import write_table
from pipeline.core.config import build
from pipeline.core.records import ConfigError, InputError, Manifest, Shard
from pipeline.core.shard_format import too_large
from pipeline.core.stage import Context, Outcome, Task

IMAGE = b"\xff\xd8\xff" + bytes(range(256)) * 8


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("2400:cb00:2048:1::6810:85e5", True),
        ("192.88.98.1", True),  # neighbours of what is refused
        ("198.17.255.255", True),
        ("198.20.0.0", True),
        ("100.63.255.255", True),
        ("100.128.0.0", True),
        ("223.255.255.255", True),
        ("168.63.129.17", True),
        ("2001:200::1", True),
        ("2003::1", True),
        ("127.0.0.1", False),
        ("127.8.9.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # metadata service
        ("100.100.100.200", False),  # another cloud's
        ("fd00:ec2::254", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("::ffff:127.0.0.1", False),  # IPv4 inside IPv6
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("::ffff:93.184.216.34", False),  # whatever address is inside: nobody's name has such a one
        ("::ffff:0:93.184.216.34", False),
        ("::93.184.216.34", False),
        ("::127.0.0.1", False),
        ("64:ff9b::5db8:d822", False),
        ("64:ff9b:1::7f00:1", False),
        ("64:ff9b:1:a00:0:100::", False),
        ("2002:5db8:d822::1", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),  # Teredo
        ("2001:470:1:2:0:5efe:7f00:1", False),  # ISATAP
        ("2001:470:1:2:200:5efe:a00:1", False),
        ("2001:2::1", False),  # benchmarking
        ("2001:10::1", False),  # ORCHID
        ("2001:20::1", False),
        ("2001:db8::1", False),  # documentation
        ("3fff::1", False),
        ("192.0.2.1", False),
        ("198.51.100.255", False),
        ("203.0.113.0", False),
        ("198.18.0.1", False),
        ("198.19.255.255", False),
        ("192.88.99.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("239.255.255.255", False),
        ("100::1", False),  # discard
        ("5f00::1", False),
        ("4000::1", False),  # beyond 2000::/3
        ("1fff::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("168.63.129.16", False),  # clouds' services on public numbers
        ("192.0.0.192", False),
        ("192.80.8.124", False),
        ("161.26.0.10", False),
        ("166.9.1.1", False),
        ("fd20:ce::254", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_allowed_networks() -> None:
    assert is_public("10.1.2.3", ["10.0.0.0/8"])
    assert not is_public("::ffff:10.1.2.3", ["10.0.0.0/8"])
    # Where a network translates to IPv4, the address inside is judged.
    assert is_public("64:ff9b::5db8:d822", ["64:ff9b::/96"])
    assert not is_public("64:ff9b::a9fe:a9fe", ["64:ff9b::/96"])
    assert not is_public("64:ff9b:1:7f00:0:100::", ["64:ff9b:1::/48"])
    assert not is_public("64:ff9b:1::7f00:1", ["64:ff9b:1::/48"])
    assert is_public("64:ff9b:1::5db8:d822", ["64:ff9b:1::/48"])
    assert not is_public("192.168.1.1", ["10.0.0.0/8"])
    with pytest.raises(ConfigError, match="allowed_networks"):
        build(_Holder, {"download": {"allowed_networks": ["ten"]}}, "run.toml")


def test_a_name_is_judged_by_the_address_that_is_connected_to(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is public when it is first looked up and loopback the second time is looked up once."""
    port = int(server.rpartition(":")[2])
    places = iter([("93.184.216.34", port), ("127.0.0.1", port)])
    asked = []

    def look_up(host: str, *_: Any, flags: int = 0, **__: Any) -> list[Any]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", next(places))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(OSError):  # noqa: PT011
        open_public(f"http://twice.example:{port}/end", {}, 0.5)
    assert asked == ["twice.example"]
    with pytest.raises(AddressRefusedError, match=r"twice\.example is 127\.0\.0\.1"):
        open_public(f"http://twice.example:{port}/end", {}, 0.5)


@pytest.mark.parametrize(
    "address",
    ["http://[::1/a", "http://127.0.0.1:99999/a", "http://a..b/a", "http:///a", "//a.cn/b", "a.jpg", "http://a\0b/",
     "http://" + "a" * 64 + ".cn/", "http://图\ud800.cn/", "http://a.cn/\udcff", "", "http://a.cn:0/b",
     "http://.a.cn/", "http://" + "a.b." * 70 + "cn/", "http://%2f.cn/", "http://a.cn:８０８０/"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(AddressRefusedError):
        open_public(address, {}, 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    download: DownloadConfig


class _Handler(BaseHTTPRequestHandler):
    packed = ("identity", b"")

    def do_GET(self) -> None:
        if self.path == "/packed":
            self.send_response(200)
            self.send_header("Content-Encoding", self.packed[0])
            self.send_header("Content-Length", str(len(self.packed[1])))
            self.end_headers()
            self.wfile.write(self.packed[1])
            return
        places = {
            "/metadata": "http://169.254.169.254/latest/meta-data/",
            "/loopback": "http://127.0.0.2:1/",
            "/spelled": "http://2130706434:1/",
            "/file": "file:///etc/passwd",
            "/ftp": "ftp://example.org/a",
            "/round": "/round",
            "/good": "/end",
        }
        location = places.get(self.path)
        self.send_response(302 if location else 200)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0" if location else "3")
        self.end_headers()
        if not location:
            self.wfile.write(b"end")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def _get(address: str, allowed: list[str]) -> bytes:
    with open_public(address, {}, 3, allowed) as response:
        return bytes(response.read())


def test_loopback_is_refused_unless_allowed(server: str) -> None:
    with pytest.raises(AddressRefusedError, match=r"127\.0\.0\.1, which is not a public address"):
        _get(f"{server}/end", [])
    with pytest.raises(AddressRefusedError):
        _get(server.replace("127.0.0.1", "localhost") + "/end", [])
    assert _get(f"{server}/end", ["127.0.0.1/32"]) == b"end"
    assert _get(f"{server}/good", ["127.0.0.1/32"]) == b"end"


@pytest.mark.parametrize("path", ["metadata", "loopback", "spelled", "file", "ftp"])
def test_redirects_to_what_is_not_public_are_refused(server: str, path: str) -> None:
    with pytest.raises(AddressRefusedError):
        _get(f"{server}/{path}", ["127.0.0.1/32"])


def test_redirects_in_a_circle_end(server: str) -> None:
    with pytest.raises(OSError, match="more than 10 redirects"):
        _get(f"{server}/round", ["127.0.0.1/32"])


def _fetch(monkeypatch: pytest.MonkeyPatch, address: str) -> tuple[bytes | None, str | None]:
    monkeypatch.setenv(ALLOWED_VARIABLE, "127.0.0.1/32")
    _, body, error = fetch_image(0, address, 3, "", list(OPT_OUT_DIRECTIVES))
    return None if body is None else body.getvalue(), error


@pytest.mark.parametrize(
    ("encoding", "data", "got"),
    [
        ("gzip", gzip.compress(IMAGE), (IMAGE, None)),
        ("x-gzip", gzip.compress(IMAGE), (IMAGE, None)),
        ("deflate", zlib.compress(IMAGE), (IMAGE, None)),
        ("GZIP ", gzip.compress(IMAGE), (IMAGE, None)),
        ("gzip", IMAGE, (IMAGE, None)),  # named and not done
        ("identity", gzip.compress(IMAGE), (gzip.compress(IMAGE), None)),
        ("gzip", gzip.compress(IMAGE)[:-9], (None, "connection: gzip data that ends too early")),
        ("br", b"\x1b\x0e" + bytes(40), (None, "content_encoding: br")),
        ("br", IMAGE, (IMAGE, None)),
        ("UTF-8", IMAGE, (IMAGE, None)),  # an encoding of text, and no packing
        ("gzip, gzip", gzip.compress(IMAGE), (IMAGE, None)),
        ("gzip", gzip.compress(bytes(65 << 20), 1), (None, f"body_limit: {too_large()}")),
    ],
)
def test_what_is_packed_without_being_asked_for_is_unpacked(
    encoding: str, data: bytes, got: object, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Handler, "packed", (encoding, data))
    found = _fetch(monkeypatch, f"{server}/packed")
    assert found == got


def test_packed_data_that_is_broken_is_a_reason(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gzip.compress(IMAGE * 100)
    monkeypatch.setattr(_Handler, "packed", ("gzip", data[:20] + bytes(20) + data[40:]))
    body, error = _fetch(monkeypatch, f"{server}/packed")
    assert body is None
    assert (error or "").startswith("content_encoding: cannot be decoded")


def _download(
    folder: Path, urls: list[list[str]], config: DownloadConfig, done: dict[str, Outcome] | None = None
) -> dict[str, Outcome]:
    """The download stage over partitions with these addresses; outcomes by task, added to `done`."""
    shards = []
    for number, addresses in enumerate(urls):
        frame = pl.DataFrame({"url": addresses, "caption": ["一只黑色的猫"] * len(addresses)})
        table = (
            with_key(frame.lazy()).with_columns(source=pl.lit("a"), width_px=None, height_px=None).collect()
        )
        write_table(table, str(folder / f"dedup/kept/{number:05d}.parquet"))
        shards.append(Shard(f"kept/{number:05d}.parquet", table.height, 0, str(number)))
    dedup = Manifest("dedup", 1, "", "", {}, tuple(shards), 0, 0, {})
    empty = Manifest("corpus", 1, "", "", {}, (), 0, 0, {})
    context = Context(str(folder), "download", 0, {"corpus": empty, "dedup": dedup})
    (folder / "download").mkdir()
    tasks: list[Task] = download.plan(config, context)
    done = {} if done is None else done
    with contextlib.closing(iter(download.run_together(config, context, tasks, lambda *_: None))) as outcomes:  # type: ignore[type-var]
        for task, outcome in outcomes:
            done[task.name] = outcome
    return done


NEAR: dict[str, Any] = {"processes": 1, "retries": 0, "allowed_networks": ("127.0.0.0/8",)}


def _dead(part: int) -> list[str]:
    return [f"http://127.0.0.1:1/{part}/{number}" for number in range(25)]


def test_private_addresses_are_refused_and_an_outage_stops_the_stage(tmp_path: Path, server: str) -> None:
    """An outage publishes nothing of its partition; refused addresses are none, and are published."""
    urls = [f"{server}/{number}" for number in range(3)] + ["http://169.254.169.254/latest", "http://[::1]/a"]
    dead = [address.replace("127.0.0.1", "127.0.0.2") for address in _dead(1)]
    config = DownloadConfig(
        processes=1, retries=0, timeout_seconds=2.0, allowed_networks=("127.0.0.2/32",)
    )  # which is not the server's
    done: dict[str, Outcome] = {}
    with pytest.raises(InputError, match=r"the network seems to be down: 100% of partition 00001"):
        _download(tmp_path, [urls, dead], config, done)
    assert done["00000"].dropped == {"address_refused": 5}
    assert done["00000"].extra["sources"]["a"] == {"in": 5, "kept": 0, "dropped": {"address_refused": 5}}
    assert not list(tmp_path.glob("download/pictures/00001*"))


@pytest.mark.slow
def test_the_watch_for_outages_can_be_switched_off(tmp_path: Path) -> None:
    done = _download(tmp_path, [_dead(0), _dead(1)], DownloadConfig(**NEAR, outage_share=1.1))
    assert [done[name].dropped for name in sorted(done)] == [{"connection": 25}] * 2


@pytest.mark.slow
def test_a_hung_worker_is_noticed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/{number}" for number in range(2)]
        config = DownloadConfig(**NEAR, timeout_seconds=300.0, stall_seconds=40.0)
        with pytest.raises(
            InputError, match=rf"wrote nothing for 40 s, so a worker hangs at {urls[0][:-1]}\d"
        ):
            _download(tmp_path, [urls], config)
        silent.settimeout(1)
        silent.accept()[0].close()  # a worker had indeed asked
