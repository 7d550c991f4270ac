"""The search page over real HTTP, on a tiny run and on an index over its shards, and in Chromium."""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import ExifTags, Image

from data_prep.formats.tar import TarWriter
from eval.datasets.cnclip_tsv import read_evaluation
from eval.features.encoder import EvaluationEncoder, ModelSource, find_checkpoint, load_encoder
from eval.features.evaluation_set import embed_evaluation
from eval.index.flat import build_index
from eval.index.partitioned import Embeddings, build_parts
from eval.serve.access import loopback_names
from eval.serve.gallery import EvaluationImages, Gallery, galleries_of_run, open_gallery
from eval.serve.server import Searcher, SearchServer
from pipeline import cli as command_line
from pipeline.core.records import ConfigError, InputError, Manifest
from pipeline.core.shard_format import MAX_IMAGE_BYTES
from tests.helpers.chromium import CHROMIUM, Chromium
from tests.helpers.encoded_images import png16
from tests.helpers.evaluation_files import png_bytes, write_evaluation
from tests.helpers.tiny_model import write_tiny_model
from training.model.preprocess import preprocess

HOSTILE = '<img src=x onerror="window.hostile = 1"><script>window.hostile = 2</script>&lt;b&gt; \'"`猫'
NUM_IMAGES = 12
NUM_SAMPLES = 14


def key_of(sample: int) -> str:
    return f"{sample * 7919 % 104729:032x}"


