"""Pairs that count as copies are shown side by side, and named if their images are not at hand."""

import base64
import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from data_prep.dedup.near_duplicates import DedupImageConfig
from eval.report import copies as copies_module
from eval.report.copies import copies_of_rules
from eval.report.data import CopiesOfRule
from eval.report.files import report_json
from eval.report.lookup import RowLookup
from eval.report.page import render_html
from pipeline.core.evaluation_sets import EvaluationSource
from pipeline.core.run import Run, read_manifest
from pipeline.core.stage import Context
from tests.helpers.corpus_files import drawing, encoded, finish, make_run
from tests.helpers.report_page import make_data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of six drawings two have a smaller copy, and one is a coarser copy of an evaluation image."""
    folder = tmp_path_factory.mktemp("copies")
    valid = folder / "valid"
    valid.mkdir()
    image = base64.b64encode(encoded(drawing(5))).decode()
    (valid / "valid_imgs.tsv").write_text(f"17\t{image}\n")
    (valid / "valid_texts.jsonl").write_text('{"text_id": 1, "text": "图", "image_ids": [17]}\n')
    pictures = {f"{number}.jpg": encoded(drawing(number)) for number in range(5)}
    pictures |= {
        f"{number}-small.jpg": encoded(drawing(number).resize((52, 52), Image.Resampling.LANCZOS))
        for number in (0, 1)
    }
    pictures["coarse.jpg"] = encoded(drawing(5), quality=40)
    captions = {name: f"名叫{name.removesuffix('.jpg')}的一张图片" for name in pictures}
    sets = (EvaluationSource(name="valid", folder=str(valid)),)
    return finish(
        make_run(folder, pictures, captions, evaluations=sets, copies=DedupImageConfig(max_distance=20))
    )


def _context(run: Run) -> Context:
    manifests = {stage.name: read_manifest(run, stage.name) for stage in run.stages}
    return Context(
        run.folder, "report", 0, {name: item for name, item in manifests.items() if item is not None}
    )


def _copies(context: Context) -> tuple[CopiesOfRule, ...]:
    with RowLookup(context) as lookup:
        return copies_of_rules(context, lookup)


def _images(shown: tuple[CopiesOfRule, ...]) -> list[bytes | None]:
    return [image.data for rule in shown for pair in rule.pairs for image in (pair.kept, pair.dropped)]


def test_each_rule_shows_its_pairs_with_both_images(run: Run) -> None:
    shown = _copies(_context(run))
    assert [(rule.stage, rule.reason, rule.total, len(rule.pairs)) for rule in shown] == [
        ("filter_image", "evaluation_image", 1, 1),
        ("dedup_image", "near_duplicate_image", 2, 2),
    ]
    assert shown[0].pairs[0].kept.name == "valid: 17"
    assert all(pair.bits is not None and pair.bits <= 32 for rule in shown for pair in rule.pairs)
    assert all(pair.kept.name < pair.dropped.name for pair in shown[1].pairs)
    assert all(data is not None and data.startswith(b"RIFF") for data in _images(shown))
    data = dataclasses.replace(make_data(), copies=shown)
    html = render_html(data)
    assert html.count('<figure class="card pair">') == 3
    assert html.count("image not available") == 1  # of a sample
    assert json.loads(json.dumps(report_json(data)))["copies"][0]["pairs"][0]["copy_of"] == "valid: 17"
    assert 'id="copies"' not in render_html(make_data())


def test_of_many_pairs_some_are_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies_module, "PAIRS", 1)
    assert [(rule.total, len(rule.pairs)) for rule in _copies(_context(run))] == [(1, 1), (2, 1)]


def test_pairs_are_named_if_their_images_are_gone(run: Run) -> None:
    context = _context(run)
    hidden = [
        *Path(run.folder, "download").rglob("*.tar"),
        Path(run.folder).parent / "valid" / "valid_imgs.tsv",
    ]
    for path in hidden:
        path.rename(f"{path}.gone")
    try:
        shown = _copies(context)
    finally:
        for path in hidden:
            Path(f"{path}.gone").rename(path)
    assert [len(rule.pairs) for rule in shown] == [1, 2]
    assert _images(shown) == [None] * 6
    html = render_html(dataclasses.replace(make_data(), copies=shown))
    assert html.count("image not available") == 6 + 1
    assert "valid: 17" in html
