"""Every shell, TOML and Python block of README and docs works, or says next to it why it is not run.

A page's blocks run in order in one folder that holds what the pages take for the user's: `my.toml` (the
README's), captions, images, an evaluation set, weights, the beginnings of two runs. Names of weights are
looked up in a hub on loopback. `<!-- run by make test-slow -->` marks blocks that need a finished run.
The generated reference has one example a command, for files of anybody: these are parsed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tomli_w
from PIL import Image

from eval.index.planning import read_machines
from pipeline import catalog
from pipeline.cli import main, program
from tests.helpers.hub_models import chinese_clip
from tests.helpers.hub_server import Hub, ask_here, hub_server
from tests.helpers.own_corpus import main_here, write_evaluation
from tests.helpers.pages import CHINESE, NOT_RUN, PAGES, ROOT, SLOW, Block, blocks, read
from tests.helpers.tiny_model import write_tiny_model

DOCS = [page for page in PAGES if page.startswith(("README", "docs/"))]
REFERENCE = "docs/reference/cli.md"
RUN = [page for page in DOCS if page not in CHINESE and page != REFERENCE]  # the Chinese have the same blocks
NUM_IMAGES = 150
SMALL_DEMO = ("corpus.num_clean=60", "corpus.num_evaluation=20", "corpus.dirt=0.05", "download.retries=0")
NAMED_WEIGHTS = ("OFA-Sys/chinese-clip-vit-base-patch16", "OFA-Sys/chinese-clip-vit-large-patch14")
NEEDS_PACKAGES = re.compile(r'"cnclip-pretraining\[(\w+)\]"')


def _shell(page: str) -> list[Block]:
    return [block for block in blocks(read(page)) if block.language == "sh"]


def _write_images(folder: Path, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{number}.png")


def make_world(folder: Path) -> None:
    """Fill the user's folder with what the pages' commands find there."""
    _write_images(folder / "my" / "pictures", NUM_IMAGES, 0)
    _write_images(folder / "photos", 40, 1)
    for name in ("cat.jpg", "dog.jpg"):
        Image.open(folder / "photos" / "0.png").save(folder / name)
    rows = [f"{number}.png,第{number}只橘猫趴在窗台上看书" for number in range(NUM_IMAGES)]
    (folder / "my" / "captions.csv").write_text("\n".join(["url,caption", *rows]) + "\n", encoding="utf-8")
    (folder / "captions.txt").write_text("红色的猫\n蓝色的狗\n一张照片\n" * 14, encoding="utf-8")
    write_evaluation(folder / "my" / "valid", folder / "photos", 12)
    for sets in (folder / "my" / "sets", folder / "sets"):
        sets.mkdir()
        write_evaluation(sets / "valid", folder / "photos", 12)
    own = next(block for block in blocks(read("README.md")) if block.language == "toml")
    (folder / "my.toml").write_text(own.text, encoding="utf-8")
    weights, _ = write_tiny_model(folder)
    (folder / "runs" / "demo" / "stage2").mkdir(parents=True)
    shutil.copy(weights, folder / "runs" / "demo" / "stage2")
    shutil.copy(folder / "vocab.txt", folder / "runs" / "demo" / "stage2")
    assert main(["convert", weights, str(folder / "clip_cn_vit-b-16.pt")]) == 0
    (folder / "bin").mkdir()
    (folder / "bin" / "cnclip").write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline "$@"\n')
    (folder / "bin" / "cnclip").chmod(0o755)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "world"
    folder.mkdir()
    make_world(folder)
    return folder


@pytest.fixture
def world(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's folder, for one test alone, which works in it."""
    shutil.copytree(made_once, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Serve the named weights that pages use; each is a tiny model."""
    folder = tmp_path_factory.mktemp("hub")
    chinese_clip(folder)
    with hub_server() as server:
        server.models.update(dict.fromkeys(NAMED_WEIGHTS, folder))
        yield server


def run_commands(block: Block, page: str) -> None:
    """Run the commands of a shell block one by one in this process, which has imported everything already."""
    for line in block.text.replace("\\\n", " ").splitlines():
        name, *words = shlex.split(line)
        assert name == "cnclip", f"{page}:{block.line}: {line}"
        done = main_here(*words)
        assert done.returncode == 0, f"{page}:{block.line}: {done.stdout[-1000:]}{done.stderr[-3000:]}"


def run_block(block: Block, world: Path, page: str, hub: Hub | None = None) -> None:
    """Run a shell block in the world; names of weights come from the hub, and without one from nowhere."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "PATH": f"{world / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(world / "home"),
        **({"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub.url}),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=world, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{page}:{block.line}: {done.stdout[-1000:]}{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", DOCS)
def test_a_block_that_is_not_run_says_why(page: str) -> None:
    for block in _shell(page):
        if block.above.startswith("<!--"):
            assert block.above == SLOW or re.fullmatch(NOT_RUN + r"\w.{10,} -->", block.above), block.above
        else:
            commands = [line.split()[0] for line in block.text.splitlines() if line.strip()]
            assert set(commands) <= {"cnclip"}, f"{page}:{block.line}: say why this is not run"


@pytest.mark.parametrize(
    "page", [page for page in RUN if any(not block.above.startswith("<!--") for block in _shell(page))]
)
def test_quick_commands_work(page: str, world: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_here(hub, world / "home", monkeypatch)
    for block in _shell(page):
        if not block.above.startswith("<!--"):
            run_commands(block, page)


@pytest.mark.parametrize("block", _shell(REFERENCE), ids=lambda block: block.text.split()[1])
def test_examples_of_the_reference_parse(block: Block) -> None:
    name, *arguments = shlex.split(block.text.removeprefix("cnclip "))
    program().commands[name].make_context(name, arguments)


def test_the_example_of_report_compares_two_runs(world: Path) -> None:
    for name, least in (("old", 5), ("new", 6)):
        settings = f"--set run.folder=runs/{name} --set filter_text.min_characters={least}"
        command = f"cnclip run my.toml --to filter_text {settings}\n"
        run_commands(Block("sh", command, "", 0), "fixture")
    example = next(block for block in _shell(REFERENCE) if block.text.startswith("cnclip report "))
    run_commands(example, REFERENCE)
    compared = (world / "compared.html").read_text(encoding="utf-8")
    assert 'data-title-en="old and new"' in compared
    assert "min_characters" in compared


@pytest.fixture(scope="module")
def finished(made_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world after `cnclip run my.toml`, with the beginning of a small demo."""
    world = tmp_path_factory.mktemp("finished") / "world"
    shutil.copytree(made_once, world)
    shutil.rmtree(world / "runs")
    sets = " ".join(f"--set {item}" for item in SMALL_DEMO)
    text = f"cnclip run my.toml\ncnclip run demo {sets} --to shards\n"
    run_block(Block("sh", text, "", 0), world, "fixture")
    kept = pl.read_parquet(world / "runs" / "my" / "shards" / "*.parquet")["key"]
    (world / "my" / "keys.txt").write_text("\n".join(kept[:5]) + "\n")
    return world


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN if any(b.above == SLOW for b in _shell(page))])
def test_commands_on_a_finished_run_work(page: str, finished: Path, tmp_path: Path, hub: Hub) -> None:
    world = tmp_path / "world"
    shutil.copytree(finished, world)
    shutil.copy(finished / "bin" / "cnclip", world / "bin" / "cnclip")
    for block in _shell(page):
        if not block.above.startswith(NOT_RUN):
            run_block(block, world, page, hub)


def _joined(table: dict[str, Any]) -> dict[str, Any]:
    """A block's tables over those of the smallest run."""
    whole: dict[str, Any] = {
        "run": {"folder": "runs/my"},
        "corpus": {"kind": "demo"},
        "model": {"name": "tiny-vit"},
        "stage2": {"epochs": 1},
    }
    if "base" in table:
        return table
    for name, value in table.items():
        fits = isinstance(value, dict) and value.get("kind") in (None, whole.get(name, {}).get("kind"))
        whole[name] = {**whole.get(name, {}), **value} if fits else value
    if whole["corpus"]["kind"] != "demo":
        whole.setdefault("evaluation", [{"name": "valid", "folder": "my/valid"}])
    return whole


@pytest.mark.parametrize("page", [p for p in DOCS if any(b.language == "toml" for b in blocks(read(p)))])
def test_toml_blocks_are_settings(page: str, tmp_path: Path) -> None:
    for block in blocks(read(page)):
        path = tmp_path / "block.toml"
        if block.language == "toml" and "[[machine]]" in block.text:  # of `cnclip plan index --prices`
            path.write_text(block.text, encoding="utf-8")
            assert read_machines(str(path))
        elif block.language == "toml":
            path.write_text(tomli_w.dumps(_joined(tomllib.loads(block.text))), encoding="utf-8")
            catalog.load(str(path))


def _python(page: str) -> list[Block]:
    found = [block for block in blocks(read(page)) if block.language == "python"]
    return [block for block in found if not block.above.startswith(NOT_RUN)]


@pytest.mark.parametrize("page", [page for page in RUN if _python(page)])
@pytest.mark.usefixtures("world")
def test_python_blocks_run(page: str) -> None:
    names: dict[str, Any] = {}
    for block in _python(page):
        exec(compile(block.text, page, "exec"), names)


@pytest.mark.parametrize("page", DOCS)
def test_extras_exist(page: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(NEEDS_PACKAGES.findall(read(page))) <= set(extras)
