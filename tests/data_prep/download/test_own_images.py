"""Only rows of the table that owns an image on disk can fetch it."""

import contextlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from data_prep import corpus
from data_prep.accounting.drop_table import drops_path
from data_prep.accounting.judged import SourceCounts
from data_prep.corpus import CorpusStageConfig, SourcesConfig
from data_prep.corpus_facts import CorpusFacts, OutsideTable
from data_prep.download import stage as download
from data_prep.download.config import DownloadConfig
from data_prep.formats.keys import with_key
from data_prep.formats.parquet import write_table
from data_prep.sources.local_server import HOST
from data_prep.sources.readers.source import PackedSource
from data_prep.sources.table import TableSource
from pipeline.core.records import ConfigError, Manifest, Shard
from pipeline.core.stage import Context


class _Redirects(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"http://{HOST}{self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def redirects() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Redirects) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def _image(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def test_no_row_of_another_table_and_no_redirect_reads_the_users_images(
    tmp_path: Path, redirects: str
) -> None:
    private, packed = tmp_path / "private", tmp_path / "packed"
    private.mkdir()
    packed.mkdir()
    (private / "我的 猫.jpg").write_bytes(_image("red"))
    (packed / "all.bin").write_bytes(_image("blue"))
    size = (packed / "all.bin").stat().st_size
    own, at = (
        f"http://{HOST}/pictures/own/我的 猫.jpg",
        f"http://{HOST}/packed/box/all.bin?offset=0&size={size}",
    )
    rows = [
        ("own", own, None, "kept"),
        ("box", "http://a.invalid/1.jpg", at, "kept"),
        ("own", f"http://{HOST}/pictures/own/../packed/all.bin", None, "http_404"),
        ("own", f"http://{HOST}/packed/box/all.bin?offset=0&size={size}", None, "address_refused"),
        ("web", own, None, "address_refused"),
        ("web", f"{redirects}/pictures/own/我的 猫.jpg", None, "address_refused"),
        ("web", f"{redirects}/packed/box/all.bin?offset=0&size={size}", None, "address_refused"),
        ("web", f" HTTP://Corpus.INVALID./pictures/own/我的 猫.jpg#{1}", None, "address_refused"),
        # A column that a table carries along says nothing.
        ("web", f"{redirects}/pictures/own/2.jpg", at, "address_refused"),
        ("box", at, f"http://{HOST}/pictures/own/我的 猫.jpg", "address_refused"),
    ]
    frame = pl.DataFrame(rows, schema=["source", "url", "picture_at", "fate"], orient="row").with_columns(
        caption=pl.format("第{}张图片的说明", pl.int_range(len(rows)))
    )
    table = with_key(frame.lazy()).with_columns(width_px=None, height_px=None).collect()
    write_table(table.drop("fate"), str(tmp_path / "run/dedup/kept/00000.parquet"))
    facts = CorpusFacts(
        external=OutsideTable(
            path="t.parquet",
            source=TableSource(path="t.parquet", name="own", picture_folder=str(private)),
            digest="0",
        ),
        sources={"own": SourceCounts(num_in=len(rows), num_kept=len(rows))},
        packed={"box": str(packed)},
    )
    made = Manifest("corpus", 1, "", "", {}, (), 0, 0, {}, {"00000": facts.to_json()})
    dedup = Manifest("dedup", 1, "", "", {}, (Shard("kept/00000.parquet", len(rows), 0, "0"),), 0, 0, {})
    context = Context(str(tmp_path / "run"), "download", 0, {"corpus": made, "dedup": dedup})
    (tmp_path / "run/download").mkdir()
    config = DownloadConfig(
        processes=1, retries=0, timeout_seconds=10.0, allowed_networks=("127.0.0.0/8",), outage_share=2.0
    )
    tasks = download.plan(config, context)
    with contextlib.closing(iter(download.run_together(config, context, tasks, lambda *_: None))) as outcomes:  # type: ignore[type-var]
        (outcome,) = [outcome for _, outcome in outcomes]
    fates = dict(pl.read_parquet(context.path(drops_path("00000"))).select("key", "reason").iter_rows())
    found = [(*row[:3], fates.get(key, "kept")) for key, row in zip(table["key"], rows, strict=True)]
    assert found == rows
    assert outcome.num_kept == 2


def test_a_name_is_not_shared_by_sources_with_different_images(tmp_path: Path) -> None:
    context = Context(str(tmp_path), "corpus", 0, {})
    plain = TableSource(path="a.parquet", name="mine")
    sources = [
        (plain, TableSource(path="b.parquet", name="mine", picture_folder="images")),
        (plain, PackedSource(kind="cn_clip_tsv", path="set", name="mine")),
        (
            PackedSource(kind="shards", path="a", name="mine"),
            PackedSource(kind="shards", path="b", name="mine"),
        ),
    ]
    for pair in sources:
        config = CorpusStageConfig(corpus=SourcesConfig(kind="sources", sources=pair))
        with pytest.raises(ConfigError, match=r"corpus\.sources: two sources named 'mine'"):
            corpus.plan(config, context)
