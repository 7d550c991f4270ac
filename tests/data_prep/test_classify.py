"""Classifiers: heads from every kind of file, limits without a second pass, features that [score] reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from data_prep.features.classify import Head
from pipeline import image_encoders, image_heads, pair_scorers
from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core.records import ConfigError, InputError
from pipeline.last_start import start
from pipeline.publish.corpus import data_section
from tests.helpers.corpus_files import answer_with_drawings

FEATURES = torch.nn.functional.normalize(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), dim=1)


def head(weights: Path, **settings: Any) -> Head:
    return Head(
        **{"name": "nsfw", "weights": str(weights), "activation": "none", "output": "raw", "index": 0}
        | settings
    )


def scored(weights: Path, **settings: Any) -> Any:
    return image_heads.load(head(weights, **settings))(FEATURES.numpy())


def test_laions_linear_layer_from_every_kind_of_file(tmp_path: Path) -> None:
    layer = torch.nn.Linear(6, 1)
    expected = layer(FEATURES)[:, 0].detach().numpy()
    torch.save(layer.state_dict(), tmp_path / "linear.pth")
    save_file(layer.state_dict(), tmp_path / "linear.safetensors")
    torch.jit.script(layer).save(tmp_path / "linear.pt")
    for name in ("linear.pth", "linear.safetensors", "linear.pt"):
        assert scored(tmp_path / name) == pytest.approx(expected, abs=1e-6)
    sigmoid = scored(tmp_path / "linear.pth", output="sigmoid")
    assert sigmoid == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-6)


@pytest.mark.parametrize(
    ("activation", "between"), [("relu", torch.relu), ("gelu", torch.nn.functional.gelu)]
)
def test_an_mlp_in_the_order_of_its_layers(tmp_path: Path, activation: str, between: Any) -> None:
    layers = {f"layers.{number}": torch.nn.Linear(*size) for number, size in ((10, (4, 3)), (2, (6, 4)))}
    state = {
        f"{name}.{key}": value for name, item in layers.items() for key, value in item.state_dict().items()
    }
    save_file(state, tmp_path / "mlp.safetensors")
    given = layers["layers.10"](between(layers["layers.2"](FEATURES)))
    expected = torch.softmax(given, dim=1)[:, 2].detach().numpy()
    found = scored(tmp_path / "mlp.safetensors", activation=activation, output="softmax", index=2)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rows", ["n", 4])
def test_an_onnx_model(tmp_path: Path, rows: Any) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    weight = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, 6])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, 2])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "a.onnx")
    assert scored(tmp_path / "a.onnx", index=1) == pytest.approx((FEATURES.numpy() @ weight)[:, 1], abs=1e-5)
    with pytest.raises(InputError, match=r"a\.onnx: classifier nsfw takes 6 numbers, but a feature .* has 5"):
        image_heads.load(head(tmp_path / "a.onnx"))(FEATURES.numpy()[:, :5])


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("__import__('os').abort()",)


def test_files_that_are_no_classifiers(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(3, 6), "b.weight": torch.ones(1, 4)}, tmp_path / "cut.safetensors")
    save_file({"a.weight": torch.ones(3, 6), "norm": torch.ones(3)}, tmp_path / "norm.safetensors")
    save_file({"a.weight": torch.ones(3)}, tmp_path / "flat.safetensors")
    save_file({"weight": torch.ones(3, 6)}, tmp_path / "good.safetensors")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    torch.save({"weight": torch.ones(1, 6), "more": Evil()}, tmp_path / "evil.pth")
    for name, said in (
        ("cut.safetensors", "a layer gives 3 numbers, and the next one takes 4"),
        ("norm.safetensors", "not only linear layers: it holds norm"),
        ("flat.safetensors", "not only linear layers: it holds a.weight"),
        ("bad.onnx", "no ONNX model that runs here"),
        ("evil.pth", "eval"),
    ):
        with pytest.raises(InputError, match=said):
            scored(tmp_path / name)
    with pytest.raises(
        InputError, match=r"gives 3 numbers for an image; correct \[\[classifier\]\] index = 3"
    ):
        scored(tmp_path / "good.safetensors", index=3)
    with pytest.raises(InputError, match=r"takes 6 numbers, but a feature .* has 2"):
        image_heads.load(head(tmp_path / "good.safetensors"))(np.ones((1, 2), np.float32))


class Angles:
    """An encoder of two dimensions by the length of a file."""

    def embed_images(self, images: Any) -> Any:
        angles = np.array([len(data) % 100 for data in images], np.float32) / 100 * np.pi / 2
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


class Texts:
    """Encodes texts alone: a score takes the images' features from where they are."""

    def embed_texts(self, texts: Any) -> Any:
        return np.tile(np.array([[1, 0]], np.float32), (len(texts), 1))

    def embed_images(self, images: Any) -> Any:
        raise AssertionError("images are encoded twice")


