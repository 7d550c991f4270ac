"""Your own captions and pictures, and what is said where they are bad: through the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

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


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return make_own(tmp_path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with its corpus done up to the vocabulary."""
    root = make_own(tmp_path_factory.mktemp("packed"))
    done = cnclip(root, "run", "--to", "vocabulary")
    assert done.returncode == 0, done.stderr
    return root


def make_own(tmp_path: Path) -> Path:
    """Twelve pictures with Chinese file names, a table, an evaluation set and a recipe."""
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


def cnclip(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", words[0], str(root / "run.toml"), *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error, which is the only line beside the progress lines."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_pictures_on_disk_become_shards(packed: Path) -> None:
    shards = [pl.read_parquet(path) for path in sorted((packed / "run" / "shards").glob("*.parquet"))]
    assert [shard.height for shard in shards] == [8, 4]
    dropped = json.loads((packed / "run" / "download" / "manifest.json").read_text())["dropped"]
    assert dropped == {"http_404": 1}  # the path that leads out of the folder


def test_missing_file(own: Path) -> None:
    (own / "captions.csv").unlink()
    done = cnclip(own, "run")
    assert done.returncode == 1
    assert "captions.csv: no such file (source mine)" in one_line(done)


def test_empty_source(own: Path) -> None:
    (own / "captions.csv").write_text("url,caption\n")
    done = cnclip(own, "run")
    assert done.returncode == 1
    assert "captions.csv: no rows (source mine)" in one_line(done)


def test_source_without_the_columns(own: Path) -> None:
    (own / "captions.csv").write_text("地址,说明\na,b\n")
    done = cnclip(own, "run")
    assert done.returncode == 1
    assert "found 地址, 说明; name it with url_column" in one_line(done)


def test_no_rows_left_names_the_rules(own: Path) -> None:
    done = cnclip(own, "run", "--set=filter_text.min_characters=40")
    assert done.returncode == 1
    assert "no rows left of 13 after filter_text (too_short removed 13)" in one_line(done)


def test_evaluation_set_without_files(own: Path) -> None:
    (own / "valid" / "valid_texts.jsonl").unlink()
    done = cnclip(own, "run")
    assert done.returncode == 1
    assert "valid_texts.jsonl: no such file" in one_line(done)


def test_evaluation_set_smaller_than_k(own: Path) -> None:
    shutil.rmtree(own / "valid")
    write_evaluation(own / "valid", own / "图片", 4)
    done = cnclip(own, "run")
    assert done.returncode == 1
    assert "4" in one_line(done)
    assert "10" in one_line(done)
    assert "valid" in one_line(done)


def test_more_ranks_than_samples(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed / "run", tmp_path / "run")
    sets = (
        f"run.folder={tmp_path}/run",
        "stage2.ranks=16",
        "stage2.lanes=16",
        "stage2.global_batch=16",
    )
    done = cnclip(packed, "run", *(f"--set={item}" for item in sets))
    assert done.returncode == 2
    assert "[stage2] ranks = 16, but the corpus has 12 samples" in one_line(done)


def test_corrupted_tar_and_truncated_sidecar(packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(packed / "run", run)
    here = f"--set=run.folder={run}"
    tar, sidecar = run / "shards" / "00000.tar", run / "shards" / "00001.parquet"
    good = tar.read_bytes()
    tar.write_bytes(good[:512] + bytes(len(good) - 512))
    verified = cnclip(packed, "verify", here)
    assert verified.returncode == 1
    assert "00000.tar: bytes differ from the manifest" in verified.stdout
    done = cnclip(packed, "run", here)
    assert done.returncode == 1
    assert "00000.tar" in one_line(done)
    tar.write_bytes(good)
    sidecar.write_bytes(sidecar.read_bytes()[:-100])
    done = cnclip(packed, "run", here)
    assert done.returncode == 1
    assert "00001.parquet" in one_line(done)
