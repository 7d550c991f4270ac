"""Weights by name from the command line: what is downloaded when, and what a run stays bound to."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.helpers.evaluation_files import png_bytes, small_evaluation
from tests.helpers.hub_models import chinese_clip
from tests.helpers.hub_server import Hub, hub_server
from tests.helpers.own_corpus import make_own

NAME = "OFA-Sys/chinese-clip-vit-base-patch16"
FINETUNE = """
[model]
name = "tiny-vit"
vocabulary = "{root}/model/vocab.txt"
start_weights = "ViT-B-16"
[finetune]
epochs = 1
global_batch = 4
lanes = 2
ranks = 2
warmup_steps = 1
validate_every_steps = 0
[finetune.distil]
teacher = "OFA-Sys/chinese-clip-vit-base-patch16"
"""


@dataclass
class Site:
    """A hub, a cache, and a folder to work in."""

    hub: Hub
    folder: Path

    def cnclip(self, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        inherited: Mapping[str, str] = {
            key: value for key, value in os.environ.items() if not key.startswith("HF_")
        }
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "home"), **environment}
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *words],
            env={**inherited, **own}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    def succeed(self, *words: str, **environment: str) -> str:
        done = self.cnclip(*words, **environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("named")
    (folder / "model").mkdir()
    chinese_clip(folder / "model")
    with hub_server() as hub:
        hub.models[NAME] = folder / "model"
        yield Site(hub, folder)


def error_of(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode in (1, 2)
    return lines[0]


@pytest.mark.slow
def test_inspect_convert_embed_and_eval_by_name(site: Site) -> None:
    hub, folder = site.hub, site.folder
    origin = f"{NAME}@{hub.commit(NAME)}:model.safetensors"
    out = site.succeed("inspect", "ViT-B-16")
    assert out.startswith(f"{origin}\n  file        {folder}/home/hub/models--OFA-Sys--")
    assert "Hugging Face ChineseCLIP, safetensors" in out
    assert len(hub.asked("GET", ".safetensors")) == 1  # HF_ENDPOINT and HF_HOME are honoured

    out = site.succeed("convert", NAME, str(folder / "converted"))
    assert out.startswith(f"{origin}: Hugging Face ChineseCLIP")
    assert f"| Converted from | {origin} |" in (folder / "converted" / "README.md").read_text()

    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(png_bytes(0))
    site.succeed("embed", "ViT-B-16", "--images", str(folder / "images"), "--out", str(folder / "features"))
    small_evaluation(folder / "sets" / "mine", "valid")
    asked = len(hub.requests)
    out = site.succeed(
        "eval", "ViT-B-16", "--sets", str(folder / "sets"), "--out", str(folder / "scores"), "--offline"
    )
    assert len(hub.requests) == asked
    facts = json.loads((folder / "scores" / "eval.json").read_text())
    assert origin in json.dumps(facts)
    assert len(hub.asked("GET", ".safetensors")) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("inspect", "vit-b16"), "did you mean ViT-B-16"),
        (("eval", "ViT-L14", "--out", "x"), "did you mean ViT-L-14"),
        (("eval", "nonsense", "--out", "x"), "shipped recipes"),
        (("convert", "tiny-vit", "x.pt"), "no Chinese CLIP of this size is published"),
    ],
)
def test_a_word_that_names_nothing(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.slow
def test_errors_are_one_line(site: Site) -> None:
    def error(*words: str, **environment: str) -> str:
        return error_of(site.cnclip(*words, **environment))

    cold = {"HF_HOME": str(site.folder / "cold")}
    assert "HF_HUB_OFFLINE is set" in error("inspect", "ViT-B-16", "--offline", **cold)
    assert "HF_HUB_OFFLINE is set" in error("inspect", "ViT-B-16", HF_HUB_OFFLINE="1", **cold)
    assert "cannot be reached" in error("inspect", "ViT-B-16", HF_ENDPOINT="http://127.0.0.1:9", **cold)
    assert not (site.folder / "cold" / "hub" / "models--OFA-Sys--chinese-clip-vit-base-patch16").exists()


@pytest.mark.slow
def test_a_run_starts_from_a_name_and_stays_bound_to_it(site: Site) -> None:
    hub, root = site.hub, site.folder / "own"
    root.mkdir()
    make_own(root)
    data = (root / "run.toml").read_text(encoding="utf-8").partition("[model]")[0]
    recipe = root / "run.toml"
    recipe.write_text(data + FINETUNE.format(root=site.folder), encoding="utf-8")
    home = {"HF_HOME": str(root / "home")}
    hub.requests.clear()
    out = site.succeed("plan", str(recipe), **home)
    assert f"to download for finetune (start weights): ViT-B-16: {NAME}, about 7" in out
    assert f"to download for finetune (teacher): {NAME}, about 7" in out
    assert hub.requests == []
    out = error_of(site.cnclip("plan", str(recipe), "--set", "model.start_weights=ViT-B16", **home))
    assert "did you mean ViT-B-16" in out

    site.succeed("run", str(recipe), "--to", "finetune", **home)
    assert len(hub.asked("GET", ".safetensors")) == 1  # by both ranks
    commit = hub.commit(NAME)
    job = json.loads((root / "run" / "finetune" / "job.json").read_text())
    assert job["start_weights"] == f"{NAME}@{commit}:model.safetensors"
    assert job["config"]["distil"]["teacher"] == job["start_weights"]

    def state(*words: str) -> str:
        plan = site.succeed("plan", str(recipe), *words, **home)
        return next(line for line in plan.splitlines() if line.startswith("finetune "))

    assert " done " in state()
    assert " done " in state("--set", "run.processes=1")
    chinese_clip(site.folder / "model", seed=1)  # the name moves on at the hub
    hub.requests.clear()
    assert " done " in state()
    shutil.rmtree(root / "home")
    assert " done " in state()
    assert "nothing to do" in site.succeed("run", str(recipe), "--to", "finetune", "--offline", **home)
    assert hub.requests == []
    pins = root / "run" / "weights.json"
    pins.unlink()  # what the hub has now are other bytes
    stale = error_of(site.cnclip("run", str(recipe), "--stage", "finetune", **home))
    assert "finetune is stale: its inputs changed" in stale


@pytest.mark.slow
def test_ranks_that_somebody_else_starts_want_the_name_looked_up(site: Site) -> None:
    root = site.folder / "launched"
    root.mkdir()
    make_own(root)
    recipe = root / "run.toml"
    data = recipe.read_text(encoding="utf-8").partition("[model]")[0]
    recipe.write_text(data + FINETUNE.format(root=site.folder), encoding="utf-8")
    home = {"HF_HOME": str(root / "home")}
    site.succeed("run", str(recipe), "--to", "lock", **home)
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "HF_ENDPOINT": site.hub.url, **home}
    command = [sys.executable, "-m", "pipeline.rank", str(recipe), "finetune"]
    refused = subprocess.run(
        command, env={**os.environ, **ranks}, capture_output=True, text=True, timeout=300, check=False
    )
    assert refused.returncode == 2
    assert f"has not looked up the weights ViT-B-16 yet; run `cnclip launch {recipe}` first" in refused.stderr
    site.succeed("launch", str(recipe), "--set", "launch.gpus_per_node=0", **home)
    assert (root / "run" / "weights.json").exists()
    assert list((root / "home" / "hub").rglob("model.safetensors"))


@pytest.mark.slow
def test_a_corpus_is_scored_by_a_named_model(site: Site) -> None:
    hub, root = site.hub, site.folder / "scored"
    root.mkdir()
    make_own(root)
    recipe = root / "run.toml"
    score = (
        '[score]\nmodel = "ViT-B-16"\ncontext_length = 20\ndevice = "cpu"\n[filter_score]\nmin_score = -1.0\n'
    )
    recipe.write_text(recipe.read_text(encoding="utf-8") + score, encoding="utf-8")
    home = {"HF_HOME": str(root / "home")}
    hub.requests.clear()
    assert "to download for score (model): ViT-B-16" in site.succeed("plan", str(recipe), **home)
    site.succeed("run", str(recipe), "--to", "filter_image", **home)
    assert hub.requests == []  # neither a plan nor the stages before it ask a hub
    site.succeed("run", str(recipe), "--to", "filter_score", **home)
    assert len(hub.asked("GET", ".safetensors")) == 1
    shutil.rmtree(root / "home")
    hub.requests.clear()
    plan = site.succeed("plan", str(recipe), **home).splitlines()
    assert " done " in next(line for line in plan if line.startswith("score "))
    assert hub.requests == []
