"""Recall against a plain loop; ties; several positives; chance in closed form against simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics.recall import (
    Positives,
    chance_recall_at_k,
    exact_scores,
    ranks_from_features,
    ranks_from_scores,
    recall_at_k,
    retrieval_scores,
)


def plain_ranks(scores: np.ndarray, positives: list[np.ndarray]) -> list[int]:
    """The documented rule, word by word."""
    ranks = []
    for row, right in zip(scores, positives, strict=True):
        order = sorted(range(len(row)), key=lambda column: (-row[column], column))
        ranks.append(1 + min(order.index(column) for column in right))
    return ranks


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def random_positives(rng: np.random.Generator, queries: int, gallery: int) -> list[np.ndarray]:
    return [np.sort(rng.choice(gallery, rng.integers(1, 4), replace=False)) for _ in range(queries)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_ranks_follow_the_rule_with_many_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (6, 12)).astype(np.float64)
    positives = random_positives(rng, 6, 12)
    assert ranks_from_scores(scores, Positives.of(positives)).tolist() == plain_ranks(scores, positives)


@pytest.mark.parametrize("dim", [3, 64, 257])
def test_feature_ranks_settle_duplicates_by_row(dim: int) -> None:
    rng = np.random.default_rng(0)
    gallery = unit(rng.normal(size=(40, dim)))[rng.integers(0, 40, 500)]  # each vector about 12 times
    queries = unit(rng.normal(size=(30, dim)))
    positives = random_positives(rng, 30, 500)
    exact = np.stack([exact_scores(np.broadcast_to(query, gallery.shape), gallery) for query in queries])
    assert ranks_from_features(queries, gallery, Positives.of(positives)).tolist() == plain_ranks(
        exact, positives
    )


def test_feature_ranks_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    gallery, queries = unit(rng.normal(size=(50, 8))), unit(rng.normal(size=(33, 8)))
    positives = Positives.of(random_positives(rng, 33, 50))
    whole = ranks_from_features(queries, gallery, positives)
    monkeypatch.setattr("eval.metrics.recall._BLOCK_ELEMENTS", 120)
    assert ranks_from_features(queries, gallery, positives).tolist() == whole.tolist()


def test_a_collapsed_model_ranks_by_row() -> None:
    same = unit(np.ones((20, 16)))
    ranks = ranks_from_features(same, same, Positives.of([np.array([row]) for row in range(20)]))
    assert ranks.tolist() == list(range(1, 21))


def test_equal_vectors_have_equal_exact_scores_wherever_they_stand() -> None:
    rng = np.random.default_rng(2)
    query, vector = unit(rng.normal(size=(2, 333)))
    for count in (1, 2, 7, 1000):
        left, right = np.broadcast_to(query, (count, 333)), np.broadcast_to(vector, (count, 333))
        assert set(exact_scores(left, right)) == set(exact_scores(query[None], vector[None]))


def test_recall_counts_ranks_in_percent() -> None:
    assert recall_at_k(np.array([1, 2, 5, 6, 10, 11, 30, 1])) == {"r1": 25.0, "r5": 50.0, "r10": 75.0}


def test_chance_equals_the_mean_of_random_orders() -> None:
    rng = np.random.default_rng(3)
    num_positives = np.array([1, 1, 3, 8])
    chance = chance_recall_at_k(25, num_positives)
    ranks = np.array([[rng.permutation(25)[:m].min() + 1 for m in num_positives] for _ in range(20_000)])
    simulated = recall_at_k(ranks.reshape(-1))
    assert all(abs(chance[key] - simulated[key]) < 0.7 for key in ("r1", "r5", "r10"))
    single = chance_recall_at_k(1000, np.array([1]))
    assert single == pytest.approx({"r1": 0.1, "r5": 0.5, "r10": 1.0})


def test_chance_is_certain_where_the_gallery_is_smaller_than_k() -> None:
    assert chance_recall_at_k(4, np.array([1]))["r10"] == pytest.approx(100.0)


def test_mean_recall_of_six_or_of_three() -> None:
    t2i, i2t = recall_at_k(np.array([1, 7])), recall_at_k(np.array([1, 1]))
    assert retrieval_scores(t2i, i2t)["mean_recall"] == pytest.approx((50 + 50 + 100 + 300) / 6)
    assert retrieval_scores(t2i, None)["mean_recall"] == pytest.approx(200 / 3)


def test_a_query_without_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one positive"):
        Positives.of([np.array([1]), np.array([], dtype=np.int64)])
