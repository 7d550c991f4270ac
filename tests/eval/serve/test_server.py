"""The search page over real HTTP, on a tiny run and on an index over its shards."""

import dataclasses
import http.client
import io
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from eval.features.encoder import load_encoder
from eval.serve.access import loopback_names
from eval.serve.gallery import open_gallery
from eval.serve.server import Searcher, SearchServer
from pipeline import cli as command_line
from pipeline.core.records import InputError
from pipeline.core.shard_format import MAX_IMAGE_BYTES
from tests.helpers.encoded_images import png16
from tests.helpers.evaluation_files import png_bytes
from tests.helpers.search_site import (
    HOSTILE,
    NUM_IMAGES,
    NUM_SAMPLES,
    Site,
    ask,
    key_of,
    results,
)


def test_a_text_finds_what_its_feature_is_nearest_to(site: Site) -> None:
    found = results(site, q="红色的猫", k=NUM_IMAGES + 5)
    image_ND = np.load(site.folder / "run/embed/small/stage1/img_emb/img_emb_0.npy")
    scores = image_ND.astype(np.float64) @ site.encoder.texts(["红色的猫"])[0].astype(np.float64)
    assert [item["row"] for item in found] == np.argsort(-scores).tolist()
    assert [item["score"] for item in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    by_row = {item["row"]: item for item in found}
    assert by_row[2]["captions"] == ["第2张图片"]
    assert by_row[2]["source"] == "small, image 102"
    assert by_row[3]["captions"] == ["第3张图片", HOSTILE]
    assert by_row[4]["captions"][1] == "长" * 499 + "…"
    assert [item["row"] for item in results(site, q="红色的猫", k=3)] == np.argsort(-scores)[:3].tolist()


def test_an_image_finds_itself_in_a_set_and_in_shards(site: Site) -> None:
    found = results(site, png_bytes(7), k=2)
    assert (found[0]["row"], found[0]["source"]) == (7, "small, image 107")
    assert found[0]["score"] == pytest.approx(1.0, abs=1e-5)
    found = results(site, png_bytes(100 + 9), k=1, gallery=1)
    assert found[0]["row"] == NUM_SAMPLES - 1 - 9
    assert found[0]["captions"] == ["样本9"]
    assert found[0]["source"] == f"mine, shard 00001, {key_of(9)}"
    found = results(site, png_bytes(100), k=1, gallery=1)
    assert (found[0]["captions"], found[0]["source"]) == ([], "not in these shards")


def test_an_image_is_turned_as_its_tag_says(site: Site) -> None:
    upright = Image.fromarray(np.arange(40 * 20 * 3, dtype=np.uint8).reshape(40, 20, 3))
    turned, plain = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    upright.save(plain, "PNG")
    assert results(site, turned.getvalue()) == results(site, plain.getvalue())


@pytest.mark.parametrize(("gallery", "row", "seed"), [(0, 5, 5), (1, 0, 113), (1, 12, 101)])
def test_images_come_encoded_anew(site: Site, gallery: int, row: int, seed: int) -> None:
    status, headers, data = ask(site, f"/picture?gallery={gallery}&row={row}")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(png_bytes(seed))) as original:
        assert image.size == original.size
        error = np.asarray(image, dtype=np.float64) - np.asarray(original, dtype=np.float64)
    assert np.abs(error).mean() < 8  # an image of other blocks is off by some 85


def test_the_least_score_can_leave_nothing(site: Site) -> None:
    assert results(site, q="猫", min_score=1) == []
    best = results(site, q="猫")[0]["score"]
    kept = results(site, q="猫", min_score=best - 1e-5)
    assert 1 <= len(kept) < NUM_IMAGES
    assert all(item["score"] >= best - 1e-5 for item in kept)


def test_a_cut_text_is_said(site: Site) -> None:
    _, _, data = ask(site, f"/api/search?q={urllib.parse.quote('猫' * 60)}")
    assert json.loads(data)["note"] == "only the first 50 word pieces were used"
    assert json.loads(ask(site, f"/api/search?q={urllib.parse.quote('猫' * 50)}")[2])["note"] == ""


