"""A search page over a tiny run and an index over its shards, and requests to it."""

import http.client
import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from data_prep.formats.tar import TarWriter
from eval.datasets.cnclip_tsv import read_evaluation
from eval.features.encoder import EvaluationEncoder, ModelSource, load_encoder
from eval.features.evaluation_set import embed_evaluation
from eval.index.flat import build_index
from eval.serve.gallery import Gallery
from eval.serve.server import SearchServer
from pipeline.core.records import Manifest
from tests.helpers.evaluation_files import png_bytes, write_evaluation
from tests.helpers.tiny_model import write_tiny_model
from training.model.preprocess import preprocess

HOSTILE = '<img src=x onerror="window.hostile = 1"><script>window.hostile = 2</script>&lt;b&gt; \'"`猫'
NUM_IMAGES = 12
NUM_SAMPLES = 14
THEIRS = "a source & <b>theirs</b>"  # of samples 10 to 13, the others are `mine`


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


def write_run(folder: Path) -> None:
    """Write a model, vocabulary, an evaluation set, its features and index, as a run has them."""
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
    """Write two shards of 8 and 6 samples of two sources.

    Sample 4 has a hostile address, sample 5 a good one.
    """
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
                "source": ["mine" if row < 10 else THEIRS for row in samples],
                "url": [urls.get(row, "") for row in samples],
            }
        ).write_parquet(folder / f"{number:05d}.parquet")


def embed_shards(encoder: EvaluationEncoder, folder: Path) -> None:
    """Write features of the shards' images in reverse order, in two files; the last key is in no shard."""
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
    """Return (status, headers, body) of one request: a POST if there is a body."""
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
