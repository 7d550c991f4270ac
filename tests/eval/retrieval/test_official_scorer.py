"""The official scorer's twin, against the official scorer itself on random and adversarial files."""

import json
import os
import random
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from eval.retrieval.official_scorer import score_files
from pipeline import cli as command_line

needs_peer = pytest.mark.skipif(find_spec("cn_clip") is None, reason="cn_clip is not installed")

KEYS = {"t2i": ("text_id", "image_ids"), "i2t": ("image_id", "text_ids")}


@cache
def script(name: str) -> CodeType:
    """The code of one of the reference's scripts."""
    import cn_clip

    path = Path(cn_clip.__file__).parent / "eval" / name
    return compile(path.read_bytes(), path, "exec")


def official(direction: str, reference: Path, predictions: Path, out: Path) -> dict[str, Any]:
    """Run the reference's script as it is, in this process."""
    name = {"t2i": "evaluation.py", "i2t": "evaluation_tr.py"}[direction]
    saved = sys.argv
    sys.argv = [name, str(reference), str(predictions), str(out)]
    try:
        exec(script(name), {"__name__": "__main__"})
    finally:
        sys.argv = saved
    body: dict[str, Any] = json.loads(out.read_text())
    return body


def write(path: Path, records: list[Any]) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def random_case(rng: random.Random, direction: str) -> tuple[list[Any], list[Any]]:
    """A reference and predictions; about half of the cases have something wrong with them."""
    query_key, gallery_key = KEYS[direction]
    gallery = rng.sample(range(-5, 400), rng.choice([3, 7, 9, 10, 12, 30, 100]))
    queries = rng.sample(range(1000), rng.randint(1, 12))
    reference: list[Any] = [
        {query_key: query, gallery_key: rng.choices(gallery, k=rng.choice([0, 1, 1, 1, 2, 5]))}
        for query in queries
    ]
    predictions: list[Any] = []
    for query, record in zip(queries, reference, strict=True):
        best = record[gallery_key][:1] if rng.random() < 0.6 else []
        others = [item for item in gallery if item not in best]
        found = (best + rng.sample(others, len(others)))[:10]
        if len(found) == 10:
            place = rng.randrange(10)
            found[0], found[place] = found[place], found[0]
        predictions.append({query_key: query, gallery_key: found})
    rng.shuffle(predictions)
    trouble = rng.random()
    victim = rng.randrange(len(predictions))
    if trouble < 0.05:
        predictions.pop(victim)
    elif trouble < 0.10:
        predictions[victim][gallery_key][-1:] = [str(predictions[victim][gallery_key][-1])]
    elif trouble < 0.15:
        predictions[victim][gallery_key][-1] = predictions[victim][gallery_key][0]
    elif trouble < 0.20:
        predictions.append({query_key: queries[0], gallery_key: rng.sample(range(400), 10)})
    elif trouble < 0.25:
        predictions.append({query_key: 5000, gallery_key: rng.sample(range(400), 10)})
    elif trouble < 0.28:
        predictions[victim][query_key] = str(predictions[victim][query_key])
    elif trouble < 0.31:
        predictions.insert(
            victim, rng.choice(["", "{", "nonsense", "[]", "[1, 2]", "null", "3", '"text_id"'])
        )
    elif trouble < 0.34:
        predictions[victim][gallery_key] = rng.choice([None, 7, {"a": 1}, "0123456789"])
    elif trouble < 0.37:
        predictions[victim].pop(rng.choice([query_key, gallery_key]))
    elif trouble < 0.39:
        predictions[victim][gallery_key] = [True, False, *range(2, 10)]
    elif trouble < 0.41:
        reference[0][gallery_key] = [float(item) for item in reference[0][gallery_key]]
    elif trouble < 0.43:
        reference.insert(1, rng.choice(["", "{", json.dumps({query_key: 1}), "[]"]))
    elif trouble < 0.45:
        reference.append({query_key: queries[0], gallery_key: [gallery[0]]})
    elif trouble < 0.46:
        reference.clear()
    return reference, predictions


@needs_peer
def test_equal_to_the_official_scorer_on_a_thousand_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand waits for the disk say nothing here
    rng = random.Random(7)
    reference, predictions = tmp_path / "reference.jsonl", tmp_path / "predictions.jsonl"
    outcomes = []
    for case in range(1000):
        direction = ("t2i", "i2t")[case % 2]
        records = random_case(rng, direction)
        write(reference, records[0])
        write(predictions, records[1])
        ours = score_files(str(reference), str(predictions), str(tmp_path / "ours.json"))
        theirs = official(direction, reference, predictions, tmp_path / "theirs.json")
        found = json.loads((tmp_path / "ours.json").read_text())
        assert found == ours.body
        assert found.keys() == theirs.keys()
        if theirs["success"]:
            assert found == theirs, records
        else:
            assert {**found, "errorMsg": "", "errorDetail": ""} == {
                **theirs, "errorMsg": "", "errorDetail": ""
            }, records  # fmt: skip
        outcomes.append(theirs["success"])
    capsys.readouterr()
    assert 300 < sum(outcomes) < 700
    assert {case for case, success in enumerate(outcomes) if success and case % 2}  # both directions


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    write(tmp_path / "r.jsonl", [{"text_id": 1, "text": "猫", "image_ids": [3, 5]}])
    write(tmp_path / "p.jsonl", [{"text_id": 1, "image_ids": [9, 5, 3, 10, 11, 12, 13, 14, 15, 16]}])
    return tmp_path / "r.jsonl", tmp_path / "p.jsonl", tmp_path / "out.json"


def test_command_and_score_file(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["score", *map(str, files)]) == 0
    assert "text-to-image" in capsys.readouterr().out
    score = (0 + 1.0 + 1.0) / 3.0 * 100
    assert json.loads(files[2].read_text()) == {
        "success": True,
        "score": score,
        "scoreJson": {"score": score, "mean_recall": score, "r1": 0.0, "r5": 100.0, "r10": 100.0},
    }


def test_a_failed_score_exits_1_and_says_why(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write(files[1], [{"text_id": 2, "image_ids": list(range(10))}])
    assert command_line.main(["score", *map(str, files)]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "text_ids have no prediction in your submission, please check again: 1" in captured.err
    assert json.loads(files[2].read_text())["success"] is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image_id": 3, "text_ids": [1]}', "these predictions are of the other direction"),
        ('{"text_id": "1", "image_ids": []}', "Found an invalid text_id '1'"),
        ('{"text_id": 1, "image_ids": [1]}', "Require 10, but 1 founded"),
        ("\ufeff{", "Cannot parse"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(
    files: tuple[Path, Path, Path], line: str, message: str
) -> None:
    write(files[1], [line])
    body = score_files(*map(str, files)).body
    assert body["errorMsg"].startswith(f"{files[1]}:1: ")
    assert message in body["errorMsg"]


def test_repeated_and_foreign_ids_are_noted(files: tuple[Path, Path, Path]) -> None:
    record = json.loads(files[1].read_text())
    write(files[1], [record, record, {**record, "text_id": 8}])
    result = score_files(*map(str, files))
    assert result.success
    assert len(result.notes) == 2


def test_a_missing_file_is_a_failed_score(files: tuple[Path, Path, Path]) -> None:
    files[0].unlink()
    body = score_files(*map(str, files)).body
    assert body["errorMsg"] == f"{files[0]}: the file is not found"
