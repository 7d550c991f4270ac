"""Vectors in the files of big-ann-benchmarks, TEXMEX and ann-benchmarks, and results in their shapes."""

import struct
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

import cnclip
from eval.index.bench.points import Point
from eval.index.bench.timing import Round
from eval.index.embeddings import Embeddings
from eval.index.formats.export import Export
from eval.index.formats.files import open_matrix
from eval.index.partitioned import PartedIndex
from eval.index.tuning.queries import query_sets
from pipeline import cli as command_line
from pipeline.core.records import ConfigError, InputError

h5py = pytest.importorskip("h5py")

DIM = 16


def rows_of(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Whole numbers, which every format holds."""
    return np.random.default_rng(seed).integers(0, 100, (count, DIM))


def save(path: Path, rows_ND: npt.NDArray[np.int64]) -> str:
    """Write a file as the benchmarks' own code does."""
    kind = {"f": "<f4", "u": "u1", "i": "i1", "b": "u1"}[path.suffix[1]]
    kind = "<i4" if path.suffix == ".ivecs" else kind
    body = rows_ND.astype(kind)
    if path.suffix.endswith("bin"):
        path.write_bytes(np.array(rows_ND.shape, "<u4").tobytes() + body.tobytes())
    else:
        width = struct.pack("<i", rows_ND.shape[1])
        path.write_bytes(b"".join(width + row.tobytes() for row in body))
    return str(path)


def save_hdf5(path: Path, base: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], name: str) -> str:
    scores = {
        "euclidean": -((queries[:, None] - base[None]) ** 2).sum(axis=2),
        "angular": unit(queries) @ unit(base).T,
    }[name]
    with h5py.File(path, "w") as file:
        file.attrs["distance"] = name
        file.create_dataset("train", data=base, compression="gzip")
        file["test"] = queries
        nearest = np.argsort(-scores, axis=1, kind="stable")[:, :20]
        file["neighbors"] = nearest.astype(np.int32)
        best = np.take_along_axis(scores, nearest, axis=1)
        file["distances"] = (np.sqrt(-best) if name == "euclidean" else 1 - best).astype(np.float32)
    return str(path)


def unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("suffix", ["fbin", "u8bin", "i8bin", "fvecs", "bvecs", "ivecs"])
def test_files_of_benchmarks_are_read_and_damage_is_refused(suffix: str, tmp_path: Path) -> None:
    rows_ND = rows_of(50)
    path = save(tmp_path / f"rows.{suffix}", rows_ND)
    found = Embeddings.open(path, metric="l2")
    assert np.array_equal(np.concatenate(list(found.blocks(3, 47))), rows_ND[3:47])
    assert np.array_equal(found.rows(np.array([0, 9, 49])), rows_ND[[0, 9, 49]])
    assert np.allclose(Embeddings.open(path, metric="cosine").rows(np.array([7])), unit(rows_ND[[7]] * 1.0))
    with pytest.raises(ConfigError, match="give --metric cosine, ip or l2"):
        Embeddings.open(path)
    whole = Path(path).read_bytes()
    for damaged in (whole[:-1], whole[:5], b"", b"\xff" * 4 + whole[4:], b"\0" * 8 + whole[8:]):
        Path(path).write_bytes(damaged)
        with pytest.raises(InputError, match=rf"rows\.{suffix}"):
            Embeddings.open(path, metric="l2")
    if suffix.endswith("vecs"):
        record = len(whole) // 50
        Path(path).write_bytes(whole[: 30 * record] + b"\x07" + whole[30 * record + 1 :])
        with pytest.raises(InputError, match="row 30 has width 7, the first row has 16"):
            list(Embeddings.open(path, metric="l2").blocks(25, 40))