RUN = """
[run]
folder = "{root}/run"
processes = 1
[corpus]
kind = "tables"
[[corpus.tables]]
path = "{root}/captions.csv"
name = "mine"
[dedup]
partitions = 2
[image_features]
model = "{root}/model.safetensors"
[score]
model = "{root}/model.safetensors"
[filter_score]
min_score = 0.2
[[classifier]]
name = "nice"
weights = "{root}/nice.safetensors"
min_score = 0.3
[[classifier]]
name = "plain"
weights = "{root}/nice.safetensors"
output = "sigmoid"
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = {
        "url": [f"http://a.cn/{number}.jpg" for number in range(24)],
        "caption": [f"第{number}只橘猫趴在窗台上" for number in range(24)],
    }
    pl.DataFrame(rows).write_csv(tmp_path / "captions.csv")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    save_file({"weight": torch.tensor([[0.0, 1.0]])}, tmp_path / "nice.safetensors")
    (tmp_path / "my.toml").write_text(RUN.format(root=tmp_path), encoding="utf-8")

    answer_with_drawings(monkeypatch)
    monkeypatch.setattr(image_encoders, "load", lambda config, run_folder: Angles())
    monkeypatch.setattr(pair_scorers, "load", lambda config, run_folder: Texts())
    image = image_encoders.identify(load(str(tmp_path / "my.toml"))[1].image_features)  # type: ignore[arg-type]
    monkeypatch.setattr(pair_scorers, "identify_pair", lambda config, run_folder: ("text", image))
    return tmp_path


def _rows(run: Path, stage: str, folder: str = "kept") -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted((run / stage / folder).glob("*.parquet"))])


def test_a_run_classifies_and_other_limits_read_numbers_only(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toml, run = str(root / "my.toml"), root / "run"
    start(toml, last="lock")
    scores = _rows(run, "classify", "scores")
    rows = _rows(run, "filter_score")
    assert scores["key"].equals(rows["key"])
    # sin and cos of one angle, once as the classifier's and once as the run's score.
    nice, pair = scores["classifier_nice"].to_numpy(), rows["pair_score"].to_numpy()
    assert nice**2 + pair**2 == pytest.approx(np.ones(len(nice)), abs=2e-3)
    dropped = _rows(run, "filter_classes", "dropped")
    assert set(dropped["key"]) == set(scores.filter(pl.col("classifier_nice") < 0.3)["key"])
    assert 0 < dropped.height < rows.height
    lock = json.loads((run / "lock/corpus.lock.json").read_text())
    assert lock["funnel"]["filter_classes"]["dropped"] == {"classifier:nice": dropped.height}
    assert lock["settings"]["filter_classes"]["limits"][0] == {
        "name": "nice",
        "min_score": 0.3,
        "max_score": None,
    }
    packed = _rows(run, "shards", ".")
    assert packed["classifier_nice"].min() >= 0.3  # type: ignore[operator]
    assert packed["classifier_plain"].to_numpy() == pytest.approx(
        1 / (1 + np.exp(-packed["classifier_nice"].to_numpy())), abs=1e-6
    )
    capsys.readouterr()
    assert main(["why", toml, dropped["key"][0]]) == 0
    score = scores.filter(key=dropped["key"][0])["classifier_nice"].item()
    said = capsys.readouterr().out
    assert f"dropped by filter_classes: classifier:nice ({round(score, 4)} < 0.3)" in said.replace("0000", "")
    assert "| classifier | min_score | 0.3 |" in data_section(str(run))

    monkeypatch.setattr(image_heads, "load", None)  # nothing is classified again
    text = (root / "my.toml").read_text(encoding="utf-8").replace("min_score = 0.3", "max_score = 0.3")
    (root / "my.toml").write_text(text, encoding="utf-8")
    assert start(toml, redo=True, last="filter_classes")[1] == 1
    again = _rows(run, "filter_classes", "dropped")
    assert set(again["key"]) == set(scores.filter(pl.col("classifier_nice") > 0.3)["key"])


def test_settings_are_checked(root: Path) -> None:
    text = (root / "my.toml").read_text(encoding="utf-8")
    for before, after, said in (
        ("[image_features]\nmodel", "[launch]\n#", "classifier: no features to classify"),
        ('name = "plain"', 'name = "nice"', "two have the name 'nice'"),
        ('name = "plain"', 'name = "a b"', "'a b' is no name"),
        ("min_score = 0.3", "min_score = 0.3\nmax_score = 0.1", "min_score 0.3 is above max_score 0.1"),
    ):
        assert before in text
        (root / "bad.toml").write_text(text.replace(before, after), encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            load(str(root / "bad.toml"))
    with pytest.raises(
        InputError, match=r"none\.pth: no such file; correct \[\[classifier\]\] weights of nsfw"
    ):
        image_heads.identify(head(root / "none.pth"))
