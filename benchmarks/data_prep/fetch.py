"""Measure fetching, over http and https: the download's against bare img2dataset's, by CPU time.

    python benchmarks/data_prep/fetch.py [--full] [--images N]

Both sides do what img2dataset does with the addresses of a shard, up to the bytes of each image: the peer
with its function and its pool of threads, ours with those of `data_prep.download.worker`. A server in another
process gives 30 kB an image with nine headers, as a CDN sends them; its CPU time does not count. Each round
is a process of its own (a fork), the sides take turns, and a side's rate is that of its best round.

`plain` and `tls`: 16 hosts (names of loopback), as tables have many addresses of few CDNs. `plain/once` and
`tls/once`: the server hangs up after each answer, as if no host came twice. `memory` is what a connection
takes: the difference of processes with many and with 8 of them, all open at once.
Last line: one JSON list; `equal` says that both sides got the same bytes for each address, or the same status
where there are none (one in ten is 404).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import asyncio
import contextlib
import datetime
import functools
import hashlib
import importlib
import ipaddress
import json
import multiprocessing
import os
import resource
import ssl
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise its import looks for updates
import img2dataset.downloader
import numpy as np

from benchmarks.harness import line, parse, parser, record, report

_MODULE = img2dataset.downloader
# Before the worker puts its own in their place.
DOWNLOAD_IMAGE, DOWNLOAD_WITH_RETRY = _MODULE.download_image, _MODULE.download_image_with_retry
worker = importlib.import_module("data_prep.download.worker")

NUM_HOSTS = 16
NUM_THREADS = 16
IMAGE_BYTES = 30_000
MISSING_EVERY = 10
SIDES = ("ours", "img2dataset")
CASES = ("plain", "tls", "plain/once", "tls/once")
_HEADERS = (
    "Server: nginx\r\nDate: Fri, 27 Nov 2026 10:00:00 GMT\r\nContent-Type: image/jpeg\r\n"
    'Last-Modified: Fri, 27 Nov 2020 10:00:00 GMT\r\nETag: "5fc0d0b2-7530"\r\nCache-Control: max-age=3600\r\n'
    "Accept-Ranges: bytes\r\n"
)


def image(number: int) -> bytes:
    """Return the bytes at an address; their contents do not matter."""
    return b"\xff\xd8\xff" + np.random.default_rng(number).bytes(IMAGE_BYTES)


def serve(certificate: str, folder: str) -> None:
    """Serve http, https, and both with a connection an answer; write the ports to `folder`/ports.json."""
    images = [image(number) for number in range(64)]

    gates: dict[str, tuple[list[str], asyncio.Event]] = {}

    async def all_are_there(path: str) -> None:
        """Wait until as many requests wait as the path says, of the process that it names."""
        gate, _, _ = path.rpartition("/")
        waiting, opened = gates.setdefault(gate, ([], asyncio.Event()))
        waiting.append(path)
        if len(waiting) == int(gate.rpartition("/")[2]):
            opened.set()
        await opened.wait()

    async def answer(is_once: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            is_last = False
            while not is_last:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                path = head.split(" ", 2)[1]
                if path.startswith("/wait"):
                    await all_are_there(path)
                number = int(path.rpartition("/")[2].partition(".")[0])
                is_missing = number % MISSING_EVERY == 0 and path.startswith("/a")
                body = b"missing" if is_missing else images[number % len(images)]
                is_last = is_once or "connection: close" in head.lower()
                writer.write(
                    f"HTTP/1.1 {'404 Not Found' if is_missing else '200 OK'}\r\n{_HEADERS}"
                    f"Content-Length: {len(body)}\r\nConnection: {'close' if is_last else 'keep-alive'}"
                    "\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        writer.close()

    async def main() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        ports, servers = {}, []
        for case in CASES:
            ports[case] = 0  # a free one, for the first host
            for number in range(NUM_HOSTS):
                server = await asyncio.start_server(
                    functools.partial(answer, case.endswith("once")),
                    host_name(number),
                    ports[case],
                    ssl=context if case.startswith("tls") else None,
                    backlog=4096,
                )
                ports[case] = server.sockets[0].getsockname()[1]
                servers.append(server)
        Path(folder, "ports.part").write_text(json.dumps(ports))
        os.rename(Path(folder, "ports.part"), Path(folder, "ports.json"))
        await asyncio.gather(*(server.serve_forever() for server in servers))

    asyncio.run(main())


def _raise_file_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def host_name(number: int) -> str:
    return f"127.0.0.{number % NUM_HOSTS + 1}"


def make_certificate(folder: Path) -> tuple[str, str]:
    """Return a certificate of all hosts with its key, and the machine's certificates with it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "benchmark")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.IPAddress(ipaddress.ip_address(host_name(number))) for number in range(NUM_HOSTS)]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .sign(key, hashes.SHA256())
    ).public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    own, all_of_them = folder / "own.pem", folder / "all.pem"
    own.write_bytes(secret + made)
    paths = ssl.get_default_verify_paths()
    bundle = Path(paths.cafile or paths.openssl_cafile)
    # As many certificates as a machine has: reading them is what costs.
    all_of_them.write_bytes(made + (bundle.read_bytes() if bundle.exists() else b""))
    return str(own), str(all_of_them)


