"""The published tables are consistent: sizes, printed means, and figures in the paper's text."""

import math
from typing import get_args

import pytest

from eval.paper.published import (
    PAPER_MODELS,
    ClassificationTable,
    Metric,
    RetrievalRow,
    RetrievalTable,
    classification_protocol,
    mismatch,
    protocols,
    published,
    retrieval_protocol,
    score_of,
)
from training.model.config import MODELS


def retrieval(table: int) -> RetrievalTable:
    return next(item for item in published().retrieval if item.table == table)


def classification(table: int) -> ClassificationTable:
    return next(item for item in published().classification if item.table == table)


def row(table: int, model: str, setup: str) -> RetrievalRow:
    return next(item for item in retrieval(table).rows if (item.model, item.setup) == (model, setup))


def test_every_table_has_all_its_rows() -> None:
    assert {item.table: len(item.rows) for item in published().retrieval} == {2: 18, 3: 18, 4: 18, 10: 4}
    assert {item.table: len(item.rows) for item in published().classification} == {5: 8, 12: 5}
    for table in published().retrieval:
        assert len({(item.model, item.setup) for item in table.rows}) == len(table.rows)
        assert retrieval_protocol(table.protocol) is not None
    for table in published().classification:
        for item in table.rows:
            assert len(item.scores) == len(table.datasets)
        assert all(classification_protocol(name) for name in table.datasets)


def test_recalls_rise_with_k_and_only_r2d2_base_has_dashes() -> None:
    for table in published().retrieval:
        for item in table.rows:
            has_dashes = item.model == "R2D2 ViT-B" and item.setup == "zero-shot"
            assert (item.t2i is None) is has_dashes
            for recalls in (item.t2i, item.i2t):
                assert recalls is None or 0 < recalls[0] < recalls[1] <= recalls[2] <= 100


def test_printed_mean_recall_is_the_mean_of_its_row() -> None:
    checked = 0
    for table in published().retrieval:
        for item in table.rows:
            if item.mean_recall is not None and item.t2i is not None:
                values = [*item.t2i, *(item.i2t or ())]
                # printed figures are rounded to 0.1, so their mean may be off by as much
                assert abs(sum(values) / len(values) - item.mean_recall) <= 0.1, item
                checked += 1
    assert checked == 17 + 4


def test_printed_averages_of_table_12() -> None:
    table = classification(12)
    assert len(table.datasets) == 20
    for item in table.rows:
        assert item.average == pytest.approx(math.fsum(item.scores) / 20, abs=0.06)


def test_table_5_takes_its_row_from_columns_of_table_12() -> None:
    best = next(item for item in classification(5).rows if item.best_of_sizes)
    assert best.model == "CN-CLIP"
    for dataset, score in zip(classification(5).datasets, best.scores, strict=True):
        column = [score_of(classification(12), item, dataset) for item in classification(12).rows]
        assert score in column, dataset
    # no single size has that row
    for item in classification(12).rows:
        assert any(
            score_of(classification(12), item, dataset) != score
            for dataset, score in zip(classification(5).datasets, best.scores, strict=True)
        )


