"""Exact top-k against a full sort of exact scores, with ties, tiny galleries and a collapsed model."""

import numpy as np
import numpy.typing as npt
import pytest

from eval.index import exact_search, gpu_search
from eval.index.exact_search import top_k
from eval.metrics.recall import exact_scores


def unit(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return found


def by_sorting(
    query_QD: npt.NDArray[np.float32], gallery_ND: npt.NDArray[np.float32], k: int
) -> npt.NDArray[np.int64]:
    rows = []
    for query_D in query_QD:
        scores = exact_scores(np.broadcast_to(query_D, gallery_ND.shape), gallery_ND)
        rows.append(np.lexsort((np.arange(len(scores)), -scores))[:k])
    return np.array(rows)


@pytest.fixture(params=["NumPy", "torch"], autouse=True)
def _products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a GPU's code compute on the CPU, in small blocks and for few queries at once."""
    if request.param == "torch":
        monkeypatch.setattr(exact_search, "torch_device", lambda: "cpu")
        monkeypatch.setattr(gpu_search, "MAX_BLOCK_ROWS", 300)
        monkeypatch.setattr(gpu_search, "_MAX_SCORES", 2400)


@pytest.mark.parametrize(
    ("num_rows", "k"), [(1, 1), (7, 7), (10, 10), (63, 10), (641, 10), (5000, 10), (5000, 1)]
)
def test_equal_to_a_full_sort(num_rows: int, k: int) -> None:
    rng = np.random.default_rng(num_rows)
    # few distinct directions: many exact ties, also across the k-th place
    gallery_ND = unit(rng.integers(-2, 3, size=(num_rows, 8)) + 0.25)
    query_QD = unit(rng.integers(-2, 3, size=(30, 8)) + 0.25)
    scores, rows = top_k(query_QD, gallery_ND, k)
    assert np.array_equal(rows, by_sorting(query_QD, gallery_ND, k))
    assert (np.diff(scores, axis=1) <= 0).all()


def test_near_ties_beyond_float32_are_settled() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 512))
    gallery_ND = unit(base + 1e-6 * rng.normal(size=(2000, 512)))
    query_QD = unit(base + 1e-6 * rng.normal(size=(20, 512)))
    assert np.array_equal(top_k(query_QD, gallery_ND, 10)[1], by_sorting(query_QD, gallery_ND, 10))


def test_a_collapsed_model_gives_the_lowest_rows() -> None:
    gallery_ND = np.tile(unit(np.ones((1, 16))), (3000, 1))
    assert top_k(gallery_ND[:5], gallery_ND, 10)[1].tolist() == [list(range(10))] * 5


def test_k_above_the_gallery_is_refused() -> None:
    rows = unit(np.ones((3, 4)))
    with pytest.raises(ValueError, match="4 rows of width 4 asked from a gallery of 3"):
        top_k(rows, rows, 4)
