"""Your own captions and images, and the errors for bad ones, through the command line."""

import json
import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest

from tests.helpers.own_corpus import cnclip, cnclip_here, make_own, write_evaluation


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


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the error, which is the only line next to the progress lines."""
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
    done = cnclip_here(own, "run")
    assert done.returncode == 1
    assert "captions.csv: no such file (source mine)" in one_line(done)


def test_empty_source(own: Path) -> None:
    (own / "captions.csv").write_text("url,caption\n")
    done = cnclip_here(own, "run")
    assert done.returncode == 1
    assert "captions.csv: no rows (source mine)" in one_line(done)


def test_missing_image_folder_is_found_before_the_first_task(own: Path) -> None:
    (own / "图片").rename(own / "moved")
    for command, status in (("plan", 2), ("run", 1)):
        done = cnclip_here(own, command)
        assert done.returncode == status
        assert "图片: no such folder (picture_folder of source mine); correct it in" in one_line(done)
    assert not (own / "run" / "corpus" / "receipts").exists()


def test_source_without_the_columns(own: Path) -> None:
    (own / "captions.csv").write_text("地址,说明\na,b\n")
    done = cnclip_here(own, "run")
    assert done.returncode == 1
    assert "found 地址, 说明; name it with url_column" in one_line(done)


def test_no_rows_left_names_the_rules(own: Path) -> None:
    done = cnclip_here(own, "run", "--set=filter_text.min_characters=40")
    assert done.returncode == 1
    assert "no rows left of 13 after filter_text (too_short removed 13)" in one_line(done)


def test_evaluation_set_without_files(own: Path) -> None:
    (own / "valid" / "valid_texts.jsonl").unlink()
    done = cnclip_here(own, "run")
    assert done.returncode == 1
    assert "valid_texts.jsonl: no such file" in one_line(done)


def test_evaluation_set_smaller_than_k(own: Path) -> None:
    shutil.rmtree(own / "valid")
    write_evaluation(own / "valid", own / "图片", 4)
    done = cnclip_here(own, "run")
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
    done = cnclip_here(packed, "run", *(f"--set={item}" for item in sets))
    assert done.returncode == 2
    assert "[stage2] ranks = 16, but the corpus has 12 samples" in one_line(done)


@pytest.mark.slow
def test_corrupted_tar_and_truncated_sidecar(packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(packed / "run", run)
    here = f"--set=run.folder={run}"
    tar, sidecar = run / "shards" / "00000.tar", run / "shards" / "00001.parquet"
    good = tar.read_bytes()
    tar.write_bytes(good[:512] + bytes(len(good) - 512))
    verified = cnclip(packed, "verify", here)
    assert verified.returncode == 1
    assert "00000.tar: bytes differ from what was written" in verified.stdout
    done = cnclip(packed, "run", here)
    assert done.returncode == 1
    assert "00000.tar" in one_line(done)
    tar.write_bytes(good)
    sidecar.write_bytes(sidecar.read_bytes()[:-100])
    done = cnclip(packed, "run", here)
    assert done.returncode == 1
    assert "00001.parquet" in one_line(done)
