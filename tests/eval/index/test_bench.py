"""bench-index: several sets of queries, held-out rows, the task's recall, one process an index, resumed."""

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from benchmarks.eval.clip_like import ClipLike, write
from eval.index.bench import entry as measuring
from eval.index.bench.results import read_results
from eval.index.bench.task import ranks, read_labels
from eval.index.embeddings import Embeddings
from eval.index.tuning.queries import query_sets
from eval.index.views import Without
from eval.metrics.recall import Positives
from pipeline import cli as command_line
from pipeline.core.records import InputError

LIKE = ClipLike(dim=32, num_clusters=60)
ROWS, TEXTS = 3000, 300


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    faiss.omp_set_num_threads(1)
    folder = tmp_path_factory.mktemp("features")
    write(folder, LIKE, ROWS, TEXTS)
    return folder


def test_rows_that_are_held_out_are_nowhere(features: Path) -> None:
    base = Embeddings.open(str(features))
    whole_ND = LIKE.images(0, ROWS)
    held_out = np.array([0, 1, 7, 1500, ROWS - 1])
    view = Without(base, held_out)
    rest_ND = np.delete(whole_ND, held_out, axis=0)
    assert view.num_rows == len(rest_ND)
    for start, stop in ((0, 10), (3, 1499), (0, len(rest_ND)), (1400, len(rest_ND)), (5, 5)):
        parts = list(view.blocks(start, stop))
        assert np.array_equal(np.concatenate(parts) if parts else rest_ND[:0], rest_ND[start:stop])
    some = np.array([0, 3, 4, 5, 1495, 1496, 1497, len(rest_ND) - 1])
    assert np.array_equal(view.rows(some), rest_ND[some])
    assert np.array_equal(rest_ND[view.moved(np.array([2, 8, 1499, 1501]))], whole_ND[[2, 8, 1499, 1501]])


def _no_build(make_job: Any) -> Any:
    def made(entry: object, do: str, searches: object) -> object:
        assert do != "build"
        return make_job(entry, do, searches)

    return made