def test_a_column_of_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = unit(rows_of(300).astype(np.float32))
    path = tmp_path / "rows.parquet"
    lists = {
        "a": pa.array(list(rows), pa.list_(pa.float32())),
        "b": pa.FixedSizeListArray.from_arrays(pa.array(rows[::-1].ravel()), DIM),
    }
    pq.write_table(pa.table({"name": ["x"] * 300, **lists}), path, row_group_size=70)
    for column, wanted in (("a", rows), ("b", rows[::-1])):
        found = Embeddings.open(f"{path}:{column}")
        assert np.array_equal(np.concatenate(list(found.blocks(60, 290))), wanted[60:290])
        assert np.array_equal(found.rows(np.array([0, 69, 70, 299])), wanted[[0, 69, 70, 299]])
    with pytest.raises(InputError, match=r"2 such columns; give .*:COLUMN with one of a, b"):
        Embeddings.open(str(path))
    with pytest.raises(InputError, match="no column 'name' of lists of numbers"):
        Embeddings.open(f"{path}:name")
    pq.write_table(pa.table({"v": [[1.0, 2.0], [1.0]]}), path)
    with pytest.raises(InputError, match="1 numbers in row 1, 2 in the first"):
        list(Embeddings.open(str(path), metric="ip").blocks(0, 2))


def test_an_hdf5_file_that_promises_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "big.hdf5")
    with h5py.File(path, "w") as file:
        file.create_dataset("train", shape=(1 << 40, 128), dtype="f4", chunks=(16, 128))
        file.create_dataset("test", shape=(1 << 30, 8), dtype="f4", chunks=(16, 8), compression="gzip")
        file["flat"] = np.arange(3)
    for role in ("rows", "queries"):
        with pytest.raises(InputError, match="but only 0 bytes of it are in the file"):
            open_matrix(path, role)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="its attribute `distance` is None"):
        Embeddings.open(path)
    with h5py.File(path, "w") as file:
        file.attrs["distance"] = "jaccard"
    with pytest.raises(InputError, match="`distance` is jaccard, not one of angular"):
        Embeddings.open(path)


def ann_recall(path: Path, dataset: str, k: int) -> float:
    """ann-benchmarks' recall: distances up to the k-th true one, and a little more."""
    with h5py.File(path) as run, h5py.File(dataset) as truth:
        most = truth["distances"][:, k - 1] + 1e-3
        return float((run["distances"][:, :k] <= most[:, None]).mean())


def test_sift_as_it_is_published_and_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, queries = rows_of(2000).astype(np.float32), rows_of(60, seed=1).astype(np.float32)
    path = save_hdf5(tmp_path / "sift-16-euclidean.hdf5", base, queries, "euclidean")
    out = tmp_path / "out"
    words = ["bench-index", path, "--grid", "IVF4,Flat", "--threads", "1", "--out", str(out)]
    assert command_line.main([*words, "--rounds", "2", "--export", "ann-benchmarks"]) == 0
    assert "exact neighbours" not in capsys.readouterr().err  # they are the file's
    files = sorted((out / "ann-benchmarks").rglob("*.hdf5"))
    assert len(files) == 2
    points = {point["parameters"]: point for point in cnclip_points(out)}
    for file in files:
        with h5py.File(file) as run:
            setting = run.attrs["name"].split()[1]
            assert dict(run.attrs)["distance"] == "euclidean"
            fastest = max(timed["queries_per_second"] for timed in points[setting]["rounds"])
            assert run.attrs["best_search_time"] == pytest.approx(1 / fastest)
            assert run["neighbors"].shape == run["distances"].shape == (60, 10)
        assert ann_recall(file, path, 10) == pytest.approx(points[setting]["recall"], abs=1e-4)
        recall = points[setting]["ann_benchmarks_recall"]
        assert ann_recall(file, path, 10) == pytest.approx(recall, abs=1e-6)
    assert points["nprobe=4"]["recall"] == 1.0 > points["nprobe=1"]["recall"]
    export = Export("big-ann", str(out), path, 10)
    embeddings = Embeddings.open(path)
    (asking,) = query_sets(path, embeddings, "image", 60, [], None)
    with h5py.File(files[0]) as run:
        found = run["neighbors"][:].astype(np.int64)
    rounds = [Round("one", number, speed, 1.0, [1], 0.0) for number, speed in enumerate([80.0, 100.0])]
    point = Point(
        factory="SQ8",
        parameters="",
        recall=1.0,
        queries_per_second=90.0,
        build_seconds=1.0,
        bytes_per_vector=16.0,
        resident_bytes=0,
        rounds=tuple(rounds),
    )
    export.write(point, asking, embeddings, found)
    assert export.has("SQ8", "", asking)
    assert not export.has("SQ4", "", asking)
    with h5py.File(out / "big-ann/results/sift-16-euclidean/10/cnclip/SQ8.hdf5") as run:
        assert np.array_equal(run["neighbors"], found)
        assert run.attrs["best_search_time"] == pytest.approx(0.6)  # of all 60 queries in the fastest round
        assert run.attrs["type"] == "knn"