def measure(side: str, urls: list[str], num_threads: int = NUM_THREADS) -> dict[str, Any]:
    """Fetch addresses in a process of its own; return seconds of CPU, peak memory and what came."""
    fork = multiprocessing.get_context("fork")  # the imports take longer than the work
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_fetch_all, args=(side, urls, num_threads, sender))
    process.start()
    sender.close()
    found: dict[str, Any] = receiver.recv()
    process.join()
    return found


def _fetch_all(side: str, urls: list[str], num_threads: int, sender: Any) -> None:
    settings: dict[str, Any] = {
        "timeout": 300,
        "retries": 0,
        "user_agent_token": "benchmark",
        "disallowed_header_directives": ["noai"],
    }
    if side == "img2dataset":
        _MODULE.download_image = DOWNLOAD_IMAGE  # its other function calls this one
        fetch, pool = functools.partial(DOWNLOAD_WITH_RETRY, **settings), ThreadPool(num_threads)
    else:
        fetch, pool = functools.partial(worker.fetch_in_turn, **settings), worker.pool_of(num_threads, 0)
    start = time.process_time()
    with pool:
        came = list(pool.imap_unordered(fetch, list(enumerate(urls))))
        pool.terminate()
        pool.join()
    seconds = time.process_time() - start
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {key: error or hashlib.sha256(stream.getvalue()).hexdigest() for key, stream, error in came}
    sender.send({"seconds": seconds, "megabytes": megabytes, "came": found})


def _outcome(text: str) -> str:
    """Return a digest, or the status that an error names: ours and img2dataset's words differ."""
    return "404" if "404" in text and len(text) < 64 else text


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[dict[str, int], str]]:
    """Start the server; yield its ports and the bundle of certificates."""
    certificate, bundle = make_certificate(folder)
    process = multiprocessing.get_context("fork").Process(target=serve, args=(certificate, str(folder)))
    process.start()
    try:
        while not (folder / "ports.json").exists():
            time.sleep(0.05)
        yield json.loads((folder / "ports.json").read_text()), bundle
    finally:
        process.terminate()
        process.join()


def addresses(case: str, port: int, count: int) -> list[str]:
    scheme = "https" if case.startswith("tls") else "http"
    return [f"{scheme}://{host_name(number)}:{port}/a/{number}.jpg" for number in range(count)]


def compare(case: str, port: int, count: int, rounds: int) -> dict[str, Any]:
    """Return the record of a case."""
    best = dict.fromkeys(SIDES, float("inf"))
    came: dict[str, list[dict[int, str]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found = measure(side, addresses(case, port, count))
            best[side] = min(best[side], found["seconds"])
            came[side].append({key: _outcome(text) for key, text in found["came"].items()})
    first = came["ours"][0]
    equal = len(first) == count and all(each == first for side in SIDES for each in came[side])
    return record(
        f"fetch/{case}",
        count / best["ours"],
        count / best["img2dataset"],
        "images/CPU s",
        equal=equal,
        images=count,
        milliseconds={side: round(1000 * best[side] / count, 3) for side in SIDES},
    )


def memory_a_connection(port: int, scheme: str, many: int) -> dict[str, Any]:
    """Return the record of what a connection takes."""
    taken = {}
    for side in SIDES:
        peaks = []
        for threads in (8, many):
            gate = f"/wait/{side}/{threads}"
            urls = [f"{scheme}://{host_name(number)}:{port}{gate}/{number}" for number in range(threads)]
            peaks.append(measure(side, urls, threads)["megabytes"])
        taken[side] = 1024 * (peaks[1] - peaks[0]) / (many - 8)
    return record(f"fetch/memory/{scheme}", taken["ours"], taken["img2dataset"], "kB", connections=many)


def main() -> int:
    made = parser(__doc__, full="4,000 images over http, 1,000 over https", rounds=(3, 5))
    made.add_argument("--images", type=int)
    options = parse(made)
    records = []
    _raise_file_limit()
    os.environ["CNCLIP_ALLOWED_NETWORKS"] = "127.0.0.0/8"
    with tempfile.TemporaryDirectory(prefix="fetch-") as folder, server(Path(folder)) as (ports, bundle):
        os.environ["SSL_CERT_FILE"] = bundle
        for case in CASES:
            usual = (2000, 300) if not options.full else (4000, 1000)
            count = options.images or usual[case.startswith("tls")]
            records.append(compare(case, ports[case], count, options.rounds))
            print(line(records[-1]))
        for case, scheme, many in (("plain", "http", 1000), ("tls", "https", 200)):
            records.append(memory_a_connection(ports[case], scheme, many))
            print(line(records[-1]))
    return report(records)


if __name__ == "__main__":
    sys.exit(main())
