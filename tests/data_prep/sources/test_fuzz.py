"""Damaged images, tables and tars: no crash, no hang, every one counted with a reason."""

import contextlib
import gzip
import io
import random
import signal
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import polars as pl
import pytest
from PIL import Image

from data_prep import corpus
from data_prep.corpus import CorpusStageConfig, SourcesConfig, TablesConfig
from data_prep.download.resize import UprightResizer
from data_prep.filters import text as filter_text
from data_prep.filters.text import FilterTextConfig
from data_prep.sources.local_server import serve
from data_prep.sources.readers.source import PackedSource
from data_prep.sources.table import TableSource
from pipeline import runner
from pipeline.core.files.images import FORMAT, NOT_AN_IMAGE, PIXEL_LIMIT, TRUNCATED, UNDECODABLE
from pipeline.core.records import InputError
from pipeline.core.run import Run, read_manifest
from pipeline.core.stage import Stage
from pipeline.tools.why import explain
from tests.helpers.mutations import mutate, seed_pictures, seed_tables, seed_tar

SECONDS_A_CASE = 10
MAX_PIXELS = 200_000
PICTURE_REASONS = {NOT_AN_IMAGE, PIXEL_LIMIT, TRUNCATED, UNDECODABLE, FORMAT}


@contextlib.contextmanager
def time_limit(what: str) -> Iterator[None]:
    """A case that hangs fails by name."""

    def stop(*_: object) -> None:
        raise AssertionError(f"{what} takes more than {SECONDS_A_CASE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_A_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge_pictures(count: int, seed: int) -> Counter[str]:
    """Resize damaged images; what became of each."""
    resizer, seeds, found = UprightResizer(32, MAX_PIXELS, 90), seed_pictures(), Counter[str]()
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        data = mutate(seeds[number % len(seeds)], rng)
        with time_limit(f"picture {seed}/{number}"):
            jpeg, width, height, original_width, original_height, error = resizer(io.BytesIO(data))
        if error is None:
            assert original_width * original_height <= MAX_PIXELS
            with Image.open(io.BytesIO(jpeg)) as stored:
                assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", (width, height))
            found["kept"] += 1
        else:
            reason, colon, _ = error.partition(":")
            assert colon, error
            assert reason in PICTURE_REASONS, error
            assert jpeg is None
            found[reason] += 1
    return found


def judge_tables(count: int, seed: int, folder: Path) -> Counter[str]:
    """Take damaged tables in and judge their rows by the real stages; what became of each table."""
    seeds, found = list(seed_tables().items()), Counter[str]()
    for number in range(count):
        name, data = seeds[number % len(seeds)]
        rng = random.Random(f"{seed}/{number}")
        path = folder / str(number) / name
        path.parent.mkdir()
        if name.endswith(".gz") and rng.random() < 0.5:
            path.write_bytes(gzip.compress(mutate(gzip.decompress(data), rng)))
        else:
            path.write_bytes(mutate(data, rng))
        config = TablesConfig(kind="tables", tables=(TableSource(path=str(path), name="damaged"),))
        found[run_text_stages(path.parent / "run", config, f"table {seed}/{number}")] += 1
    return found


def run_text_stages(folder: Path, config: TablesConfig | SourcesConfig, what: str) -> str:
    """`refused` with one line that names a file, or `counted`."""
    stages = (
        Stage("corpus", "", 1, CorpusStageConfig(corpus=config), (), corpus.plan, corpus.run),
        Stage("filter_text", "", 1, FilterTextConfig(), ("corpus",), filter_text.plan, filter_text.run),
    )
    run = Run(str(folder), 0, "local", 1, stages)
    with time_limit(what):
        refused = ""
        try:
            runner.execute(run, stages, redo=False)
        except InputError as error:
            refused = str(error)
    if refused:
        assert str(folder.parent) in refused, what
        assert "\n" not in refused, what
        return "refused"
    taken, judged = read_manifest(run, "corpus"), read_manifest(run, "filter_text")
    assert taken is not None
    assert judged is not None
    assert judged.num_in == taken.num_kept
    return "counted"


def test_damaged_pictures_are_counted() -> None:
    found = judge_pictures(220, seed=0)
    assert found.total() == 220
    assert set(found) - {"format"} == {"kept", *PICTURE_REASONS} - {"format"}, found


def test_damaged_tables_are_counted(tmp_path: Path) -> None:
    found = judge_tables(60, 0, tmp_path)
    assert found.total() == 60
    assert min(found["counted"], found["refused"]) > 5, found


def _packed(folder: Path, tar: bytes) -> SourcesConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "00000.tar").write_bytes(tar)
    rows = {
        "url": [f"http://a.cn/{number}" for number in range(6)],
        "key": [f"{number:09d}" for number in range(6)],
        "status": ["success"] * 6,
        "caption": [f"第{number}张窗台上的猫" for number in range(6)],
    }
    pl.DataFrame(rows).write_parquet(folder / "00000.parquet")
    return SourcesConfig(
        kind="sources", sources=(PackedSource(kind="img2dataset", path=str(folder), name="packed"),)
    )