@pytest.mark.slow
def test_results_of_both_sides_and_of_the_task_are_kept_and_resumed(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["bench-index", str(features), "--num-queries", "150", "--threads", "1", "--out", str(out)]
    words += ["--rounds", "2", "--batch", "64"]
    words += ["--labels", str(features / "labels.npy"), "--recall", "0.9"]
    grid = ["--grid", "Flat;IVF16,Flat;Nonsense"]
    real, calls = measuring.recall_of, []

    def killed(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 5:  # in the second index
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "recall_of", killed)
        assert command_line.main([*words, *grid]) == 130
    assert len(read_results(str(out / "results.jsonl"))) == 4
    built = [path.stat().st_mtime_ns for path in sorted((out / "work").glob("*/index"))]
    assert len(built) == 2
    capsys.readouterr()
    with monkeypatch.context() as patch:  # only what is missing is built
        patch.setattr(measuring.Entry, "_job", _no_build(measuring.Entry._job))
        assert command_line.main([*words, *grid]) == 0
    captured = capsys.readouterr()
    assert "Flat: measured before" in captured.err
    assert "round 2 of 2: IVF16,Flat, load " in captured.err
    assert not (out / "work").exists()
    assert "left out: FAISS refuses the index 'Nonsense'" in captured.err
    assert "fastest with recall 0.9 within 4.0 GiB for text queries: " in captured.out
    points = json.loads((out / "points.json").read_text())
    assert len(points) == len(read_results(str(out / "results.jsonl"))) == 8
    found = {(p["factory"], p["parameters"], p["queries"]): p for p in points}
    assert found["Flat", "", "text"]["recall"] == found["Flat", "", "held-out"]["recall"] == 1.0
    few, held_out = (found["IVF16,Flat", "nprobe=1", name] for name in ("text", "held-out"))
    assert few["gap"] == pytest.approx(held_out["recall"] - few["recall"])
    assert 0 < few["recall"] < found["IVF16,Flat", "nprobe=16", "text"]["recall"] == 1.0
    assert held_out["task"] is None
    labels = np.load(features / "labels.npy")[::2]
    nearest_Q = (LIKE.texts(TEXTS, ROWS)[::2] @ LIKE.images(0, ROWS).T).argmax(axis=1)
    exact = found["Flat", "", "text"]["task"]["r1"]
    assert exact["value"] == pytest.approx(
        100 * (nearest_Q == labels).mean(), abs=2
    )  # some rows are held out
    assert exact["low"] < exact["value"] < exact["high"]
    assert few["task"]["r10"]["value"] < found["Flat", "", "text"]["task"]["r10"]["value"]
    assert "exact search" in captured.out
    assert "R@10 (loss)" in captured.out
    facts = read_results(str(out / "results.jsonl"))[0].facts
    assert (facts["k"], facts["threads"], facts["held_out"], facts["num_rows"]) == (10, 1, 150, ROWS - 150)
    assert few["distances"] < found["IVF16,Flat", "nprobe=16", "text"]["distances"] == ROWS - 150 + 16
    assert few["p95_ms"] >= few["p50_ms"] > 0 < few["cpu_ms"]
    assert few["p99_ms"] is not None  # of 100 searches
    rounds = few["rounds"]
    assert few["queries_per_second"] == pytest.approx(sum(each["queries_per_second"] for each in rounds) / 2)
    assert len({(each["session"], each["number"]) for each in rounds}) == 2
    assert "batches of 64; median of 2 rounds; load " in captured.out
    assert "text queries: a lead in recall counts from " in captured.out
    assert "IVF16,Flat reaches recall" not in captured.out
    svg = (out / "front.svg").read_text(encoding="utf-8")
    assert svg.count("<title>") == 4  # of the text queries
    assert "IVF16,Flat nprobe=4\nrecall 0." in svg
    page = (out / "front.html").read_text(encoding="utf-8")
    assert "{{" not in page
    assert page.count('id="point-') == 4
    assert len(list((out / "ground_truth").iterdir())) == 2
    other = [
        *words[:2],
        *words[6:8],
        "--rounds",
        "2",
        "--query-side",
        "held-out",
        "--grid",
        "Flat",
        "--centre",
    ]
    other += ["--merge", str(out)]
    assert command_line.main(other) == 0
    compared = capsys.readouterr().out
    assert "faiss " + faiss.__version__ in compared
    (centred,) = [line for line in compared.splitlines() if "Flat centred" in line]
    assert "held-out  1.0000" in centred
    assert compared.count("IVF16,Flat") == 6


@pytest.mark.slow
def test_the_memory_is_that_of_the_index(features: Path, tmp_path: Path) -> None:
    rows_ND = np.random.default_rng(0).normal(size=(60_000, 256)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True))
    out = str(tmp_path / "out")
    words = ["bench-index", str(tmp_path / "rows.npy"), "--grid", "Flat", "--num-queries", "5", "--out", out]
    assert command_line.main([*words, "--threads", "1", "--rounds", "2"]) == 0
    (found,) = json.loads((tmp_path / "out" / "points.json").read_text())
    num_bytes = found["bytes_per_vector"] * 59_995
    assert abs(found["resident_bytes"] - num_bytes) < 0.05 * num_bytes + (30 << 20)
    assert found["peak_bytes"] < 1.3 * num_bytes + (30 << 20)


