"""`cnclip embed --shards`: rows, resuming after a kill, ranks, types, and what the folder is bound to."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from eval.index.partitioned import Embeddings
from pipeline import cli as command_line
from tests.helpers.evaluation_files import png_bytes, shard_key, write_shards
from tests.helpers.tiny_model import write_tiny_model
from training.encoder import load

SAMPLES = [(png_bytes(row), f"第{row}张图片") for row in range(22)]
NUM_SHARDS = 11  # two digits in the names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed_shards")
    write_tiny_model(folder)
    write_shards(folder / "shards", SAMPLES, per_shard=2)
    return folder


def words(folder: Path, out: Path, *more: str) -> list[str]:
    model = [str(folder / "model.safetensors"), "--vocab", str(folder / "vocab.txt")]
    return ["embed", *model, "--shards", str(folder / "shards"), "--out", str(out), *more]


def bytes_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The output of an undisturbed run."""
    assert command_line.main(words(folder, folder / "whole")) == 0
    return folder / "whole"


def test_rows_are_the_samples_in_the_layout_that_others_read(folder: Path, whole: Path) -> None:
    names = [f"{number:02d}" for number in range(NUM_SHARDS)]
    assert sorted(path.name for path in (whole / "img_emb").iterdir()) == [
        f"img_emb_{name}.npy" for name in names
    ]
    encoder = load(str(folder / "model.safetensors"), vocabulary=str(folder / "vocab.txt"))
    for side, expected in (
        ("img_emb", encoder.embed_images([data for data, _ in SAMPLES])),
        ("text_emb", encoder.embed_texts([caption for _, caption in SAMPLES])),
    ):
        found = np.concatenate([np.load(whole / side / f"{side}_{name}.npy") for name in names])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    metadata = pl.concat([pl.read_parquet(whole / "metadata" / f"metadata_{n}.parquet") for n in names])
    assert metadata.columns == ["key", "caption", "source", "url"]
    assert metadata["key"].to_list() == [shard_key(row) for row in range(22)]
    assert Embeddings.open(str(whole)).num_rows == 22


@pytest.mark.slow
def test_two_ranks_in_float16(folder: Path, whole: Path, tmp_path: Path) -> None:
    assert command_line.main(words(folder, tmp_path, "--ranks", "2", "--dtype", "float16")) == 0
    for number in range(NUM_SHARDS):
        name = f"img_emb/img_emb_{number:02d}.npy"
        half = np.load(tmp_path / name)
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, np.load(whole / name).astype(np.float16))


@pytest.mark.parametrize("ranks", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_killed_and_resumed_gives_the_same_bytes(
    folder: Path, whole: Path, tmp_path: Path, ranks: str
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipeline", *words(folder, out, "--ranks", ranks)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list(out.glob("metadata/*.parquet"))) < 2 and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sorted(path.name for path in out.glob("metadata/*.parquet"))
    assert 0 < len(done) < NUM_SHARDS, "the kill came too late to show anything"
    time.sleep(0.2)  # its ranks die with it
    times = {name: os.stat(out / "metadata" / name).st_mtime_ns for name in done}
    assert command_line.main(words(folder, out, "--ranks", ranks)) == 0
    assert {name: os.stat(out / "metadata" / name).st_mtime_ns for name in done} == times
    assert bytes_of(out) == bytes_of(whole)


def test_an_image_that_cannot_be_decoded_has_no_row(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [SAMPLES[0], (b"no image", "坏的图片"), SAMPLES[2], (b"nor this", "坏的图片"), (b"x", "坏")]
    write_shards(tmp_path / "shards", broken, per_shard=3)
    model = [str(folder / "model.safetensors"), "--vocab", str(folder / "vocab.txt")]
    out = tmp_path / "out"
    command = ["embed", *model, "--shards", str(tmp_path / "shards"), "--out", str(out)]
    assert command_line.main(command) == 0
    assert "3 images cannot be decoded and have no row" in capsys.readouterr().out
    for side in ("img_emb", "text_emb"):
        assert [len(np.load(out / side / f"{side}_{number}.npy")) for number in range(2)] == [2, 0]
    assert pl.read_parquet(out / "metadata" / "metadata_0.parquet")["key"].to_list() == [
        shard_key(0), shard_key(2)
    ]  # fmt: skip
    assert Embeddings.open(str(out)).num_rows == 2


def test_another_model_setting_or_corpus_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "shards", SAMPLES[:2], per_shard=2)
    rest = ["--shards", shards, "--out", str(tmp_path / "out")]
    assert command_line.main(words(folder, tmp_path, *rest)) == 0
    assert command_line.main(words(folder, tmp_path, *rest, "--dtype", "float16")) == 2
    assert command_line.main(words(folder, tmp_path, *rest, "--context", "20")) == 2
    assert command_line.main(words(folder, tmp_path, *rest, "--precision", "bf16")) == 2
    other = tmp_path / "other"
    other.mkdir()
    weights, vocabulary = write_tiny_model(other, seed=1)
    command = ["embed", weights, "--vocab", vocabulary, *rest]
    assert command_line.main(command) == 2
    errors = capsys.readouterr().err.splitlines()
    assert sum("holds features of another model, setting or corpus" in line for line in errors) == 4
    exact_ND = np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy")
    assert command_line.main(words(folder, tmp_path, *rest, "--precision", "bf16", "--redo")) == 0
    rounded_ND = np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy")
    assert 1e-5 < np.abs(rounded_ND - exact_ND).max() < 0.02
    assert command_line.main([*command, "--redo"]) == 0
    assert json.loads((tmp_path / "out" / "model.json").read_text())["name"] == "tiny-vit"


def test_wrong_usage_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert command_line.main(words(folder, out, "--images", str(folder))) == 2
    assert command_line.main(words(folder, out, "--ranks", "0")) == 2
    assert command_line.main(words(folder, out, "--context", "2")) == 2
    empty = words(folder, out)
    empty[empty.index("--shards") + 1] = str(tmp_path)
    assert command_line.main(empty) == 1
    assert capsys.readouterr().err.count("\n") == 4


@pytest.mark.slow
def test_a_failed_rank_fails_the_command(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "shards", SAMPLES, per_shard=2)
    (tmp_path / "shards" / "00003.tar").write_bytes(b"cut")
    command = words(folder, tmp_path / "out", "--ranks", "2")
    command[command.index("--shards") + 1] = str(tmp_path / "shards")
    assert command_line.main(command) == 1
    errors = capfd.readouterr().err
    assert "rank 1: " in errors
    assert f"00003.tar: ends inside {shard_key(6)}" in errors
    assert "rerun the same command to resume" in errors
