"""`cnclip eval` from files to tables: protocols, differences, every output format."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from eval import evaluate
from eval.datasets.discover import find_sets
from eval.metrics.bootstrap import Measured
from eval.paper import comparison
from eval.paper.comparison import compare_classification, compare_retrieval
from eval.paper.published import Protocols, RetrievalProtocol, protocols, published
from eval.paper.render import to_csv, to_json, to_latex, to_text
from pipeline import cli as command_line
from pipeline.core.records import InputError, Manifest
from tests.helpers.classification_files import write_cnclip
from tests.helpers.evaluation_files import png_bytes, small_evaluation, write_evaluation
from tests.helpers.json_documents import check_keys
from tests.helpers.tiny_model import write_tiny_model

KEYS = ["t2i/r1", "t2i/r5", "t2i/r10", "i2t/r1", "i2t/r5", "i2t/r10", "mean_recall"]


def measured(value: float) -> Measured:
    return Measured(value, value - 1, value + 1)


def test_a_retrieval_table_stands_beside_its_row() -> None:
    scores = {key: measured(60.0 + i) for i, key in enumerate(KEYS)}
    table = compare_retrieval(
        "x", scores, protocol="coco-cn-test", setup="zero-shot", model="m", paper_model="CN-CLIP ViT-B/16"
    )
    assert table.number == 4
    assert [line.paper for line in table.lines] == [62.2, 86.6, 94.9, 57.0, 84.1, 93.6, 79.7]
    difference = table.lines[0].difference
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((-2.2, -3.2, -1.2))
    assert "CN-CLIP ViT-B/16" not in table.others
    assert len(table.others) == 7  # nine rows, less ours and the one with dashes
    finetuned = compare_retrieval(
        "x", scores, protocol="coco-cn-test", setup="finetuned", model="m", paper_model="CN-CLIP ViT-B/16"
    )
    assert finetuned.lines[0].paper == 77.0


def test_table_5_is_never_compared_with_a_checkpoint() -> None:
    scores = {name: measured(50.0) for name in published().classification[0].datasets}
    tables = compare_classification(scores, model="m", paper_model="CN-CLIP ViT-H/14")
    assert [table.number for table in tables] == [12, 5]
    assert [line.paper for line in tables[1].lines] == [None] * 10
    assert tables[1].others[-1] == "CN-CLIP (best of sizes)"
    assert any("no checkpoint is compared" in note for note in tables[1].notes)
    assert tables[0].paper_model == "CN-CLIP ViT-H/14"
    assert "Average" not in [line.label for line in tables[0].lines]


def test_voc_is_compared_by_elevater_s_rule_and_shown_by_its_own_too() -> None:
    name = "voc-2007-classification"
    scores = {item.id: measured(50.0) for item in protocols().classification} | {"mine": measured(10.0)}
    by_elevater = {name: measured(70.0), "mine": measured(30.0)}
    tables = compare_classification(
        scores, model="m", paper_model="CN-CLIP ViT-L/14", by_elevater=by_elevater
    )
    lines = {line.label: line for table in tables for line in table.lines}
    theirs = lines["VOC-2007, by ELEVATER's rule"]
    assert theirs.ours == measured(70.0)
    own = lines["VOC-2007, by VOC's own rule"]
    assert (own.ours, own.paper, own.others) == (measured(50.0), None, ())
    (line,) = [line for line in tables[0].lines if line.label == theirs.label]
    assert line.paper == 84.5
    average = lines["Average"].ours
    assert average is not None
    assert average.value == pytest.approx(51.0)
    assert (lines["mine, by ELEVATER's rule"].ours, lines["mine, by VOC's own rule"].ours) == (
        measured(30.0), measured(10.0),
    )  # fmt: skip


def test_the_average_needs_all_20_sets() -> None:
    scores = {item.id: measured(50.0) for item in protocols().classification}
    table = compare_classification(scores, model="m", paper_model="CN-CLIP RN50")[0]
    assert table.lines[-1].label == "Average"
    assert table.lines[-1].paper == 40.9
    average = table.lines[-1].ours
    assert average is not None
    assert average.high - 50.0 == pytest.approx(20**-0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_tiny_model(folder)
    small_evaluation(folder / "sets" / "COCO-CN", "test", count=14)
    small_evaluation(folder / "sets" / "mine", "valid", count=12)
    write_cnclip(folder / "sets" / "colours")
    mnist = write_cnclip(folder / "sets" / "mnist")
    (mnist / "test" / "000" / "1.png").write_bytes(b"broken")
    write_cnclip(folder / "sets" / "eurosat_clip")
    return folder


def run(folder: Path, *words: str) -> int:
    model = [str(folder / "model.safetensors"), "--vocab", str(folder / "vocab.txt")]
    return command_line.main(["eval", *model, "--sets", str(folder / "sets"), *words])


def test_find_sets(folder: Path) -> None:
    found = find_sets(str(folder / "sets"))
    assert [item.protocol for item in found.retrieval] == ["coco-cn-test", "mine-valid"]
    assert [Path(path).name for path in found.classification] == ["colours", "eurosat_clip", "mnist"]
    assert find_sets(str(folder / "sets" / "mnist")).classification == (str(folder / "sets" / "mnist"),)
    with pytest.raises(InputError, match="holds no evaluation set"):
        find_sets(str(folder / "sets" / "mnist" / "test" / "000"))


def test_everything_is_written_and_a_small_set_is_not_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--out", str(tmp_path), "--as", "CN-CLIP RN50") == 0
    text, said = capsys.readouterr()
    assert "coco-cn-test: 14 images, but the protocol has 1000: not comparable" in text
    assert "note: coco-cn-test: 14 images, but the protocol has 1000: not comparable" in said
    assert "mnist: 1 images cannot be decoded and are not scored" in text
    assert "mnist: 11 images, but the protocol has 10000" in text
    page = (tmp_path / "eval.html").read_text(encoding="utf-8")
    assert "MNIST" in page
    assert "not comparable with published figures" in page
    assert page.count("<script") == 1  # our own, which switches the language
    body = json.loads((tmp_path / "eval.json").read_text())
    by_title = {table["title"]: table for table in body["tables"]}
    assert by_title["coco-cn-test"]["number"] is None
    by_number = {table["number"]: table for table in body["tables"]}
    assert {line["label"]: line["paper"] for line in by_number[12]["lines"]} == {
        "MNIST": None, "EuroSAT": None
    }  # fmt: skip
    assert all(line["paper"] is None for line in by_title["coco-cn-test"]["lines"])
    official = json.loads((tmp_path / "coco-cn-test" / "test.scores.json").read_text())["scoreJson"]
    ours = {line["label"]: line["ours"]["value"] for line in by_title["coco-cn-test"]["lines"]}
    assert ours["text-to-image R@5"] == official["r5"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "eval.csv").read_text())))
    assert {row["figure"] for row in rows} >= {"colours", "MNIST", "EuroSAT", "mean recall"}
    assert "checkpoint_sha256" in (tmp_path / "card.md").read_text()
    assert sorted(path.name for path in (tmp_path / "submission").iterdir()) == ["eurosat_clip.json"]
    assert (tmp_path / "submission.zip").is_file()


def test_json_features_give_cn_clip_the_same_predictions(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--out", str(tmp_path), "--json-features") == 0
    sets = tmp_path / "mine-valid"
    images, texts = (
        [json.loads(line) for line in (sets / name).read_text().splitlines()]
        for name in ("valid_imgs.img_feat.jsonl", "valid_texts.txt_feat.jsonl")
    )
    image_ND = np.array([item["feature"] for item in images], dtype=np.float32)
    assert np.array_equal(image_ND, np.load(sets / "img_emb" / "img_emb_0.npy"))
    for text, line in zip(texts, (sets / "valid.predictions.jsonl").read_text().splitlines(), strict=True):
        scores = np.array(text["feature"], dtype=np.float64) @ image_ND.T.astype(np.float64)
        best = [images[row]["image_id"] for row in np.argsort(-scores, kind="stable")[:10]]
        assert json.loads(line) == {"text_id": text["text_id"], "image_ids": best}


def test_unreadable_images_are_counted_and_nothing_is_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {100 + row: png_bytes(row) for row in range(16)} | {103: b"no image", 107: b"nor this"}
    texts = [(row, f"第{row}张图片", [100 + row]) for row in range(16)]
    texts[7] = (7, "第七张图片", [107, 108])
    write_evaluation(tmp_path / "sets" / "COCO-CN", "test", images, texts)
    pinned = RetrievalProtocol(id="coco-cn-test", title="x", images=16, texts=16)
    monkeypatch.setattr(evaluate, "retrieval_protocol", lambda name: pinned if name == pinned.id else None)
    out = tmp_path / "out"
    assert run(folder, "--sets", str(tmp_path / "sets"), "--out", str(out), "--as", "CN-CLIP RN50") == 0
    text = capsys.readouterr().out
    note = r"2 images cannot be decoded \(image 103: .*\); they are left out, with 1 texts that only"
    assert re.search(note, text)
    assert "coco-cn-test: 14 images, but the protocol has 16: not comparable" in text
    body = json.loads((out / "eval.json").read_text())
    assert {line["paper"] for line in body["tables"][0]["lines"]} == {None}
    lines = (out / "coco-cn-test" / "test.predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["text_id"] for line in lines] == [row for row in range(16) if row != 3]
    assert {103, 107}.isdisjoint(i for line in lines for i in json.loads(line)["image_ids"])


def test_met_counts_are_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = RetrievalProtocol(id="coco-cn-test", title="x", images=14, texts=14)
    monkeypatch.setattr(evaluate, "retrieval_protocol", lambda name: pinned if name == pinned.id else None)
    assert isinstance(protocols(), Protocols)
    assert run(folder, "--out", str(tmp_path), "--as", "CN-CLIP RN50", "--format", "json") == 0
    body = json.loads(capsys.readouterr().out)
    table = next(table for table in body["tables"] if table["number"] == 4)
    assert table["lines"][0]["paper"] == 48.1
    assert table["lines"][0]["others"]["Wukong ViT-B/32"] == 49.2


def test_a_run_brings_its_model_vocabulary_and_sets(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "run"
    (run_folder / "stage1").mkdir(parents=True)
    (run_folder / "vocabulary").mkdir()
    recipe = tmp_path / "run.toml"
    recipe.write_text(f'[run]\nfolder = "{run_folder}"\n[model]\nname = "tiny-vit"\n')
    words = ["eval", str(recipe), "--out", str(tmp_path / "out")]
    assert command_line.main(words) == 1
    assert "holds no trained stage; run `cnclip run" in capsys.readouterr().err
    shutil.copy(folder / "model.safetensors", run_folder / "stage1" / "model.safetensors")
    shutil.copy(folder / "vocab.txt", run_folder / "vocabulary" / "caption.txt")
    assert command_line.main(words) == 1
    assert "the run's corpus stage is not done" in capsys.readouterr().err
    small_evaluation(run_folder / "corpus" / "evaluations" / "made", "made")
    given = small_evaluation(tmp_path / "given", "given")
    extra = {"0": {"evaluations": {"made": "evaluations/made"}, "own_evaluations": {"given": given}}}
    manifest = Manifest("corpus", 1, "", "", {}, (), 0, 0, {}, extra)
    (run_folder / "corpus" / "manifest.json").write_text(manifest.to_json())
    assert command_line.main(words) == 0
    out = capsys.readouterr().out
    assert out.index("given, zero-shot: tiny-vit") < out.index("made, zero-shot: tiny-vit")


def test_one_json_document(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--out", str(tmp_path), "--json") == 0
    captured = capsys.readouterr()
    check_keys("eval", json.loads(captured.out))
    assert "coco-cn-test: images: 14 of 14" in captured.err
    assert "colours: images: " in captured.err
    assert run(folder, "--out", str(tmp_path), "--json", "-q") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tables"]
    assert not any(line.startswith(("note: ", "colours")) for line in captured.err.splitlines())


def test_bad_usage(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--out", str(tmp_path), "--as", "CLIP") == 1
    assert "--as CLIP: no such row" in capsys.readouterr().err
    lone = [str(folder / "model.safetensors"), "--vocab", str(folder / "vocab.txt")]
    assert command_line.main(["eval", *lone, "--out", str(tmp_path)]) == 2
    assert "give --sets FOLDER" in capsys.readouterr().err
    assert run(folder, "--out", str(folder / "vocab.txt")) == 2
    assert "vocab.txt: a file; give a folder" in capsys.readouterr().err


def test_renderers_hold_every_figure_and_escape() -> None:
    line = comparison.Line("a_b & 50% 中文", measured(12.34), 10.0)
    table = comparison.Comparison(2, "MUGE #1", "zero-shot", "m", "p", (line,))
    assert "a_b & 50% 中文  12.3   11.3 … 13.3   10.0        +2.3" in to_text([table])
    latex = to_latex([table])
    assert r"a\_b \& 50\% 中文 & 12.3 & 11.3 \dots{} 13.3 & 10.0 & $+2.3$ \\" in latex
    assert r"MUGE \#1" in latex
    assert list(csv.reader(io.StringIO(to_csv([table]))))[1][5:] == [
        "a_b & 50% 中文", "12.3400", "11.3400", "13.3400", "10.0000", "2.3400",
    ]  # fmt: skip
    assert json.loads(to_json([table], {}))["tables"][0]["lines"][0]["difference"]["value"] == pytest.approx(
        2.34
    )


def test_a_set_that_cannot_be_read_is_named_before_anything_is_embedded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "sets", tmp_path / "sets")
    (tmp_path / "sets" / "colours" / "label_cn.txt").unlink()
    sets = ["--sets", str(tmp_path / "sets"), "--out", str(tmp_path / "out")]
    assert run(folder, *sets) == 1
    assert "colours: has no label_cn.txt" in capsys.readouterr().err
    assert not (tmp_path / "out" / "coco-cn-test").exists()


def test_class_names_that_the_vocabulary_cannot_write_are_noted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "sets" / "colours", tmp_path / "sets" / "colours")
    labels = tmp_path / "sets" / "colours" / "label_cn.txt"
    names = labels.read_text(encoding="utf-8").splitlines()
    labels.write_text("\n".join(["龘", *names[1:]]) + "\n", encoding="utf-8")
    assert run(folder, "--sets", str(tmp_path / "sets"), "--out", str(tmp_path / "out")) == 0
    assert f"lacks parts of 1 of {len(names)} class names (龘)" in capsys.readouterr().out