def test_ground_truth_from_a_file(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries_QD = LIKE.texts(TEXTS, ROWS)[:40]
    np.save(tmp_path / "queries.npy", queries_QD)
    exact_QK = np.argsort(-(queries_QD @ LIKE.images(0, ROWS).T), axis=1)[:, :10].astype("<i4")
    np.insert(exact_QK, 0, 10, axis=1).astype("<i4").tofile(tmp_path / "truth.ivecs")
    words = ["bench-index", str(features), "--queries", str(tmp_path / "queries.npy"), "--grid", "Flat"]
    words += ["--threads", "1", "--rounds", "2", "--ground-truth", str(tmp_path / "truth.ivecs")]
    assert command_line.main(words) == 0
    assert "1.0000" in capsys.readouterr().out
    exact_QK[:, 0] = 5
    np.insert(exact_QK, 0, 10, axis=1).astype("<i4").tofile(tmp_path / "truth.ivecs")
    assert command_line.main(words) == 1
    assert "are not in the order of their scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--query-side", "image"], "--query-side image: the image features are the index"),
        (["--query-side", "texts"], "--query-side texts: give one of image, text, held-out"),
        (["--num-queries", "0"], "--num-queries 0: give at least 1"),
        (["--query-side", "held-out", "--num-queries", "5000"], "too few to hold 5000 out as queries"),
        (["--threads", "0"], "--threads 0: give at least 1"),
        (["--rounds", "1"], "--rounds 1: give at least 2"),
        (["--batch", "0"], "--batch 0: give at least 1"),
        (["--memory", "nan"], "--memory nan: must be greater than 0 GiB"),
        (["--ground-truth", "x.ibin"], "--ground-truth belongs to --queries FILE"),
        (["--k", "2951", "--num-queries", "50"], "k = 2951, but there are 2950 rows"),
        (["--labels", "labels.txt"], "labels.txt: of an unknown kind"),
        (["--labels", "none.npy"], "none.npy"),
    ],
)
def test_wrong_settings_are_one_line(
    more: list[str], message: str, features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["bench-index", str(features), *more]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_labels_of_a_set_map_ids_to_rows(tmp_path: Path) -> None:
    import polars as pl

    for folder, column, ids in (("metadata", "image_id", [7, 9]), ("text_metadata", "text_id", [1, 2, 3])):
        (tmp_path / folder).mkdir()
        pl.DataFrame({column: ids}).write_parquet(tmp_path / folder / "metadata_0.parquet")
    path = tmp_path / "a_texts.jsonl"
    lines = [(3, [7]), (1, [9]), (2, [7, 9])]
    path.write_text(
        "".join(json.dumps({"text_id": text, "text": "猫", "image_ids": ids}) + "\n" for text, ids in lines)
    )
    labels = read_labels(str(path), str(tmp_path), "image", 2)
    assert [rows.tolist() for rows in labels.rows_of_query] == [[1], [0, 1], [0]]
    labels = read_labels(str(path), str(tmp_path), "text", 3)
    assert [rows.tolist() for rows in labels.rows_of_query] == [[2, 1], [0, 1]]
    path.write_text('{"text_id": 1, "text": "猫", "image_ids": [8]}\n')
    with pytest.raises(InputError, match=r"a_texts\.jsonl:1: text 1 of image 8 is not among the features"):
        read_labels(str(path), str(tmp_path), "image", 2)
    np.save(tmp_path / "labels.npy", np.array([0, 5]))
    with pytest.raises(InputError, match="query 1 has the label 5, but there are 2 rows"):
        read_labels(str(tmp_path / "labels.npy"), str(tmp_path), "image", 2)


def test_rows_that_labels_name_are_not_held_out(features: Path) -> None:
    base = Embeddings.open(str(features))
    keep = list(np.arange(0, ROWS, 2)[:, None])
    text, held_out = query_sets(str(features), base, "image", 200, [], None, keep)
    assert (text.name, len(text), len(held_out)) == ("text", 200, 200)
    assert (held_out.rows_Q % 2 == 1).all()
    keep = list(np.arange(ROWS)[:, None])
    assert [each.name for each in query_sets(str(features), base, "image", 200, [], None, keep)] == ["text"]
    with pytest.raises(InputError, match="too few to hold 200 out"):
        query_sets(str(features), base, "image", 200, ["held-out"], None, keep)


def test_ranks_of_right_rows() -> None:
    found_QK = np.array([[3, 4, 5], [3, 4, 5], [-1, -1, 0]])
    positives = Positives.of([np.array([5, 4]), np.array([9]), np.array([0])])
    assert ranks(found_QK, positives).tolist() == [2, 11, 3]


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"facts": {}}\n')
    with pytest.raises(InputError, match=r"results\.jsonl:1: not a result"):
        read_results(str(tmp_path / "results.jsonl"))
