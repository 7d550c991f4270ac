"""`cnclip push` to a hub on loopback: published models load by name, and their cards are right."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard, constants

import cnclip
from eval.metrics.bootstrap import Measured
from eval.zeroshot.stage import ZeroshotFacts
from pipeline.cli import main
from pipeline.core.records import Manifest
from tests.helpers.corpus_files import plain_corpus
from tests.helpers.hub_server import Hub, hub_server
from tests.helpers.tiny_model import write_tiny_model
from training.weights.model_card import RESNET_CODE

_TOKEN = "hf_secretsecretsecret"
_TEXTS = ["一张红色的照片", "没有猫"]
_SCORES = {"t2i": {"r1": 61.5, "r5": 80.0, "r10": 90.25}, "i2t": {"r1": 60.0, "r5": 81.0, "r10": 91.0}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that accepts uploads with a token, and a separate cache."""
    with hub_server() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # this hub has Git LFS
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_TOKEN", _TOKEN)
        server.uploads = tmp_path / "uploads"
        server.uploads.mkdir()
        server.write_token = _TOKEN
        yield server


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights in a run's folder that records their origin and scores."""
    run = tmp_path / "run"
    (run / "stage2").mkdir(parents=True)
    (run / "report").mkdir()
    path, _ = write_tiny_model(run / "stage2")
    (run / "run.resolved.toml").write_text(
        '[run]\nfolder = "run"\n[corpus]\nkind = "tables"\n'
        '[model]\nname = "tiny-vit"\nstart_weights = "ViT-B-16"\n',
        encoding="utf-8",
    )
    stages = {"muge": _SCORES, "muge/stage1": {"t2i": {"r1": 1.0}}}
    (run / "report" / "report.json").write_text(json.dumps({"evaluations": stages}), encoding="utf-8")
    return Path(path)


