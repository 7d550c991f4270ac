"""`cnclip init` writes a run that `plan` accepts without a note, for data of any form."""

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core.run import read_manifest
from pipeline.tools.new_run import choose_training
from pipeline.tools.survey_data import Machine, look_at_data
from tests.helpers.own_corpus import write_evaluation

NUM_IMAGES = 80
CAPTIONS = [f"第{number}只橘猫趴在窗台上" for number in range(NUM_IMAGES)]


def write_images(folder: Path, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(folder / f"猫 {number}.png")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tables: paths with images next to them, URLs as in LAION-5B, and other names of columns."""
    world = tmp_path_factory.mktemp("world")
    write_images(world / "own" / "images", NUM_IMAGES, 0)
    write_images(world / "others", 12, 1)
    write_evaluation(world / "valid", world / "others", 12)
    paths = [f"猫 {number}.png" for number in range(NUM_IMAGES)]
    urls = [f"https://example.com/{number}" for number in range(NUM_IMAGES)]
    pl.DataFrame({"url": paths, "caption": CAPTIONS}).write_csv(world / "own" / "captions.csv")
    laion = pl.DataFrame({"URL": urls, "TEXT": CAPTIONS, "similarity": [0.3] * NUM_IMAGES})
    for part in range(2):
        laion[part * 40 : part * 40 + 40].write_parquet(world / f"part{part}.parquet")
    rows = [{"编号": number, "图片": urls[number], "标题": f"猫{number}"[:2]} for number in range(NUM_IMAGES)]
    (world / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


@pytest.fixture
def world(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the tables in a folder for one test alone, which works in it."""
    shutil.copytree(made_once, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def written(path: str = "my.toml") -> dict[str, Any]:
    return tomllib.loads(Path(path).read_text("utf-8"))


@pytest.mark.parametrize("model", ["small-vit", "ViT-B-16"])
@pytest.mark.parametrize("data", ["own/captions.csv", "part*.parquet", "names.jsonl"])
def test_plan_takes_what_init_writes_without_a_note(
    world: Path, data: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--data", data, "--evaluation", "valid", "--model", model]) == 0
    captured = capsys.readouterr()
    assert captured.out == "my.toml; next: cnclip plan my.toml, then cnclip run my.toml\n"
    assert captured.err.startswith("80 rows, 80 of them usable: addresses in ")
    assert main(["plan", "my.toml"]) == 0
    captured = capsys.readouterr()
    assert "note:" not in captured.out + captured.err
    assert f"reads data ({data}); evaluation sets valid\n" in captured.out
    table = written()
    source = table["corpus"]["tables"][0]
    assert source["path"] == data
    assert source.get("picture_folder") == ("own/images" if data.startswith("own") else None)
    if data == "names.jsonl":
        assert (source["url_column"], source["caption_column"]) == ("图片", "标题")
        assert table["filter_text"] == {"min_characters": 1}
    else:
        assert "url_column" not in source
        assert "filter_text" not in table
    assert table["model"].get("start_weights") == (None if model == "small-vit" else model)
    assert table["evaluation"] == [{"name": "valid", "folder": "valid"}]
    assert all(len(line) <= 120 for line in Path("my.toml").read_text("utf-8").splitlines())


def test_what_init_writes_runs_and_needs_no_note_after_it(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["init", "run.toml", "--data=own/captions.csv", "--images=own/images", "--evaluation=valid"])
        == 0
    )
    assert main(["run", "run.toml", "--to", "shards"]) == 0
    manifest = read_manifest(load("run.toml")[0], "shards")
    assert manifest is not None
    assert manifest.num_kept == NUM_IMAGES
    capsys.readouterr()
    assert main(["plan", "run.toml"]) == 0
    assert "note:" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            (),
            "--data TABLE: missing; give it, because cnclip cannot ask without a terminal; see `cnclip init ",
        ),
        (
            ("--data=some.csv",),
            "some.csv: 79 usable rows are too few to set some aside for validation, which takes 80; name",
        ),
        (("--data=no.csv", "--evaluation=valid"), "--data no.csv: no such file"),
        (("--data=moved.csv", "--evaluation=valid"), "moved.csv: its addresses are paths, such as 猫 0.png"),
        (
            ("--data=own/captions.csv", "--evaluation=valid", "--images=valid"),
            "--images valid: holds none of",
        ),
        (("--data=names.jsonl", "--evaluation=valid", "--images=valid"), "--images valid: column '图片' of"),
        (("--data=names.jsonl", "--evaluation=others"), "--evaluation others: holds no evaluation set"),
        (("--data=names.jsonl", "--evaluation=valid", "--model=small-vt"), "did you mean small-vit?"),
        (
            ("--data=names.jsonl", "--evaluation=valid", "--url-column=a"),
            "names.jsonl: no column 'a'; found 编号",
        ),
        (("--data=few.csv", "--evaluation=valid"), "few.csv: 1 usable rows of 1 are too few"),
        (("--data=letters.csv", "--evaluation=valid"), "letters.csv: no column looks like that of urls"),
    ],
)
def test_what_does_not_fit_is_one_line(
    world: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("moved.csv").write_text(Path("own/captions.csv").read_text("utf-8"), "utf-8")
    Path("some.csv").write_text(
        "url,caption\n" + "".join(f"http://a.cn/{n},一只黑色的猫\n" for n in range(79)), "utf-8"
    )
    Path("few.csv").write_text("url,caption\nhttp://a.cn/1,一只黑色的猫\n", "utf-8")
    Path("letters.csv").write_text("a,b\nc,d\n", "utf-8")
    try:
        status = main(["init", *words])
    except SystemExit as ended:
        status = int(str(ended.code))
    err = capsys.readouterr().err
    assert status in (1, 2)
    errors = [line for line in err.splitlines() if "usable: addresses" not in line]
    assert len(errors) == 1, err
    assert message in errors[0]
    assert not Path("my.toml").exists()


def test_a_file_that_exists_stays(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.toml").write_text("mine")
    words = ["init", "--data=names.jsonl", "--evaluation=valid"]
    assert main(words) == 2
    assert "my.toml: already exists" in capsys.readouterr().err
    assert Path("my.toml").read_text() == "mine"
    assert main([*words, "--force"]) == 0
    assert written()["run"]["folder"] == "runs/my"


@pytest.mark.parametrize(
    ("answers", "model", "expected"),
    [
        (("captions.csv", "own/images", "valid", "", "runs/asked"), "small-vit", ()),
        (
            ("", "no.csv", "captions.csv", "valid", "own/images", "", "small", "none", "runs/asked"),
            None,
            (
                "no answer",
                "--data no.csv: no such file",
                "--images valid: holds none",
                "did you mean small-",
            ),
        ),
    ],
)
def test_it_asks_at_a_terminal(
    world: Path, answers: tuple[str, ...], model: str | None, expected: tuple[str, ...]
) -> None:
    own, theirs = pty.openpty()
    Path("captions.csv").write_text(Path("own/captions.csv").read_text("utf-8"), "utf-8")
    command = [sys.executable, "-m", "pipeline", "init"]
    root = str(Path(__file__).parents[3])
    with subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "PYTHONPATH": root}
    ) as asking:
        for answer in answers:
            os.write(own, f"{answer}\n".encode())
        assert asking.wait(timeout=120) == 0
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # the end of a closed terminal
        while piece := os.read(own, 65536):
            said += piece
    os.close(own)
    table = written()
    assert table["run"]["folder"] == "runs/asked"
    assert table.get("model", {}).get("name") == model
    assert ("evaluation" in table) == (model is not None)
    for words in expected:
        assert words in said.decode()


