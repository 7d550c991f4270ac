"""An S3 on loopback that serves some files, answers each request late, and counts requests by kind.

It knows what a survey asks: GET, HEAD, a listing in pages of 1,000, and PUT.
"""

import asyncio
import bisect
import contextlib
import json
import multiprocessing
import os
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from hashlib import md5
from typing import Any
from xml.sax.saxutils import escape

import s3fs

BUCKET = "runs"
_PAGE = 1000  # names in a page of a listing, as S3 has them


@contextlib.contextmanager
def slow_store(files: Mapping[str, bytes], latency_seconds: float) -> Iterator["SlowStore"]:
    """Serve files by name as `s3://runs/NAME` from a process of its own while the block runs."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(dict(files), latency_seconds, there), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{here.recv()}"
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()  # those of a store before this one have its address
    try:
        yield SlowStore(url)
    finally:
        process.kill()
        process.join()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class SlowStore:
    """The store from outside."""

    def __init__(self, url: str) -> None:
        self._url = url

    def counts(self) -> Counter[str]:
        """Return the requests since the last call by kind, and count anew."""
        with urllib.request.urlopen(f"{self._url}/-/counts", timeout=60) as answer:
            return Counter(json.load(answer))


def _serve(files: dict[str, bytes], latency_seconds: float, ready: Any) -> None:
    from aiohttp import web

    names = sorted(files)
    counts: Counter[str] = Counter()
    written = formatdate(usegmt=True)

    async def answer(request: web.Request) -> web.Response:
        nonlocal names
        if request.path == "/-/counts":
            found = dict(counts)
            counts.clear()
            return web.json_response(found)
        await asyncio.sleep(latency_seconds)
        key = request.path.removeprefix(f"/{BUCKET}").lstrip("/")
        query = request.query
        if not key:
            counts["LIST"] += 1
            return web.Response(text=_listing(names, files, query), content_type="application/xml")
        counts[request.method] += 1
        if request.method == "PUT":
            if key not in files:
                names = sorted([*names, key])
            files[key] = await request.read()
            return web.Response(headers={"ETag": _tag(files[key])})
        if key not in files:
            text = "<Error><Code>NoSuchKey</Code></Error>"
            return web.Response(status=404, text=text, content_type="application/xml")
        return web.Response(body=files[key], headers={"Last-Modified": written, "ETag": _tag(files[key])})

    async def run() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        ready.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def _tag(data: bytes) -> str:
    return f'"{md5(data, usedforsecurity=False).hexdigest()}"'


def _listing(names: list[str], files: Mapping[str, bytes], query: Mapping[str, str]) -> str:
    """Return a page of ListObjectsV2; the token is the last name of the page before."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token", "")
    most = min(int(query.get("max-keys", _PAGE)), _PAGE)
    keys: list[str] = []
    folders: list[str] = []
    at = bisect.bisect_right(names, after) if after else bisect.bisect_left(names, prefix)
    while at < len(names) and names[at].startswith(prefix) and len(keys) + len(folders) < most:
        inside, found, _ = names[at][len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        if found:
            folders.append(f"{prefix}{inside}{delimiter}")
            at = bisect.bisect_left(names, f"{folders[-1]}\U0010ffff", at)
        else:
            keys.append(names[at])
            at += 1
    parts = [
        "<ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
        f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><MaxKeys>{most}</MaxKeys>"
        f"<KeyCount>{len(keys) + len(folders)}</KeyCount>"
    ]
    if at < len(names) and names[at].startswith(prefix):
        token = escape(names[at - 1])
        parts.append(f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>")
    for key in keys:
        parts.append(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(_tag(files[key]))}</ETag><Size>{len(files[key])}</Size></Contents>"
        )
    parts += [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders]
    return "".join([*parts, "</ListBucketResult>"])