def bomb() -> bytes:
    """A PNG of some hundred bytes whose header promises 90,000 × 90,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 90_000, 90_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def above_the_limit() -> bytes:
    file = io.BytesIO()
    Image.new("1", (10_001, 10_001)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (bomb(), "pixel_limit"),
        (above_the_limit(), "pixel_limit: 10001 x 10001 pixels, 100000000 allowed"),
        (png_bytes(1)[:60], "truncated"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format:svg"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "format:eps"),
    ],
)
def test_what_is_no_image_for_us_is_refused(site: Site, body: bytes, said: str) -> None:
    status, _, data = ask(site, "/api/search", body)
    assert status == 415
    assert said in json.loads(data)["error"]


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/api/search", 400, "type a text"),
        ("/api/search?q=%20%E3%80%80", 400, "type a text"),
        (f"/api/search?q={'a' * 1001}", 400, "at most 1000 characters"),
        ("/api/search?q=a&k=0", 400, "k must be a whole number from 1 to 200"),
        ("/api/search?q=a&k=201", 400, "k must be"),
        ("/api/search?q=a&k=%C2%B2", 400, "k must be"),
        ("/api/search?q=a&gallery=2", 400, "gallery must be a whole number from 0 to 1"),
        ("/api/search?q=a&min_score=nan", 400, "min_score must be"),
        ("/picture?gallery=0&row=12", 400, "row must be a whole number from 0 to 11"),
        ("/picture?gallery=0&row=../../run.toml", 400, "row must be"),
        ("/picture?gallery=0", 400, "row must be"),
        ("/../run.toml", 404, "no such page"),
        ("/run/stage1/model.safetensors", 404, "no such page"),
        ("/api/search?" + "&".join(f"a{i}=1" for i in range(20)), 400, "too many fields"),
        ("/picture?gallery=1&row=13", 500, "the gallery is damaged"),
    ],
)
def test_requests_that_are_refused(site: Site, path: str, status: int, said: str) -> None:
    found, headers, data = ask(site, path)
    assert (found, said in json.loads(data)["error"]) == (status, True)
    assert str(site.folder) not in data.decode()
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_body_is_limited_before_it_is_read(site: Site) -> None:
    status, _, data = ask(site, "/api/search", bytes(MAX_IMAGE_BYTES + 1))
    assert (status, json.loads(data)["error"]) == (413, "more than 64 MiB, the most that an image may have")
    connection = http.client.HTTPConnection("127.0.0.1", site.server.server_port, timeout=30)
    connection.putrequest("POST", "/api/search")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413  # though nothing of it has come
    connection.close()
    assert ask(site, "/api/search", b"x", {"Transfer-Encoding": "chunked"})[0] == 411
    assert ask(site, "/api/search", b"")[0] == 400
    assert ask(site, "/api/about", b"x")[0] == 404


def test_other_names_and_other_sites_are_refused(site: Site) -> None:
    port = site.server.server_port
    assert site.server.socket.getsockname()[0] == "127.0.0.1"
    assert site.server.is_local
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "LOCALHOST", f"[::1]:{port}"):
        assert ask(site, "/api/about", headers={"Host": host})[0] == 200
    for host in (f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert ask(site, "/api/about", headers={"Host": host})[0] == 403
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
        assert ask(site, "/api/search", png_bytes(1), {"Origin": origin})[0] == 403
    assert ask(site, "/api/search", png_bytes(1), {"Origin": f"http://127.0.0.1:{port}"})[0] == 200


def test_many_at_once_get_their_own_answers(site: Site) -> None:
    found = dict[int, int]()

    def search(seed: int) -> None:
        found[seed] = results(site, png_bytes(seed))[0]["row"]

    threads = [threading.Thread(target=search, args=(seed,)) for seed in range(NUM_IMAGES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: seed for seed in range(NUM_IMAGES)}


def test_a_broken_image_is_said_without_its_path(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(site.folder / "run" / "shards", tmp_path / "shards")
    gallery = open_gallery(
        site.index_of_shards,
        embeddings_folder=site.features_of_shards,
        images_folder=str(tmp_path / "shards"),
    )
    tar = tmp_path / "shards" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:520])
    with SearchServer(Searcher(site.encoder, [gallery]), port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.url}picture?gallery=0&row=5")
        body = caught.value.read().decode()
        server.shutdown()
    assert "the gallery is damaged" in body
    assert str(tmp_path) not in body
    assert f"00001.tar: ends inside {key_of(8)}.jpg" in capsys.readouterr().err


def test_the_command_serves_and_stops(site: Site) -> None:
    words = [sys.executable, "-m", "pipeline", "serve", str(site.recipe), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)  \(Ctrl-C stops\)\n", line)
        assert found is not None, line + process.stderr.read()
        with urllib.request.urlopen(f"{found[1]}api/about") as answer:
            about = json.load(answer)
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
        assert process.wait(timeout=30) == 0
    assert about["galleries"] == [{"name": "small", "rows": NUM_IMAGES, "sources": []}]
    assert error.endswith("stopped\n")


def test_bad_usage(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lone = [str(site.folder / "model.safetensors"), "--vocab", str(site.folder / "vocab.txt")]
    assert command_line.main(["serve", *lone]) == 2
    assert "a single weights file has no index; give --index FOLDER" in capsys.readouterr().err
    assert command_line.main(["serve", str(site.recipe), "--pictures", "x"]) == 2
    assert "--images needs --index FOLDER" in capsys.readouterr().err
    shutil.copytree(site.folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("index"))
    recipe = tmp_path / "run.toml"
    recipe.write_text(f'[run]\nfolder = "{tmp_path}/run"\n[model]\nname = "tiny-vit"\n', encoding="utf-8")
    assert command_line.main(["serve", str(recipe)]) == 1
    assert "the run has not indexed stage1; run `cnclip run" in capsys.readouterr().err
    assert command_line.main(["serve", str(site.recipe), "--port", "70000"]) == 2
    assert "port 70000" in capsys.readouterr().err


def test_an_address_that_others_reach_is_not_local() -> None:
    assert loopback_names("0.0.0.0") is None
    assert loopback_names("pictures.example") is None
    names = loopback_names("127.0.0.2")
    assert names is not None
    assert "127.0.0.2" in names


def test_an_idle_connection_does_not_keep_it_from_stopping(site: Site) -> None:
    server = SearchServer(Searcher(site.encoder, []), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.create_connection(("127.0.0.1", server.server_port)) as idle:
        idle.sendall(b"GET /api/about HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert idle.recv(1000).startswith(b"HTTP/1.1 ")
        server.shutdown()
        started = time.monotonic()
        server.server_close()  # waits for its threads, of which one waits for the next request
        assert time.monotonic() - started < 5


def test_a_query_by_an_odd_file_finds_itself(site: Site, tmp_path: Path) -> None:
    """What `embed` saw of a file is what the page sees of it: turned by EXIF, of 16 bits, transparent."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise = np.random.default_rng(1).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(noise[..., :3]).save(tmp_path / "images" / "turned.jpg", exif=exif)
    Image.fromarray(noise).save(tmp_path / "images" / "transparent.png")
    (tmp_path / "images" / "deep.png").write_bytes(png16(noise[..., 0].astype(np.uint16) * 257, 0))
    names = ["deep.png", "transparent.png", "turned.jpg"]
    for decode in ("upright", "reference"):
        features, index = str(tmp_path / decode), str(tmp_path / f"{decode}.index")
        words = ["--images", str(tmp_path / "images"), "--out", features, "--decode", decode]
        assert command_line.main(["embed", str(site.recipe), *words]) == 0
        assert command_line.main(["index", features, index]) == 0
        gallery = open_gallery(index, embeddings_folder=features, images_folder="/")
        searcher = Searcher(load_encoder(dataclasses.replace(site.checkpoint, decode=decode)), [gallery])
        for row, name in enumerate(names):
            query = searcher.image_feature((tmp_path / "images" / name).read_bytes())
            found = dict(gallery.nearest(query, 3).pairs)
            assert found[row] > 0.99999
        other = dataclasses.replace(site.checkpoint, decode={"upright": "reference"}.get(decode, "upright"))
        with pytest.raises(InputError, match="decoded as `--decode"):
            Searcher(load_encoder(other), [gallery])