@dataclass(frozen=True)
class Site:
    """A served run: gallery 0 is its evaluation set `small`, gallery 1 an index over its shards."""

    folder: Path
    recipe: Path
    checkpoint: ModelSource
    encoder: EvaluationEncoder
    galleries: tuple[Gallery, ...]
    server: SearchServer

    @property
    def index_of_shards(self) -> str:
        return str(self.folder / "shards.index")

    @property
    def features_of_shards(self) -> str:
        return str(self.folder / "features")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("serve")
    write_run(folder)
    write_shards(folder / "run" / "shards")
    recipe = folder / "run.toml"
    recipe.write_text(f'[run]\nfolder = "{folder}/run"\n[model]\nname = "tiny-vit"\n', encoding="utf-8")
    checkpoint = find_checkpoint(str(recipe), None, None)
    encoder = load_encoder(checkpoint)
    embed_shards(encoder, folder / "features")
    embeddings = Embeddings.open(str(folder / "features"))
    build_parts(embeddings, str(folder / "shards.index"), factory="Flat", rows_per_part=5, train_rows=14)
    of_shards = open_gallery(
        str(folder / "shards.index"),
        embeddings_folder=str(folder / "features"),
        run_folder=checkpoint.run_folder,
    )
    galleries = (*galleries_of_run(checkpoint, str(recipe)), of_shards)
    with SearchServer(Searcher(encoder, galleries), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Site(folder, recipe, checkpoint, encoder, galleries, server)
        server.shutdown()
        thread.join()


def write_run(folder: Path) -> None:
    """Model, vocabulary, an evaluation set, its features and index, where a run has them."""
    run = folder / "run"
    write_tiny_model(folder)
    for name in ("stage1", "vocabulary", "corpus"):
        (run / name).mkdir(parents=True)
    shutil.copy(folder / "model.safetensors", run / "stage1" / "model.safetensors")
    shutil.copy(folder / "vocab.txt", run / "vocabulary" / "caption.txt")
    images = {100 + row: png_bytes(row) for row in range(NUM_IMAGES)}
    texts = [(row, f"第{row}张图片", [100 + row]) for row in range(NUM_IMAGES)]
    texts += [(50, HOSTILE, [103]), (51, "长" * 2000, [104])]
    evaluation = write_evaluation(run / "corpus" / "small", "small", images, texts)
    extra = {"0": {"evaluations": {"small": "small"}, "own_evaluations": {}}}
    manifest = Manifest("corpus", 1, "", "", {}, (), 0, 0, {}, extra)
    (run / "corpus" / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    features = run / "embed" / "small" / "stage1"
    model = str(run / "stage1" / "model.safetensors")
    source = ModelSource(model, str(folder / "vocab.txt"), 52)
    embed_evaluation(load_encoder(source), read_evaluation(evaluation, "small"), str(features))
    index = run / "index" / "small" / "stage1" / "image.index"
    build_index(str(features / "img_emb" / "img_emb_0.npy"), str(index))


def write_shards(folder: Path) -> None:
    """Two shards of 8 and 6 samples; sample 4 has a hostile address, sample 5 a good one."""
    folder.mkdir()
    urls = {4: "javascript:window.hostile=3", 5: "https://pictures.example/5?a=b&c=<d>"}
    for number, samples in enumerate((range(8), range(8, NUM_SAMPLES))):
        with TarWriter(str(folder / f"{number:05d}.tar")) as tar:
            places = [tar.add(f"{key_of(row)}.jpg", png_bytes(100 + row)) for row in samples]
        pl.DataFrame(
            {
                "key": [key_of(row) for row in samples],
                "offset_bytes": [place.offset_bytes for place in places],
                "size_bytes": [place.size_bytes for place in places],
                "caption": [f"样本{row}" for row in samples],
                "source": ["mine"] * len(samples),
                "url": [urls.get(row, "") for row in samples],
            }
        ).write_parquet(folder / f"{number:05d}.parquet")


def embed_shards(encoder: EvaluationEncoder, folder: Path) -> None:
    """Features of the shards' images in reverse order, in two files; the last key is in no shard."""
    order = list(reversed(range(NUM_SAMPLES)))
    with torch.inference_mode():
        image_BCHW = preprocess([png_bytes(100 + row) for row in order], 32)
        feature_ND = encoder.base.model.encode_image(image_BCHW).numpy()
    keys = [key_of(row) for row in order[:-1]] + ["nowhere"]
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, part in enumerate((slice(0, 9), slice(9, NUM_SAMPLES))):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", feature_ND[part])
        pl.DataFrame({"key": keys[part]}).write_parquet(folder / "metadata" / f"metadata_{number}.parquet")


def ask(
    site: Site, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request: a POST where there is a body."""
    connection = http.client.HTTPConnection("127.0.0.1", site.server.server_port, timeout=30)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def results(site: Site, body: bytes | None = None, **fields: object) -> list[dict[str, Any]]:
    status, _, data = ask(site, f"/api/search?{urllib.parse.urlencode(fields)}", body)
    assert status == 200, data
    found: list[dict[str, Any]] = json.loads(data)["results"]
    return found


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
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
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


def test_what_does_not_belong_together_is_refused(site: Site, tmp_path: Path) -> None:
    shards = {"embeddings_folder": site.features_of_shards, "run_folder": site.checkpoint.run_folder}
    with pytest.raises(InputError, match=r"holds no metadata_0\.parquet; give --embeddings"):
        open_gallery(site.index_of_shards, run_folder=site.checkpoint.run_folder)
    with pytest.raises(InputError, match=r"index\.json: no such file"):
        open_gallery(str(tmp_path), **shards)
    with pytest.raises(ConfigError, match="give --pictures FOLDER"):
        open_gallery(site.index_of_shards, embeddings_folder=site.features_of_shards)
    with pytest.raises(InputError, match="holds no shards"):
        open_gallery(site.index_of_shards, **shards, images_folder=str(tmp_path))

    (tmp_path / "metadata").mkdir()
    metadata = tmp_path / "metadata" / "metadata_0.parquet"
    pl.DataFrame({"path": ["/etc/passwd"] * NUM_SAMPLES}).write_parquet(metadata)
    with pytest.raises(
        InputError, match="has no column key or image_id or image_path to find images by; found: path"
    ):
        open_gallery(site.index_of_shards, embeddings_folder=str(tmp_path), run_folder="run")
    pl.DataFrame({"key": ["other"] * NUM_SAMPLES}).write_parquet(metadata)
    with pytest.raises(InputError, match="none of the index's 14 keys is in these shards"):
        open_gallery(site.index_of_shards, **{**shards, "embeddings_folder": str(tmp_path)})
    pl.DataFrame({"key": [key_of(1)] * 3}).write_parquet(metadata)
    with pytest.raises(InputError, match="holds 14 rows, but the metadata has 3"):
        open_gallery(site.index_of_shards, **{**shards, "embeddings_folder": str(tmp_path)})

    with pytest.raises(ConfigError, match="search parameters 'nprobe=4'"):
        open_gallery(site.index_of_shards, **shards, parameters="nprobe=4")
    shutil.copytree(site.index_of_shards, tmp_path / "index")
    part = tmp_path / "index" / "parts" / "00001.index"
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(InputError, match=r"00001\.index: not a readable FAISS index"):
        open_gallery(str(tmp_path / "index"), **shards)

    images = site.galleries[0].images
    narrow = Gallery("narrow", 5, NUM_IMAGES, images, site.galleries[0].search)
    with pytest.raises(InputError, match="narrow: an index of width 5, but tiny-vit gives"):
        Searcher(site.encoder, [narrow])
    with pytest.raises(ConfigError, match="give another --host or --port"):
        SearchServer(Searcher(site.encoder, site.galleries), port=site.server.server_port)


def test_ids_that_fit_two_sets_are_asked_about(site: Site, tmp_path: Path) -> None:
    images = {100 + row: png_bytes(row) for row in range(NUM_IMAGES)}
    for name in ("one", "two"):
        write_evaluation(tmp_path / "sets" / name, name, images, [(0, "图", [100])])
    write_evaluation(tmp_path / "sets" / "more", "more", {**images, 1: png_bytes(99)}, [(0, "图", [100])])
    features = str(site.folder / "run" / "embed" / "small" / "stage1")
    build_parts(
        Embeddings.open(features), str(tmp_path / "index"), factory="HNSW8", rows_per_part=100, train_rows=12
    )
    where = {"embeddings_folder": features, "images_folder": str(tmp_path / "sets")}
    with pytest.raises(ConfigError, match="fit one, two alike"):
        open_gallery(str(tmp_path / "index"), **where)
    shutil.rmtree(tmp_path / "sets" / "two")
    gallery = open_gallery(str(tmp_path / "index"), **where)
    assert isinstance(gallery.images, EvaluationImages)
    assert gallery.images.evaluation.name == "one"
    assert gallery.nearest(np.load(f"{features}/img_emb/img_emb_0.npy")[4], 3)[0][0] == 4


def test_rows_that_an_index_does_not_find_are_left_out(site: Site) -> None:
    rows, scores = np.array([[3, -1, -1]]), np.array([[0.5, -np.inf, -np.inf]])
    gallery = Gallery("ivf", 32, 12, site.galleries[0].images, lambda query, k: (scores, rows))
    assert gallery.nearest(np.zeros(32, dtype=np.float32), 3) == [(3, 0.5)]


def test_an_index_over_files_shows_them(site: Site, tmp_path: Path) -> None:
    """What `cnclip embed --images` wrote, with more texts than images; one file is gone meanwhile."""
    for row in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{row}.png").write_bytes(png_bytes(row))
    captions = [f"第{row}张图片" for row in range(6)]
    (tmp_path / "captions.txt").write_text("\n".join(captions), encoding="utf-8")
    model = [site.checkpoint.path, "--vocab", str(site.checkpoint.vocabulary)]
    features, index = str(tmp_path / "features"), str(tmp_path / "index")
    inputs = ["--images", str(tmp_path / "images"), "--texts", str(tmp_path / "captions.txt")]
    assert command_line.main(["embed", *model, *inputs, "--out", features]) == 0
    assert command_line.main(["index", features, index]) == 0
    gallery = open_gallery(index, embeddings_folder=features, images_folder=str(tmp_path / "images"))
    assert gallery.num_rows == 4
    elsewhere = open_gallery(index, embeddings_folder=features, images_folder=str(tmp_path / "index"))
    with pytest.raises(InputError, match=r"0\.png: lies outside"):
        elsewhere.images.read(0)
    query = site.encoder.image(png_bytes(2))
    (row, score), *_ = gallery.nearest(query, 4)
    assert (row, round(score, 4)) == (2, 1.0)
    assert gallery.images.describe(2).captions == (captions[2],)
    assert gallery.images.describe(2).source == "2.png"
    assert gallery.images.read(2) == png_bytes(2)
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(InputError, match=r"3\.png: cannot be read"):
        gallery.images.read(3)


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
    assert about["galleries"] == [{"name": "small", "rows": NUM_IMAGES}]
    assert error.endswith("stopped\n")


def test_bad_usage(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lone = [str(site.folder / "model.safetensors"), "--vocab", str(site.folder / "vocab.txt")]
    assert command_line.main(["serve", *lone]) == 2
    assert "a lone file has no index; give --index FOLDER" in capsys.readouterr().err
    assert command_line.main(["serve", str(site.recipe), "--pictures", "x"]) == 2
    assert "--pictures goes with --index FOLDER" in capsys.readouterr().err
    shutil.copytree(site.folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("index"))
    recipe = tmp_path / "run.toml"
    recipe.write_text(f'[run]\nfolder = "{tmp_path}/run"\n[model]\nname = "tiny-vit"\n', encoding="utf-8")
    assert command_line.main(["serve", str(recipe)]) == 1
    assert "the run has not indexed stage1; first give: cnclip run" in capsys.readouterr().err
    assert command_line.main(["serve", str(site.recipe), "--port", "70000"]) == 2
    assert "port 70000" in capsys.readouterr().err


def test_an_address_that_others_reach_is_not_local() -> None:
    assert loopback_names("0.0.0.0") is None
    assert loopback_names("pictures.example") is None
    names = loopback_names("127.0.0.2")
    assert names is not None
    assert "127.0.0.2" in names


# ---- in a browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

CARDS = "document.querySelectorAll('#results li')"
STATUS = "document.getElementById('status').textContent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        browser.send("Page.enable")
        yield browser


def visit(browser: Chromium, site: Site, fragment: str = "") -> None:
    browser.send("Page.navigate", url="about:blank")  # a new fragment alone would not load the page again
    browser.send("Page.navigate", url=f"{site.server.url}{fragment}")
    browser.wait("document.readyState === 'complete' && document.getElementById('about')?.textContent")


def all_images_shown(browser: Chromium) -> bool:
    browser.wait("[...document.images].every((image) => image.complete)")
    return bool(browser.evaluate(f"[...{CARDS}].every((card) => card.querySelector('img').naturalWidth > 0)"))


@needs_chromium
def test_typing_shows_images_with_scores_captions_and_sources(browser: Chromium, site: Site) -> None:
    visit(browser, site)
    browser.type("红色的猫")
    assert browser.wait(f"{CARDS}.length") == NUM_IMAGES
    shown = browser.evaluate(f"[...{CARDS}].map((card) => card.innerText)")
    for text, item in zip(shown, results(site, q="红色的猫"), strict=True):
        assert f"{item['score']:.3f}" in text
        assert item["captions"][0] in text
        assert item["source"] in text
    assert browser.evaluate(STATUS) == "12 images, nearest first"
    browser.evaluate(f"[...{CARDS}].forEach((card) => {{ card.querySelector('img').loading = 'eager' }})")
    assert all_images_shown(browser)
    assert urllib.parse.unquote(browser.evaluate("location.hash")) == "#q=红色的猫&gallery=small"
    assert (
        browser.evaluate(f"getComputedStyle({CARDS}[0]).borderTopLeftRadius") == "12px"
    )  # our style applies


@needs_chromium
def test_captions_and_addresses_are_shown_as_text(browser: Chromium, site: Site) -> None:
    visit(browser, site, "#q=%E7%8C%AB")
    browser.wait(f"{CARDS}.length")
    captions = browser.evaluate("[...document.querySelectorAll('.caption')].map((line) => line.textContent)")
    assert HOSTILE in captions
    visit(browser, site, "#q=%E7%8C%AB&gallery=shards.index")
    assert browser.wait(f"{CARDS}.length") == NUM_SAMPLES
    links = browser.evaluate("[...document.querySelectorAll('#results a')].map((link) => link.href)")
    assert links == ["https://pictures.example/5?a=b&c=%3Cd%3E"]
    assert "javascript:window.hostile=3" in browser.evaluate("document.getElementById('results').innerText")
    assert browser.evaluate("document.querySelectorAll('#results script, #results .caption *').length") == 0
    assert browser.evaluate("typeof window.hostile") == "undefined"


@needs_chromium
def test_an_image_is_chosen_or_dropped(browser: Chromium, site: Site, tmp_path: Path) -> None:
    for seed in (6, 9):
        (tmp_path / f"{seed}.png").write_bytes(png_bytes(seed))
    visit(browser, site)
    root = browser.send("DOM.getDocument")["root"]["nodeId"]
    node = browser.send("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.send("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "6.png")])
    browser.wait(f"{CARDS}[0]?.innerText.includes('small, image 106')")
    assert "1.000" in browser.evaluate(f"{CARDS}[0].innerText")
    assert browser.wait("document.getElementById('preview').naturalWidth") == 20
    browser.drop(str(tmp_path / "9.png"), 300, 300)
    browser.wait(f"{CARDS}[0]?.innerText.includes('small, image 109')")
    (tmp_path / "no.png").write_bytes(b"no image")
    browser.drop(str(tmp_path / "no.png"), 300, 300)
    browser.wait(f"{STATUS}.includes('unsupported image')")
    assert browser.evaluate(f"{CARDS}.length") == 0


@needs_chromium
def test_nothing_found_and_nothing_asked(browser: Chromium, site: Site) -> None:
    visit(browser, site, "#q=%E7%8C%AB&least=1")
    browser.wait(f"{STATUS} === 'nothing found'")
    assert browser.evaluate(f"{CARDS}.length") == 0
    visit(browser, site)
    browser.type("")
    browser.wait(f"{STATUS} === 'type a text or give an image'")


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
            found = dict(gallery.nearest(query, 3))
            assert found[row] > 0.99999
        other = dataclasses.replace(site.checkpoint, decode={"upright": "reference"}.get(decode, "upright"))
        with pytest.raises(InputError, match="decoded as `--decode"):
            Searcher(load_encoder(other), [gallery])
