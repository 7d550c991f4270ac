"""A corpus of a user's own images, through the command line."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from pipeline.cli import main

RECIPE = """
[run]
folder = "{root}/run"
processes = 1
[corpus]
kind = "tables"
[[corpus.tables]]
path = "{root}/captions.csv"
name = "mine"
picture_folder = "{root}/图片"
[[evaluation]]
name = "valid"
folder = "{root}/valid"
[filter_image]
remove_evaluation_copies = false
[dedup]
partitions = 1
[shards]
samples_per_shard = 8
[model]
name = "tiny-rn"
[stage2]
epochs = 1
global_batch = 8
lanes = 2
"""


def make_own(tmp_path: Path) -> Path:
    """Write twelve images with Chinese file names, a table, an evaluation set and a recipe."""
    random = np.random.default_rng(0)
    folder = tmp_path / "图片"
    folder.mkdir()
    for number in range(12):
        pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(folder / f"猫 {number}.png")
    rows = {
        "url": [f"猫 {number}.png" for number in range(12)] + ["../captions.csv"],
        "caption": [f"第{number}只橘猫趴在窗台上" for number in range(13)],
    }
    pl.DataFrame(rows).write_csv(tmp_path / "captions.csv")
    write_evaluation(tmp_path / "valid", folder, 12)
    (tmp_path / "run.toml").write_text(RECIPE.format(root=tmp_path), encoding="utf-8")
    return tmp_path


def write_evaluation(out: Path, pictures: Path, count: int) -> None:
    import base64

    out.mkdir()
    files = sorted(pictures.iterdir())[:count]
    lines = [f"{i}\t{base64.b64encode(file.read_bytes()).decode()}\n" for i, file in enumerate(files)]
    (out / "valid_imgs.tsv").write_text("".join(lines))
    texts = [{"text_id": i, "text": f"猫{i}", "image_ids": [i]} for i in range(count)]
    (out / "valid_texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


def cnclip_here(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return main_here(words[0], str(root / "run.toml"), *words[1:])


def main_here(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has imported everything already."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    return subprocess.CompletedProcess(words, status, *texts)


def cnclip(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return cnclip_of(root / "run.toml", *words)


def cnclip_of(target: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", words[0], str(target), *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
