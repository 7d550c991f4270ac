"""FAISS search: exact order with ties, equal files for equal vectors, and plain errors."""

from pathlib import Path

import numpy as np
import pytest

from eval.features.layout import read_vectors
from eval.index import flat as index_module
from eval.index.flat import build_index, read_index, search
from eval.metrics.recall import exact_scores
from pipeline.core.records import InputError


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def saved(path: Path, vectors: np.ndarray) -> str:
    np.save(path, vectors)
    return str(path)


def plain_search(queries: np.ndarray, gallery: np.ndarray, k: int) -> list[list[int]]:
    scores = [exact_scores(np.broadcast_to(query, gallery.shape), gallery) for query in queries]
    return [sorted(range(len(gallery)), key=lambda row: (-score[row], row))[:k] for score in scores]


@pytest.mark.parametrize("distinct", [1, 3, 900])
def test_ties_are_ordered_by_row_however_many_there_are(
    tmp_path: Path, distinct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(distinct)
    gallery = unit(rng.normal(size=(distinct, 48)))[rng.integers(0, distinct, 900)]
    queries = unit(rng.normal(size=(21, 48)))
    monkeypatch.setattr(index_module, "_QUERIES_PER_BATCH", 8)
    build_index(saved(tmp_path / "v.npy", gallery), str(tmp_path / "v.index"))
    scores, rows = search(read_index(str(tmp_path / "v.index")), queries, 10)
    assert rows.tolist() == plain_search(queries, gallery, 10)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_same_vectors_same_bytes(tmp_path: Path) -> None:
    vectors = saved(tmp_path / "v.npy", unit(np.random.default_rng(0).normal(size=(50, 16))))
    build_index(vectors, str(tmp_path / "a.index"))
    build_index(vectors, str(tmp_path / "b.index"))
    assert (tmp_path / "a.index").read_bytes() == (tmp_path / "b.index").read_bytes()


def test_other_factories_are_trained_and_searched(tmp_path: Path) -> None:
    gallery = unit(np.random.default_rng(0).normal(size=(400, 16)))
    build_index(saved(tmp_path / "v.npy", gallery), str(tmp_path / "v.index"), factory="IVF4,Flat")
    _, rows = search(read_index(str(tmp_path / "v.index")), gallery[:50], 5)
    assert np.mean(rows[:, 0] == np.arange(50)) == 1.0


def test_an_index_keeps_parameters_that_its_rows_choose_and_queries_measure(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gallery = saved(tmp_path / "images.npy", unit(rng.normal(size=(900, 16))))
    queries = saved(tmp_path / "texts.npy", unit(rng.normal(size=(200, 16)) + 0.5))
    tuned = build_index(gallery, str(tmp_path / "v.index"), factory="IVF16,SQ8,RFlat", queries_path=queries)
    assert tuned is not None
    assert tuned.reached
    assert (tuned.num_queries, tuned.num_tuned, tuned.target) == (200, 900, 0.99)
    _, found = search(read_index(str(tmp_path / "v.index")), np.load(queries), 10)
    exact = plain_search(np.load(queries), np.load(gallery), 10)
    shares = [np.isin(one, other).mean() for one, other in zip(found, exact, strict=True)]
    assert np.mean(shares) == pytest.approx(tuned.recall, abs=1e-6)
    # Other queries change what is measured, and not a byte of the index.
    others = saved(tmp_path / "others.npy", unit(rng.normal(size=(150, 16)) - 0.9))
    again = build_index(gallery, str(tmp_path / "w.index"), factory="IVF16,SQ8,RFlat", queries_path=others)
    assert again is not None
    assert again.parameters == tuned.parameters
    assert again.recall != tuned.recall
    assert (tmp_path / "v.index").read_bytes() == (tmp_path / "w.index").read_bytes()
    assert build_index(gallery, str(tmp_path / "x.index"), queries_path=queries) is None


def test_bad_vectors_are_refused(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(5, 4)))
    broken = vectors.copy()
    broken[3, 1] = np.nan
    with pytest.raises(
        InputError, match=r"bad\.npy: 1 of 5 features are NaN or infinite, the first in row 3"
    ):
        read_vectors(saved(tmp_path / "bad.npy", broken))
    with pytest.raises(InputError, match=r"row 0 has norm 2\.0000"):
        read_vectors(saved(tmp_path / "long.npy", vectors * 2))
    with pytest.raises(InputError, match="found float64"):
        read_vectors(saved(tmp_path / "double.npy", vectors.astype(np.float64)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "bad.npy").read_bytes()[:100])
    with pytest.raises(InputError, match=r"cut\.npy: not a readable"):
        read_vectors(str(tmp_path / "cut.npy"))


def test_bad_index_files_and_factories_are_refused(tmp_path: Path) -> None:
    vectors = saved(tmp_path / "v.npy", unit(np.random.default_rng(0).normal(size=(5, 4))))
    with pytest.raises(InputError, match=r"^FAISS refuses the index 'Nonsense' at width") as caught:
        build_index(vectors, str(tmp_path / "v.index"), factory="Nonsense")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        read_index(str(tmp_path / "v.index"))
    build_index(vectors, str(tmp_path / "v.index"))
    (tmp_path / "v.index").write_bytes((tmp_path / "v.index").read_bytes()[:60])
    with pytest.raises(InputError, match="not a readable FAISS index"):
        read_index(str(tmp_path / "v.index"))


def test_asking_for_more_rows_than_there_are_is_refused(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(5, 4)))
    build_index(saved(tmp_path / "v.npy", vectors), str(tmp_path / "v.index"))
    with pytest.raises(ValueError, match="10 rows of width 4 asked from an index of 5 rows"):
        search(read_index(str(tmp_path / "v.index")), vectors, 10)
