"""Exact neighbours, the files that hold them, and recall as the published evaluators count it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from eval.index.embeddings import Embeddings
from eval.index.metric import Metric
from eval.index.truth import (
    Truth,
    check_truth,
    exact_neighbours,
    read_truth,
    recall_of,
    recall_of_ann_benchmarks,
    recall_of_big_ann,
    without_own,
    write_truth,
)
from pipeline.core.records import InputError

DIM = 24


def unit_rows(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def saved(
    rows: npt.NDArray[np.float32], folder: Path, files: int = 1, metric: Metric = "cosine"
) -> Embeddings:
    (folder / "rows").mkdir()
    for number, part in enumerate(np.array_split(rows, files)):
        np.save(folder / "rows" / f"{number}.npy", part)
    return Embeddings.open(str(folder / "rows"), metric=metric)


def test_neighbours_are_those_of_a_full_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.index.truth._BLOCK_ROWS", 70)
    rows, queries = unit_rows(500), unit_rows(30, seed=1)
    truth = exact_neighbours(saved(rows, tmp_path, files=12), queries, 7)
    assert np.array_equal(truth.rows_QK, np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :7])
    assert truth.scores_QK is not None
    expected = np.take_along_axis(queries @ rows.T, truth.rows_QK, axis=1)
    np.testing.assert_allclose(truth.scores_QK, expected, atol=1e-6)


@pytest.mark.parametrize(("num_rows", "k"), [(500, 7), (500, 100), (60, 60)])
def test_torch_finds_what_faiss_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, k: int
) -> None:
    """Rows have four values of 0.5 or -0.5: float32 products are exact, and many rows have equal scores."""
    random = np.random.default_rng(0)
    values = np.zeros((num_rows + 30, DIM), np.float32)
    values[:, :4] = random.choice([-0.5, 0.5], (num_rows + 30, 4))
    rows, queries = np.split(random.permuted(values, axis=1), [num_rows])
    embeddings = saved(rows, tmp_path, files=3)
    by_faiss = exact_neighbours(embeddings, queries, k)
    monkeypatch.setattr("eval.index.truth.torch_device", lambda: "cpu")
    monkeypatch.setattr("eval.index.gpu_search.MAX_BLOCK_ROWS", 70)
    by_torch = exact_neighbours(embeddings, queries, k)
    assert by_torch.scores_QK is not None
    assert by_faiss.scores_QK is not None
    assert by_torch.scores_QK.dtype == np.float32
    np.testing.assert_allclose(by_torch.scores_QK, by_faiss.scores_QK, atol=1e-6)
    # FAISS takes any of the rows that share the k-th score; torch the lowest, as a stable sort does.
    is_above = by_faiss.scores_QK > by_faiss.scores_QK[:, -1:]
    assert np.array_equal(by_torch.rows_QK[is_above], by_faiss.rows_QK[is_above])
    assert np.array_equal(by_torch.rows_QK, np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :k])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_with_torch_each_metric_has_the_neighbours_of_a_full_sort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric
) -> None:
    rows, queries = unit_rows(200) * np.linspace(1, 9, 200, dtype=np.float32)[:, None], unit_rows(20, seed=1)
    monkeypatch.setattr("eval.index.truth.torch_device", lambda: "cpu")
    truth = exact_neighbours(saved(rows, tmp_path, files=3, metric=metric), queries, 7)
    score_QN = queries @ rows.T if metric == "ip" else -np.square(queries[:, None] - rows).sum(axis=-1)
    assert np.array_equal(truth.rows_QK, np.argsort(-score_QN, axis=1, kind="stable")[:, :7])


def test_recall_counts_each_row_once(tmp_path: Path) -> None:
    embeddings, queries = saved(unit_rows(12), tmp_path), unit_rows(2)
    truth = exact_neighbours(embeddings, queries, 3)
    exact = truth.rows_QK
    worst = int(np.argsort(unit_rows(12) @ queries[0])[0])
    found = np.array([[exact[0, 2], worst, exact[0, 0]], [-1, exact[1, 1], exact[1, 1]]])
    recall = recall_of(embeddings, queries, found, truth)
    assert recall.strict == recall.with_ties == pytest.approx(3 / 6)


def test_copies_count_only_with_ties(tmp_path: Path) -> None:
    """Twelve rows, four times each: which copies an index returns says nothing against it."""
    embeddings, queries = saved(np.tile(unit_rows(12), (4, 1)), tmp_path), unit_rows(12)
    truth = exact_neighbours(embeddings, queries, 2)
    copies = recall_of(embeddings, queries, (truth.rows_QK + 24) % 48, truth)
    assert (copies.strict, copies.with_ties) == (0, 1)
    others = recall_of(embeddings, queries, (truth.rows_QK + 1) % 48, truth)
    assert (others.strict, others.with_ties) == (0, 0)


def test_recall_is_that_of_the_published_evaluators(tmp_path: Path) -> None:
    """big-ann-benchmarks: ids in common, with all ids that tie with the k-th within 1e-6."""
    rng = np.random.default_rng(3)
    rows = unit_rows(300)
    rows[150:] = rows[:150]  # a tie for every row
    embeddings, queries, k = saved(rows, tmp_path), unit_rows(40, seed=1), 5
    longer = exact_neighbours(embeddings, queries, 20)
    found = np.stack([rng.permutation(longer.rows_QK[query, :10])[:k] for query in range(40)])
    assert longer.scores_QK is not None
    strict = with_ties = 0
    for query in range(40):
        least = longer.scores_QK[query, k - 1]
        near = longer.rows_QK[query][np.abs(longer.scores_QK[query] - least) < 1e-6]
        strict += len({*longer.rows_QK[query, :k].tolist()} & {*found[query].tolist()})
        with_ties += len({*longer.rows_QK[query, :k].tolist(), *near.tolist()} & {*found[query].tolist()})
    recall = recall_of(embeddings, queries, found, longer)
    assert strict < with_ties < 40 * k
    assert recall.strict == pytest.approx(strict / (40 * k), abs=1e-4)
    assert recall.with_ties == pytest.approx(with_ties / (40 * k), abs=1e-4)


def test_own_rows_are_no_answers() -> None:
    truth = Truth(np.array([[5, 1, 2], [0, 1, 2], [8, 9, 7]]), np.array([[3, 2, 1]] * 3, np.float32))
    rest = without_own(truth, np.array([5, 2, 4]))
    assert rest.rows_QK.tolist() == [[1, 2], [0, 1], [8, 9]]
    assert rest.scores_QK is not None
    assert rest.scores_QK.tolist() == [[2, 1], [3, 2], [3, 2]]


def test_files_hold_what_was_found(tmp_path: Path) -> None:
    rows, queries = unit_rows(100), unit_rows(9, seed=1)
    embeddings = saved(rows, tmp_path)
    truth = exact_neighbours(embeddings, queries, 6)
    paths = {name: str(tmp_path / name) for name in ("a.ibin", "ids.ibin", "a.ivecs")}
    write_truth(paths["a.ibin"], truth)
    assert truth.scores_QK is not None
    head = np.array([9, 6], "<u4").tobytes()
    ids = truth.rows_QK.astype("<u4")
    assert Path(paths["a.ibin"]).read_bytes() == head + ids.tobytes() + truth.scores_QK.tobytes()
    Path(paths["ids.ibin"]).write_bytes(head + ids.tobytes())
    np.insert(ids, 0, 6, axis=1).tofile(paths["a.ivecs"])
    for path in paths.values():
        read = read_truth(path, num_queries=8, num_rows=100, k=5)
        assert np.array_equal(read.rows_QK, truth.rows_QK[:8])  # all neighbours of the first queries
        check_truth(path, embeddings, queries[:8], read)
        with pytest.raises(InputError, match=r"not in the order of their scores"):
            check_truth(path, embeddings, unit_rows(8, seed=2), read)
        with pytest.raises(InputError, match="6 neighbours of 9 queries, but 7 of 9"):
            read_truth(path, num_queries=9, num_rows=100, k=7)
        with pytest.raises(InputError, match="as a neighbour, but there are 50 rows"):
            read_truth(path, num_queries=9, num_rows=50, k=6)


def test_the_hdf5_of_ann_benchmarks_is_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["neighbors"] = np.arange(12, dtype=np.int32).reshape(3, 4)
    read = read_truth(str(tmp_path / "a.hdf5"), num_queries=3, num_rows=12, k=4)
    assert read.rows_QK.tolist() == np.arange(12).reshape(3, 4).tolist()


@pytest.mark.parametrize("data", [b"", b"\1\0\0\0", b"\2\0\0\0\3\0\0\0" + bytes(20), bytes(8)])
def test_what_is_no_ground_truth_is_refused(data: bytes, tmp_path: Path) -> None:
    for name in ("a.ibin", "a.ivecs", "a.hdf5"):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError, match=name):
            read_truth(str(path), num_queries=1, num_rows=9, k=1)
    with pytest.raises(InputError, match=r"none\.ibin"):
        read_truth(str(tmp_path / "none.ibin"), num_queries=1, num_rows=9, k=1)


def accepted_by_big_ann(rows: list[int], distances: list[float], k: int) -> set[int]:
    """Return which rows big-ann-benchmarks accepts, by its published definition.

    Neighbours closer than 1e-6 to the first of their group count as equal, and the first k groups count
    (https://github.com/harsha-simhadri/big-ann-benchmarks/blob/main/benchmark/plotting/metrics.py).
    """
    groups: list[tuple[float, list[int]]] = []
    for row, distance in zip(rows, distances, strict=True):
        if not groups or abs(distance - groups[-1][0]) >= 1e-6:
            groups.append((distance, []))
        groups[-1][1].append(row)
    return {row for _, members in groups[:k] for row in members}


def test_recalls_are_those_of_the_published_evaluators(tmp_path: Path) -> None:
    rng, k = np.random.default_rng(3), 10
    rows = unit_rows(400)
    rows[200:260] = rows[:60]  # ties in the first k and around the k-th
    queries = (rows[::8] + 0.2 * unit_rows(50, seed=2)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    base = saved(rows, tmp_path)
    write_truth(str(tmp_path / "truth.ibin"), exact_neighbours(base, queries, 30))
    truth = read_truth(str(tmp_path / "truth.ibin"), num_queries=50, num_rows=400, k=k)
    assert truth.rows_QK.shape == (50, 30)
    assert truth.scores_QK is not None
    # An index that misses some rows and finds some near misses.
    found = np.stack([rng.choice(each[:16], size=k, replace=False) for each in truth.rows_QK])
    found[::7, -1] = -1
    distances = 1 - np.einsum("qd,qkd->qk", queries, rows[found])
    distances[found < 0] = np.inf
    # ann-benchmarks: distances up to that of the k-th neighbour plus 0.001
    # (https://github.com/erikbern/ann-benchmarks/blob/main/ann_benchmarks/plotting/metrics.py).
    limit = 1 - truth.scores_QK[:, k - 1 : k] + 1e-3
    wanted = (distances <= limit).mean()
    assert recall_of_ann_benchmarks(base, queries, found, truth) == pytest.approx(wanted, abs=1e-4)
    hits, strict = 0, 0
    for exact, scores, answer in zip(truth.rows_QK, truth.scores_QK, found, strict=True):
        hits += len(accepted_by_big_ann(exact.tolist(), scores.tolist(), k) & set(answer.tolist()))
        strict += len(set(exact[:k].tolist()) & set(answer.tolist()))
    ours = recall_of(base, queries, found, truth)
    assert recall_of_big_ann(found, truth) == pytest.approx(hits / found.size, abs=1e-4)
    assert ours.strict == pytest.approx(strict / found.size, abs=1e-4)
    assert ours.strict < ours.with_ties <= recall_of_big_ann(found, truth)
    assert 0 < ours.error < 0.1
    with pytest.raises(ValueError, match="without scores"):
        recall_of_big_ann(found, Truth(truth.rows_QK))