@pytest.mark.parametrize(
    ("table", "better", "worse", "setup", "direction", "difference"),
    [  # sentences of section 3.1.2
        (3, "CN-CLIP ViT-B/16", "Wukong ViT-B/32", "zero-shot", "t2i", 17.0),
        (3, "CN-CLIP ViT-B/16", "Wukong ViT-B/32", "zero-shot", "i2t", 8.4),
        (3, "CN-CLIP ViT-B/16", "R2D2 ViT-B", "finetuned", "t2i", 0.8),
        (3, "CN-CLIP ViT-B/16", "R2D2 ViT-B", "finetuned", "i2t", 0.9),
        (4, "CN-CLIP ViT-B/16", "R2D2 ViT-B", "finetuned", "t2i", 1.9),
        (4, "CN-CLIP ViT-B/16", "R2D2 ViT-B", "finetuned", "i2t", 1.3),
        (3, "CN-CLIP RN50", "Wukong ViT-B/32", "zero-shot", "t2i", 3.1),
        (4, "CN-CLIP RN50", "Wukong ViT-B/32", "finetuned", "i2t", 2.6),
        (3, "CN-CLIP ViT-L/14", "Wukong ViT-L/14", "zero-shot", "t2i", 16.3),
        (3, "CN-CLIP ViT-L/14", "Wukong ViT-L/14", "zero-shot", "i2t", 4.1),
        (3, "CN-CLIP ViT-L/14@336px", "CN-CLIP ViT-L/14", "zero-shot", "t2i", 1.0),
        (3, "CN-CLIP ViT-L/14@336px", "CN-CLIP ViT-L/14", "zero-shot", "i2t", 3.1),
        (4, "CN-CLIP ViT-L/14@336px", "R2D2 ViT-L/14", "finetuned", "t2i", 1.0),
        (4, "CN-CLIP ViT-L/14@336px", "R2D2 ViT-L/14", "finetuned", "i2t", 1.9),
        (3, "CN-CLIP ViT-H/14", "CN-CLIP ViT-L/14", "zero-shot", "t2i", 3.2),
        (3, "CN-CLIP ViT-H/14", "CN-CLIP ViT-L/14", "zero-shot", "i2t", 1.4),
        (4, "CN-CLIP ViT-H/14", "CN-CLIP ViT-L/14@336px", "finetuned", "t2i", 1.4),
        (4, "CN-CLIP ViT-H/14", "CN-CLIP ViT-L/14@336px", "finetuned", "i2t", 2.3),
    ],
)
def test_differences_that_the_text_states(
    table: int, better: str, worse: str, setup: str, direction: str, difference: float
) -> None:
    first, second = (getattr(row(table, model, setup), direction)[0] for model in (better, worse))
    assert first - second == pytest.approx(difference)


def test_mean_recalls_that_the_text_compares() -> None:
    values = {(item.model, item.setup): item.mean_recall for item in retrieval(2).rows}
    for better, worse, setup, difference in (
        ("CN-CLIP ViT-B/16", "Wukong ViT-B/32", "zero-shot", 17.0),
        ("CN-CLIP ViT-B/16", "R2D2 ViT-B", "finetuned", 8.7),
        ("CN-CLIP RN50", "Wukong ViT-B/32", "zero-shot", 8.9),
        ("CN-CLIP RN50", "Wukong ViT-B/32", "finetuned", 8.0),
        ("CN-CLIP ViT-L/14@336px", "R2D2 ViT-L/14", "zero-shot", 6.6),
        ("CN-CLIP ViT-L/14@336px", "R2D2 ViT-L/14", "finetuned", 3.8),
        ("CN-CLIP ViT-H/14", "CN-CLIP ViT-L/14@336px", "zero-shot", 2.7),
        ("CN-CLIP ViT-H/14", "CN-CLIP ViT-L/14@336px", "finetuned", 2.3),
    ):
        first, second = values[better, setup], values[worse, setup]
        assert first is not None
        assert second is not None
        assert first - second == pytest.approx(difference)


def test_protocols() -> None:
    assert len(protocols().classification) == 20
    assert sum(item.images for item in protocols().classification) == 192_677
    assert {item.metric for item in protocols().classification} == set(get_args(Metric))
    assert {item.id for item in protocols().classification} == set(classification(12).datasets)
    assert sum(item.classes for item in protocols().classification) == 1_150 + 1  # with Caltech's background
    assert mismatch("x", "images", 10, 10) is None
    assert mismatch("x", "images", None, 10) is None
    assert "9 images, but the protocol has 10" in str(mismatch("x", "images", 10, 9))


def test_paper_models_are_ours_and_theirs() -> None:
    assert PAPER_MODELS.keys() <= MODELS.keys()
    assert set(PAPER_MODELS.values()) == {item.model for item in classification(12).rows}
