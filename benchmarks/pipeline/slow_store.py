"""An S3 on loopback that serves a folder, answers each request late, and counts requests by kind.

It knows what a survey asks: GET, HEAD, a listing in pages of 1,000, and PUT.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import urllib.request
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

BUCKET = "runs"
_PAGE = 1000  # names in a page of a listing, as S3 has them


@contextlib.contextmanager
def slow_store(folder: Path, latency_seconds: float) -> Iterator["SlowStore"]:
    """Serve the files of a folder as `s3://runs/…` from a process of its own while the block runs."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(str(folder), latency_seconds, there), daemon=True)
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


def _serve(folder: str, latency_seconds: float, ready: Any) -> None:
    from aiohttp import web

    root = Path(folder)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
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
            return web.Response(text=_listing(names, files, query, written), content_type="application/xml")
        counts[request.method] += 1
        if request.method == "PUT":
            if key not in files:
                names = sorted([*names, key])
            files[key] = await request.read()
            return web.Response(headers={"ETag": '"0"'})
        if key not in files:
            return web.Response(status=404, text="<Error><Code>NoSuchKey</Code></Error>", content_type="application/xml")
        headers = {"Last-Modified": written, "ETag": f'"{len(files[key])}"'}
        return web.Response(body=files[key], headers=headers)

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


def _listing(names: list[str], files: dict[str, bytes], query: Any, written: str) -> str:
    """Return a page of ListObjectsV2; the token is the last name of the page before."""
    import bisect

    prefix, delimiter, after = query.get("prefix", ""), query.get("delimiter", ""), query.get("continuation-token", "")
    most = min(int(query.get("max-keys", _PAGE)), _PAGE)
    keys: list[str] = []
    folders: list[str] = []
    at = bisect.bisect_right(names, after) if after else bisect.bisect_left(names, prefix)
    last = ""
    while at < len(names) and names[at].startswith(prefix) and len(keys) + len(folders) < most:
        name = names[at]
        rest = name[len(prefix) :]
        if delimiter and delimiter in rest:
            folder = prefix + rest.partition(delimiter)[0] + delimiter
            folders.append(folder)
            at = bisect.bisect_left(names, folder + "\U0010ffff", at)
            last = names[at - 1]
        else:
            keys.append(name)
            last = name
            at += 1
    more = at < len(names) and names[at].startswith(prefix)
    parts = ["<ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"]
    parts += [f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys) + len(folders)}</KeyCount>"]
    parts += [f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>"]
    if more:
        parts.append(f"<NextContinuationToken>{escape(last)}</NextContinuationToken>")
    for key in keys:
        parts.append(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>0</ETag><Size>{len(files[key])}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )
    parts += [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders]
    return "".join([*parts, "</ListBucketResult>"])
