"""CN-CLIP's feature files: read, written, and turned into predictions as its own scripts do."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from eval.retrieval import official_files as official
from eval.retrieval.official_files import predict, read_features, write_features
from pipeline import cli as command_line
from pipeline.core.records import InputError

needs_peer = pytest.mark.skipif(find_spec("cn_clip") is None, reason="cn_clip is not installed")


def unit_rows(count: int, seed: int) -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)
    unit: npt.NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    ids = np.random.default_rng(2).permutation(1000)
    images, texts = str(tmp_path / "valid_imgs.img_feat.jsonl"), str(tmp_path / "valid_texts.txt_feat.jsonl")
    write_features(images, "image_id", ids[:60], unit_rows(60, 0))
    write_features(texts, "text_id", ids[60:100], unit_rows(40, 1))
    return images, texts


def test_what_is_written_is_read_to_the_bit(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official, "_LINES_PER_BLOCK", 7)
    found = read_features(files[0], "image_id")
    ids = np.random.default_rng(2).permutation(1000)[:60]
    np.testing.assert_array_equal(found.ids, np.sort(ids))
    np.testing.assert_array_equal(found.vectors_ND, unit_rows(60, 0)[np.argsort(ids)])


@needs_peer
@pytest.mark.parametrize("image_to_text", [False, True])
def test_predictions_equal_the_peers(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_to_text: bool
) -> None:
    import cn_clip

    script = "make_topk_predictions_tr.py" if image_to_text else "make_topk_predictions.py"
    theirs, ours = tmp_path / "theirs.jsonl", tmp_path / "ours.jsonl"
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(
        sys,
        "argv",
        [script, f"--image-feats={files[0]}", f"--text-feats={files[1]}", f"--output={theirs}", "--top-k=10"],
    )
    runpy.run_path(str(Path(cn_clip.__file__).parent / "eval" / script), run_name="__main__")
    words = ["predict", *files, str(ours), *(["--image-to-text"] if image_to_text else [])]
    assert command_line.main(words) == 0
    query = "image_id" if image_to_text else "text_id"
    expected = sorted(
        (json.loads(line) for line in theirs.read_text().splitlines()), key=lambda record: record[query]
    )
    assert [json.loads(line) for line in ours.read_text().splitlines()] == expected


def test_from_feature_files_to_scores(files: tuple[str, str], tmp_path: Path) -> None:
    predictions, reference = str(tmp_path / "p.jsonl"), tmp_path / "r.jsonl"
    assert command_line.main(["predict", *files, predictions]) == 0
    first = [json.loads(line) for line in Path(predictions).read_text().splitlines()]
    answers = [{"text_id": item["text_id"], "image_ids": item["image_ids"][4:5]} for item in first]
    reference.write_text("\n".join(map(json.dumps, answers)))
    out = tmp_path / "out.json"
    assert command_line.main(["score", str(reference), predictions, str(out)]) == 0
    scores = json.loads(out.read_text())["scoreJson"]
    assert (scores["r1"], scores["r5"], scores["r10"]) == (0.0, 100.0, 100.0)


def test_equal_scores_go_by_lower_id(tmp_path: Path) -> None:
    one = np.eye(1, 4, dtype=np.float32)
    images, texts = str(tmp_path / "i.jsonl"), str(tmp_path / "t.jsonl")
    write_features(images, "image_id", np.array([9, 3, 5]), np.repeat(one, 3, axis=0))
    write_features(texts, "text_id", np.array([1]), one)
    predict(images, texts, str(tmp_path / "p.jsonl"), image_to_text=False, k=3)
    assert json.loads((tmp_path / "p.jsonl").read_text()) == {"text_id": 1, "image_ids": [3, 5, 9]}


GOOD = '{"image_id": 1, "feature": [1.0, 0.0]}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"image_id": "2", "feature": [1.0, 0.0]}'], ":2: image_id '2' is not a 64-bit integer"),
        ([GOOD, '{"image_id": 2, "feature": [NaN, 0.0]}'], ":2: the feature of image_id 2 has NaN"),
        ([GOOD, '{"image_id": 2, "feature": [1.0]}'], ":2: 1 numbers, but the first line has 2"),
        ([GOOD, '{"text_id": 2, "feature": [1.0, 0.0]}'], ':2: expected {"image_id", "feature"}'),
        ([GOOD, "nonsense"], ":2: not a line of JSON"),
        ([GOOD, ""], ":2: not a line of JSON"),
        ([GOOD, '{"image_id": 2, "feature": ["1", "0"]}'], ":2: feature must be a list of numbers"),
        ([GOOD, '{"image_id": 2, "feature": null}'], ":2: feature must be a list of numbers"),
        ([GOOD, GOOD], "image_id 1 occurs twice"),
        ([GOOD, '{"image_id": 2, "feature": [1.0, 1.0]}'], "row 1 has norm 1.4142"),
        ([], "holds no features"),
    ],
)
def test_bad_feature_files_are_said_in_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(InputError) as caught:
        read_features(str(path), "image_id")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_k_above_the_gallery_and_two_models(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "p.jsonl")
    assert command_line.main(["predict", *files, out, "--top-k", "61"]) == 1
    assert "k = 61, but the gallery holds 60" in capsys.readouterr().err
    assert command_line.main(["predict", files[0], str(tmp_path / "none.jsonl"), out]) == 1
    write_features(files[1], "text_id", np.array([1]), np.eye(1, 8, dtype=np.float32))
    assert command_line.main(["predict", *files, out]) == 1
    errors = capsys.readouterr().err
    assert "none.jsonl: cannot be read" in errors
    assert "they are of two models" in errors