def judge_tars(count: int, seed: int, folder: Path) -> Counter[str]:
    whole, found = seed_tar(), Counter[str]()
    for number in range(count):
        rng = random.Random(f"tar/{seed}/{number}")
        config = _packed(folder / str(number), mutate(whole, rng))
        found[run_text_stages(folder / str(number) / "run", config, f"tar {seed}/{number}")] += 1
    return found


def test_damaged_tars_are_counted(tmp_path: Path) -> None:
    assert judge_tars(20, 0, tmp_path).total() == 20


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path: Path) -> None:
    pictures = judge_pictures(8_000, seed=1)
    tables = judge_tables(1_500, 1, tmp_path)
    (tmp_path / "tars").mkdir()
    tars = judge_tars(500, 1, tmp_path / "tars")
    assert pictures.total() + tables.total() + tars.total() == 10_000
    print(dict(pictures), dict(tables), dict(tars))


def test_hostile_names_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    """Members are found by their place; their names never become paths, and links are no images."""

    def add(tar: tarfile.TarFile) -> None:
        for name in ("../../outside.jpg", "/etc/outside.jpg", "a\nb.jpg", "汉字/../x.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo("000000001.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)

    folder = tmp_path / "packed"
    before = sorted(path for path in tmp_path.parent.rglob("*outside*"))
    assert run_text_stages(tmp_path / "packed" / "run", _packed(folder, seed_tar(add)), "tar") == "counted"
    assert sorted(path for path in tmp_path.parent.rglob("*outside*")) == before
    kept = pl.read_parquet(folder / "run" / "filter_text" / "kept" / "00000.parquet")
    assert kept.height == 6
    assert all(".." not in address for address in kept["picture_at"])


def test_the_site_gives_nothing_outside_its_folders(tmp_path: Path) -> None:
    import http.client

    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    with serve(None, {"own": str(tmp_path / "in")}, {"own": str(tmp_path / "in")}) as address:
        for path in (
            "/pictures/own/../secret", "/pictures/own/%2e%2e/secret", "/pictures/own//etc/passwd",
            "/pictures/own/link", "/packed/own/../secret?offset=0&size=6", "/packed/own/link?offset=0&size=6",
            "/packed/own/%2fetc%2fpasswd?offset=0&size=6", "/pictures/own/%00",
        ):  # fmt: skip
            connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
            connection.request("GET", urlsplit(address).path + path)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (404, b""), path


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def _bombs() -> dict[str, bytes]:
    """Small files that promise or unfold to much."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(8 * 25))
    much = zlib.compress(bytes(100 << 20), 9)
    return {
        "text chunk": _png(
            [(b"IHDR", header), (b"zTXt", b"a\0\0" + much), (b"IDAT", pixels), (b"IEND", b"")]
        ),
        "profile": _png([(b"IHDR", header), (b"iCCP", b"a\0\0" + much), (b"IDAT", pixels), (b"IEND", b"")]),
        "data": _png([(b"IHDR", header), (b"IDAT", much), (b"IEND", b"")]),
        "sides": _png(
            [(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)), (b"IDAT", pixels)]
        ),
        "bmp": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "tiff": b"II*\0" + struct.pack("<IHHHII", 8, 1, 256, 4, 1, 0xFFFFFFFF),
        "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b",",
    }


@pytest.mark.parametrize("name", ["text chunk", "profile", "data", "sides", "bmp", "tiff", "gif"])
def test_bombs_cost_little(name: str) -> None:
    import tracemalloc

    data = _bombs()[name]
    with time_limit(name):
        answer = UprightResizer(32, MAX_PIXELS, 90)(io.BytesIO(data))
    assert answer[5] is None or answer[5].partition(":")[0] in PICTURE_REASONS
    tracemalloc.start()
    UprightResizer(32, MAX_PIXELS, 90)(io.BytesIO(data))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_table_that_unfolds_to_much_is_read_in_blocks(tmp_path: Path) -> None:
    """A gigabyte of zeros in a megabyte: refused as one row that never ends, in the memory of a block."""
    path = tmp_path / "bomb.csv.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"url,caption\n")
        for _ in range(64):
            file.write(bytes(1 << 20))
    config = TablesConfig(kind="tables", tables=(TableSource(path=str(path), name="bomb"),))
    assert run_text_stages(tmp_path / "run", config, "bomb") == "refused"


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "url,caption,caption\nhttp://a.cn/1,窗台上的猫,窗台上的猫\n", encoding="utf-8"
    )
    tables = TablesConfig(kind="tables", tables=(TableSource(path=str(tmp_path / "a.csv"), name="a"),))
    assert run_text_stages(tmp_path / "run", tables, "header") == "refused"


def test_an_address_cannot_steer_the_terminal(tmp_path: Path) -> None:
    url = "http://a.cn/\x1b[2J\u202egpj.jpg"
    pl.DataFrame({"url": [url], "caption": ["窗台上的一只橘猫"]}).write_parquet(tmp_path / "a.parquet")
    tables = TablesConfig(kind="tables", tables=(TableSource(path=str(tmp_path / "a.parquet"), name="a"),))
    assert run_text_stages(tmp_path / "run", tables, "address") == "counted"
    lines = explain(Run(str(tmp_path / "run"), 0, "local", 1, ()), FilterTextConfig(), url)
    assert "http://a.cn/\\x1b[2J\\u202egpj.jpg" in lines[0]
    assert all(line.isprintable() for line in lines)
