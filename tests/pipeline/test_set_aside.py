"""A run without `[[evaluation]]`: validated and scored on the rows that `[split]` sets aside."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from eval.features.encoder import find_checkpoint
from eval.serve.gallery import galleries_of_run
from tests.helpers.own_corpus import cnclip, cnclip_of

NUM_IMAGES, NUM_SET_ASIDE = 40, 12
RECIPE = """
[run]
folder = "{root}/run"
processes = 1
[corpus]
kind = "tables"
[[corpus.tables]]
path = "{root}/captions.csv"
name = "mine"
picture_folder = "{root}/images"
[split]
count = {count}
[dedup]
partitions = 1
[model]
name = "tiny-vit"
[stage2]
epochs = 1
global_batch = 8
lanes = 2
choose = "best"
choose_on = ["validation"]
"""


def make_run(root: Path, count: int) -> None:
    random = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(NUM_IMAGES):
        pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 80), Image.Resampling.NEAREST).save(root / f"images/{number}.png")
    names = [f"{number}.png" for number in range(NUM_IMAGES)]
    captions = [f"第{number}只橘猫趴在窗台上" for number in range(NUM_IMAGES)]
    pl.DataFrame({"url": names, "caption": captions}).write_csv(root / "captions.csv")
    (root / "run.toml").write_text(RECIPE.format(root=root, count=count), encoding="utf-8")


@pytest.mark.slow
def test_the_model_is_chosen_and_scored_on_the_rows_set_aside(tmp_path: Path) -> None:
    make_run(tmp_path, NUM_SET_ASIDE)
    done = cnclip(tmp_path, "run")
    assert done.returncode == 0, done.stderr[-2000:]
    packed = [pl.read_parquet(path) for path in sorted((tmp_path / "run/validation").glob("*.parquet"))]
    assert sum(table.height for table in packed) == NUM_SET_ASIDE
    trained = [pl.read_parquet(path) for path in sorted((tmp_path / "run/shards").glob("*.parquet"))]
    assert not set(pl.concat(packed)["key"]) & set(pl.concat(trained)["key"])
    scores = json.loads((tmp_path / "run/retrieval/validation/stage2/validation.scores.json").read_text())
    assert scores["success"] is True
    predicted = (tmp_path / "run/retrieval/validation/stage2/validation.predictions.jsonl").read_text()
    assert len(predicted.splitlines()) == NUM_SET_ASIDE
    assert "validation" in (tmp_path / "run/report/report.html").read_text(encoding="utf-8")
    again = cnclip(tmp_path, "run")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert (tmp_path / "run/report.html").read_text() == (tmp_path / "run/report/report.html").read_text()
    for model in ("run.toml", "run/stage2/model.safetensors"):
        results = cnclip_of(tmp_path / model, "eval", "--out", str(tmp_path / "results"), "--json")
        assert results.returncode == 0, results.stderr
        (table,) = json.loads(results.stdout)["tables"]
        assert "validation" in table["title"]
    key = pl.concat(packed)["key"][0]
    told = cnclip(tmp_path, "why", key).stdout
    assert f"set aside by [split], never trained on: {tmp_path}/run/validation/" in told
    (gallery,) = galleries_of_run(find_checkpoint(str(tmp_path / "run"), None, None), "run")
    assert gallery.num_rows == NUM_SET_ASIDE


@pytest.mark.slow
def test_too_few_images_are_said_before_training(tmp_path: Path) -> None:
    make_run(tmp_path, 9)
    done = cnclip(tmp_path, "run")
    assert done.returncode == 1
    assert "9 images are too few for recall at 10; raise [split] share or count" in done.stderr
    assert not (tmp_path / "run/stage2/train.log").exists()