def cnclip_points(out: Path) -> list[dict[str, Any]]:
    import json

    found: list[dict[str, Any]] = json.loads((out / "points.json").read_text())
    return found


@pytest.mark.slow
def test_text2image_as_it_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    base, queries = rng.normal(size=(900, DIM)).astype("<f4"), rng.normal(size=(40, DIM)).astype("<f4")
    base *= rng.uniform(0.5, 2, size=(900, 1)).astype("<f4")  # inner products differ from cosines
    for name, rows in (("base.fbin", base), ("query.fbin", queries)):
        (tmp_path / name).write_bytes(np.array(rows.shape, "<u4").tobytes() + rows.tobytes())
    scores = queries @ base.T
    nearest = np.argsort(-scores, axis=1)[:, :100]
    best = np.take_along_axis(scores, nearest, axis=1).astype("<f4")
    truth = np.array([40, 100], "<u4").tobytes() + nearest.astype("<u4").tobytes() + best.tobytes()
    (tmp_path / "gt.ibin").write_bytes(truth)
    words = ["bench-index", str(tmp_path / "base.fbin"), "--metric", "ip", "--threads", "1"]
    words += ["--queries", str(tmp_path / "query.fbin"), "--ground-truth", str(tmp_path / "gt.ibin")]
    words += ["--num-queries", "20", "--grid", "Flat;HNSW32"]  # every second query, and its neighbours
    words += ["--out", str(tmp_path / "out"), "--rounds"]
    assert command_line.main([*words, "2"]) == 0
    (flat,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*  Flat")]
    assert flat.split()[2] == "1.0000"
    before = cnclip_points(tmp_path / "out")
    for rounds in (2, 3):  # exported after it was measured, and again with one round more
        assert command_line.main([*words, str(rounds), "--export", "big-ann"]) == 0
        files = list((tmp_path / "out" / "big-ann").rglob("*.hdf5"))
        points = cnclip_points(tmp_path / "out")
        assert len(files) == len(points) == len(before)
        for file in files:
            with h5py.File(file) as run:
                assert run.attrs["run_count"] == rounds
        for point, old in zip(points, before, strict=True):
            assert point["rounds"][:2] == old["rounds"]
            assert len(point["rounds"]) == rounds
    assert command_line.main([*words[:3], "l2", *words[4:], "2"]) == 1
    assert "of other vectors, other queries or another metric" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_an_index_of_another_metric_answers_by_it(metric: str, tmp_path: Path) -> None:
    base, queries = rows_of(600).astype(np.float32), rows_of(9, seed=2).astype(np.float32)
    index = cnclip.Index.build(
        base,
        tmp_path / "index",
        factory="IVF8,Flat",
        rows_per_part=250,
        metric=metric,
        recall=0.99,  # type: ignore[arg-type]
    )
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    scores, rows = faiss.knn(queries, base, 5, metric=kind)
    found_scores, found_rows = index.search(queries, 5, parameters="nprobe=8")
    assert np.allclose(found_scores, scores)
    assert (found_rows == rows).mean() > 0.9  # equal scores in another order
    assert PartedIndex.open(str(tmp_path / "index")).metric == metric
    with pytest.raises(ConfigError, match="other embeddings or settings"):
        cnclip.Index.build(
            base / np.linalg.norm(base, axis=1, keepdims=True), tmp_path / "index", factory="IVF8,Flat"
        )


def test_vectors_that_no_metric_takes(tmp_path: Path) -> None:
    rows = np.zeros((4, DIM), np.float32)
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(InputError, match="row 0 is all zeros, which has no cosine"):
        list(Embeddings.open(str(tmp_path / "rows.npy"), metric="cosine").blocks(0, 4))
    rows[2, 1] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(InputError, match="NaN or infinite, the first in row 2"):
        list(Embeddings.open(str(tmp_path / "rows.npy"), metric="l2").blocks(0, 4))
    with pytest.raises(ConfigError, match="--centre is for inner products"):
        cnclip.Index.build(
            np.eye(4, dtype=np.float32), tmp_path / "i", metric="l2", centre=True, factory="SQ8"
        )
