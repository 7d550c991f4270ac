"""What the report reads of a run: logged steps, examples of answers, sets of the paper."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from eval import evaluate
from eval.datasets.cnclip_tsv import read_evaluation
from eval.paper.published import RetrievalProtocol
from eval.report import sources
from eval.report.collect import comparisons
from eval.report.data import RecallPoint, TrainingPoint
from eval.report.sources import make_gallery, read_training_metrics
from eval.stages import EvaluationConfig, ReportConfig
from pipeline.core.records import InputError, Manifest, Shard
from pipeline.core.stage import Context
from tests.helpers.evaluation_files import small_evaluation
from tests.helpers.report_page import scores


def test_gallery_shows_hits_and_misses_with_their_answers(tmp_path: Path) -> None:
    evaluation = read_evaluation(small_evaluation(tmp_path, count=20), "small")
    ids = evaluation.image_ids.tolist()
    lines = []
    for row in range(20):
        others = [image_id for image_id in ids if image_id not in (100 + row, 119)]
        place = {0: 0, 1: 2, 2: 7}.get(row % 4)  # first; among the first five; later; else not at all
        found = others[:10] if place is None else [*others[:place], 100 + row, *others[place:9]]
        lines.append(json.dumps({"text_id": row, "image_ids": found}))
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    gallery = make_gallery(evaluation, str(tmp_path / "p.jsonl"), num_rows=3)
    assert [row.query for row in gallery.hits] == ["第零张图片", "第8张图片", "第16张图片"]
    assert all(row.results[0].is_right and row.answer is None for row in gallery.hits)
    assert len(gallery.misses) == 3
    assert {row.rank for row in gallery.misses} <= {8, None}
    assert all(row.answer and not any(p.is_right for p in row.results) for row in gallery.misses)
    assert all(image.data[8:12] == b"WEBP" for row in gallery.hits for image in row.results)


def test_gallery_shows_what_images_find(tmp_path: Path) -> None:
    evaluation = read_evaluation(small_evaluation(tmp_path, count=20), "small")
    texts = evaluation.text_ids.tolist()
    (tmp_path / "p.jsonl").write_text("")
    lines = []
    for row, image_id in enumerate(evaluation.image_ids.tolist()):
        right = evaluation.texts_of_image[row].tolist()
        others = [text for place, text in enumerate(texts) if place not in right]
        place = {0: 0, 1: 7}.get(row % 3)
        found = others[:10]
        if place is not None and right:
            found = [*others[:place], texts[right[0]], *others[place:9]]
        lines.append(json.dumps({"image_id": image_id, "text_ids": found}))
    (tmp_path / "tr.jsonl").write_text("\n".join(lines))
    gallery = make_gallery(evaluation, str(tmp_path / "p.jsonl"), str(tmp_path / "tr.jsonl"), num_rows=2)
    assert (gallery.hits, gallery.misses) == ((), ())
    assert len(gallery.image_hits) == len(gallery.image_misses) == 2
    for query in gallery.image_hits:
        assert (query.rank, query.answer) == (1, None)
        assert [text.is_right for text in query.results] == [True, False, False, False, False]
        row = evaluation.image_ids.tolist().index(query.image.image_id)
        assert query.results[0].text == evaluation.texts[evaluation.texts_of_image[row][0]]
    assert all(query.answer and query.answer.is_right for query in gallery.image_misses)
    assert {query.rank for query in gallery.image_misses} <= {8, None}


def test_training_metrics_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    step = {"step": 3, "samples_seen": 96, "loss": 2.5, "temperature": 14.0, "learning_rate": 0.001}
    validation = {"step": 3, "samples_seen": 96, "evaluation": "e", "recall": scores(5)}
    path = tmp_path / "metrics.jsonl"
    left_out = {"step": 4, "samples_seen": 128, "skipped": True}  # its loss was not finite
    path.write_text("".join(json.dumps(line) + "\n" for line in (step, validation, left_out)))
    training, recall = read_training_metrics(str(path), "stage1")
    assert training == [TrainingPoint("stage1", 96, 2.5, 14.0, 0.001)]
    assert recall == [RecallPoint("stage1", 96, "e", scores(5))]
    path.write_text(json.dumps(step) + "\n{}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: neither"):
        read_training_metrics(str(path), "stage1")


def test_long_trainings_are_thinned_and_a_line_being_written_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_POINTS", 10)
    step = {"loss": 2.5, "temperature": 14.0, "learning_rate": 0.001}
    lines = [json.dumps({"step": number, "samples_seen": number, **step}) + "\n" for number in range(1, 100)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines) + '{"step": 100, "sam')
    seen = [point.samples_seen for point in read_training_metrics(str(path), "stage1")[0]]
    assert seen == [1, 17, 33, 49, 65, 81, 97, 99]
    path.write_text("".join(lines[:3]))
    assert [point.samples_seen for point in read_training_metrics(str(path), "stage1")[0]] == [1, 2, 3]


def test_a_set_of_the_paper_stands_beside_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features under which each text finds its image, but for text 0, which has two."""
    shards = []
    for name in ("coco-cn-test", "mine"):
        small_evaluation(tmp_path / "corpus" / name, name, count=14)
        for side in ("img", "text"):
            folder = tmp_path / "embed" / name / "stage2" / f"{side}_emb"
            folder.mkdir(parents=True)
            np.save(folder / f"{side}_emb_0.npy", np.eye(14, 16, dtype=np.float32))
        shards += [Shard(f"{name}/{name}{end}", 14, 1, "") for end in ("_imgs.tsv", "_texts.jsonl")]
    extra = {"0": {"evaluations": {"coco-cn-test": "coco-cn-test", "mine": "mine"}}}
    corpus = Manifest("corpus", 1, "", "", {}, tuple(shards), 0, 0, {}, extra)
    context = Context(str(tmp_path), "report", 0, {"corpus": corpus})
    score = EvaluationConfig(stages=("stage1", "stage2"), vocabulary=None, context_length=52)
    config = ReportConfig(score=score, model="RN50", training_stages=(), titles={})

    (small,) = comparisons(config, context)
    assert (small.number, small.lines[0].paper) == (None, None)
    assert "coco-cn-test: 14 images, but the protocol has 1000: not comparable" in small.notes[0]

    pinned = RetrievalProtocol(id="coco-cn-test", title="x", images=14, texts=14)
    monkeypatch.setattr(evaluate, "retrieval_protocol", lambda name: pinned)
    (table,) = comparisons(config, context)
    assert (table.number, table.paper_model) == (4, "CN-CLIP RN50")
    assert table.lines[0].ours is not None
    assert table.lines[0].ours.value == pytest.approx(100.0)
    assert table.lines[0].paper == 48.1

    (tmp_path / "embed" / "coco-cn-test" / "finetune").symlink_to(
        tmp_path / "embed" / "coco-cn-test" / "stage2"
    )
    score = EvaluationConfig(stages=("stage2", "finetune"), vocabulary=None, context_length=52)
    (table, *_) = comparisons(dataclasses.replace(config, score=score), context)
    assert (table.setup, table.lines[0].paper) == ("finetuned", 66.8)