@pytest.mark.parametrize("num_rows", [8, 13, 100, 3000, 50_000, 10_000_000])
@pytest.mark.parametrize("machine", [Machine(1, 0), Machine(6, 0), Machine(64, 8)])
@pytest.mark.parametrize("model", ["small-vit", "ViT-B-16"])
def test_settings_fit_half_of_the_rows(num_rows: int, machine: Machine, model: str) -> None:
    train = choose_training(model, num_rows, machine)
    assert 4 <= train.batch <= num_rows // 2
    assert train.batch % train.ranks == 0
    steps = train.epochs * (num_rows // 2) // train.batch
    assert steps >= 20
    assert train.warmup_steps <= steps / 10 or train.warmup_steps == 1
    assert train.ranks * train.threads <= max(machine.cores, machine.gpus)


@pytest.mark.parametrize("name", ["lists.parquet", "lists.jsonl"])
@pytest.mark.parametrize(
    ("words", "setting", "rows"), [((), "each", 160), (("--list-captions=random",), "random", 80)]
)
def test_lists_of_captions(
    world: Path,
    name: str,
    words: tuple[str, ...],
    setting: str,
    rows: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = [[caption, caption + "看雪"] for caption in CAPTIONS]
    table = pl.DataFrame({"地址": [f"https://a.cn/{number}" for number in range(NUM_IMAGES)], "说明": both})
    table.write_parquet(name) if name.endswith("parquet") else table.write_ndjson(name)
    assert main(["init", f"--data={name}", "--evaluation=valid", *words]) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        f"{rows} rows, {rows} of them usable (lists of captions of about 80 images, a row "
    )
    assert "addresses in '地址' (URLs)" in said
    assert written()["corpus"]["tables"] == [
        {
            "path": name,
            "name": "data",
            "url_column": "地址",
            "caption_column": "说明",
            "list_captions": setting,
        }
    ]
    assert main(["plan", "my.toml"]) == 0


def test_without_an_evaluation_set_rows_are_set_aside(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--data=own/captions.csv"]) == 0
    assert "sets 20 rows aside to measure the model on: [split]" in capsys.readouterr().err
    assert written()["split"] == {"count": 20}
    stages = {stage.name: stage for stage in load("my.toml")[0].stages}
    assert "validation" in stages["stage2"].parents
    assert "validation" in stages["retrieval"].parents
    assert main(["plan", "my.toml"]) == 0
    assert "note:" not in "".join(capsys.readouterr())


def test_a_run_without_a_model_builds_the_corpus(world: Path) -> None:
    assert main(["init", "--data=own/captions.csv", "--model=none"]) == 0
    assert set(written()) == {"run", "corpus", "dedup", "download", "shards"}
    assert main(["plan", "my.toml"]) == 0


def _as_parquet(folder: Path) -> None:
    image = pa.array([path.read_bytes() for path in sorted(Path("own/images").iterdir())])
    folder.mkdir()
    pq.write_table(
        pa.table({"image": image, "captions": [[text] for text in CAPTIONS]}), folder / "a.parquet"
    )


def _as_parquet_with_own_names(folder: Path) -> None:
    image = pa.array([path.read_bytes() for path in sorted(Path("own/images").iterdir())])
    folder.mkdir()
    columns = {"id": [str(number) for number in range(NUM_IMAGES)], "image": image, "描述": CAPTIONS}
    pq.write_table(pa.table(columns), folder / "a.parquet")


def _as_folder(folder: Path) -> None:
    folder.mkdir()
    for path, caption in zip(sorted(Path("own/images").iterdir()), CAPTIONS, strict=True):
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / path.name).with_suffix(".txt").write_text(caption)


def _as_tars(folder: Path) -> None:
    _as_folder(folder.with_name("unpacked"))
    folder.mkdir()
    with tarfile.open(folder / "0.tar.gz", "w:gz") as tar:
        tar.add(folder.with_name("unpacked"), "")


@pytest.mark.parametrize(
    ("write", "kind", "settings"),
    [
        (_as_parquet, "huggingface", {"list_captions": "each"}),
        (_as_parquet_with_own_names, "huggingface", {"caption_column": "描述"}),
        (_as_folder, "folder", {}),
        (_as_tars, "webdataset", {}),
    ],
)
def test_folders_that_bring_their_images(
    world: Path, write: Any, kind: str, settings: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(world / "set")
    assert main(["init", "--data", "set", "--evaluation", "valid"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("about 80 rows, 80 of them usable")
    assert said.endswith(f", judging by the first file: read with kind = {kind!r}\n")
    assert ("a row for each; --list-captions chooses" in said) == ("list_captions" in settings)
    assert written()["corpus"] == {
        "kind": "sources", "sources": [{"kind": kind, "path": "set", "name": "data", **settings}],
    }  # fmt: skip
    assert look_at_data("set", None).shortest_side_px == 40
    assert main(["plan", "my.toml"]) == 0
    assert f"reads data ({kind} set); evaluation sets valid\n" in capsys.readouterr().out
    assert main(["init", "again.toml", "--data", "set", "--images", "own", "--evaluation", "valid"]) == 1
    assert f"--images: set is read with kind = {kind!r}, which has its images" in capsys.readouterr().err