def test_a_pushed_model_loads_by_name_with_equal_outputs(
    hub: Hub, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["push", str(weights), "me/mine", "--license", "apache-2.0", "--private"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert _TOKEN not in said.out + said.err
    assert f"{hub.url}/me/mine/commit/" in said.out
    assert "me/mine" in hub.private
    own, theirs = cnclip.load(str(weights)), cnclip.load("me/mine")
    np.testing.assert_array_equal(own.embed_texts(_TEXTS), theirs.embed_texts(_TEXTS))
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    from PIL import Image

    picture = Image.fromarray(image)
    np.testing.assert_array_equal(own.embed_images([picture]), theirs.embed_images([picture]))


def test_the_cards_metadata_parses_and_has_licence_base_model_and_scores(hub: Hub, weights: Path) -> None:
    assert main(["push", str(weights), "me/mine", "--license", "apache-2.0"]) == 0
    card = ModelCard.load(hub.models["me/mine"] / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["OFA-Sys/chinese-clip-vit-base-patch16"]
    assert card.data.library_name == "transformers"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert len(results) == 6
    assert results["t2i_r10"].metric_value == 90.25
    assert results["t2i_r1"].dataset_name == "muge"
    assert "# tiny-vit, Chinese CLIP" in card.text


def test_zero_shot_scores_are_those_of_the_model_that_they_measured(hub: Hub, weights: Path) -> None:
    run = weights.parent.parent
    facts = {
        "mnist": ZeroshotFacts("mnist", "accuracy", Measured(51.236, 50.0, 52.5), None, (), False),
        "dtd": ZeroshotFacts("dtd", "mean-per-class", Measured(30.0, 29.0, 31.0), None, (), False),
    }
    manifest = Manifest(
        "zeroshot", 2, "", "", {"vocabulary": "a", "stage2": "b"}, (), 2, 2, {},
        {name: found.to_json() for name, found in facts.items()},
    )  # fmt: skip
    (run / "zeroshot").mkdir()
    (run / "zeroshot" / "manifest.json").write_text(manifest.to_file(), encoding="utf-8")
    assert main(["push", str(weights), "me/mine", "--license", "apache-2.0"]) == 0
    card = ModelCard.load(hub.models["me/mine"] / "README.md")
    found = {
        (result.dataset_name, result.metric_type): result.metric_value
        for result in card.data.eval_results
        if result.task_type == "zero-shot-image-classification"
    }
    assert found == {("mnist", "accuracy"): 51.24, ("dtd", "mean-per-class"): 30.0}
    assert len(card.data.eval_results) == 8  # recall too
    weights.parent.rename(run / "stage1")
    earlier = str(run / "stage1" / weights.name)
    assert main(["push", earlier, "me/earlier", "--license", "apache-2.0"]) == 0
    card = ModelCard.load(hub.models["me/earlier"] / "README.md")
    assert {result.task_type for result in card.data.eval_results} == {"image-text-retrieval"}


def test_a_pushed_resnet_says_how_it_is_loaded_and_loads_by_name(hub: Hub, tmp_path: Path) -> None:
    path, _ = write_tiny_model(tmp_path, name="tiny-rn")
    assert main(["push", path, "me/mine", "--license", "mit"]) == 0
    files = {file.name for file in hub.models["me/mine"].iterdir()}
    assert {"config.json", "model.safetensors", RESNET_CODE, "vocab.txt"} <= files
    card = ModelCard.load(hub.models["me/mine"] / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.license == "mit"
    assert 'AutoModel.from_pretrained("me/mine", trust_remote_code=True)' in card.text
    assert 'AutoProcessor.from_pretrained("me/mine", trust_remote_code=True, backend="pil")' in card.text
    assert f"`trust_remote_code=True` is needed: the code is\n`{RESNET_CODE}`" in card.text
    own, theirs = cnclip.load(path), cnclip.load("me/mine")
    np.testing.assert_array_equal(own.embed_texts(_TEXTS), theirs.embed_texts(_TEXTS))
    assert hub.asked("GET", ".safetensors")
    assert hub.asked("GET", ".py") == []  # nor is the code downloaded


def test_a_dry_run_writes_the_folder_and_asks_no_hub(hub: Hub, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["push", str(weights), "me/mine", "--license", "mit", "--dry-run", str(out)]
    assert main([*arguments, "--base-model", "me/base"]) == 0
    assert {"README.md", "config.json", "model.safetensors", "vocab.txt"} <= {
        path.name for path in out.iterdir()
    }
    assert ModelCard.load(out / "README.md").data.base_model == ["me/base"]
    assert hub.requests == []
    assert main(arguments) == 2  # the folder is no longer empty


def test_a_corpus_card_counts_rows_and_has_no_images_unless_asked(hub: Hub, tmp_path: Path) -> None:
    run = plain_corpus(tmp_path, range(12))
    arguments = ["push", run.folder, "me/corpus", "--corpus", "--license", "cc-by-4.0"]
    assert main(arguments) == 0
    folder = hub.datasets["me/corpus"]
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["README.md"]
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.size_categories == ["n<1K"]
    assert "12 images" in card.text
    assert main([*arguments, "--images"]) == 0
    for name in ("00000.tar", "00001.tar", "00001.parquet"):
        assert (folder / "shards" / name).read_bytes() == Path(run.folder, "shards", name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine"], "mine: has no owner: give OWNER/NAME"),
        (["me/mi ne"], "me/mi ne: not an id of a hub"),
        (["me/mine", "--images"], "--images: only a corpus has images"),
        (["me/mine", "--corpus", "--base-model", "a/b"], "--base-model and --vocab are for models"),
    ],
)
def test_wrong_arguments_are_one_line(
    hub: Hub, weights: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["push", str(weights), *arguments, "--license", "mit"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_token_that_may_not_write_is_named_as_the_reason(
    hub: Hub, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.write_token = "hf_another"
    assert main(["push", str(weights), "me/mine", "--license", "mit"]) == 1
    error = capsys.readouterr().err
    assert "answers with status 401: run `hf auth login` or set HF_TOKEN" in error
    assert _TOKEN not in error


def test_a_run_without_shards_is_no_corpus(
    hub: Hub, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(weights.parent.parent)
    assert main(["push", run, "me/corpus", "--corpus", "--license", "mit"]) == 1
    assert f"{run}: no finished shards: give" in capsys.readouterr().err
