"""Shards of the project as an evaluation set: on their own, in `cnclip eval`, and in a run."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.decontamination import set_marks
from data_prep.rules.copies import marks_of
from eval.datasets.cnclip_tsv import read_evaluation
from eval.datasets.discover import find_sets
from eval.datasets.retrieval_set import read_retrieval_set
from eval.datasets.shards import read_shards
from eval.features.evaluation_set import validator
from eval.retrieval.measure import evaluate_retrieval
from pipeline import cli as command_line
from pipeline.core.evaluation_sets import EvaluationSource, digest_of
from pipeline.core.files.images import decode_upright
from pipeline.core.records import InputError
from tests.helpers.evaluation_files import ArrayEncoder, png_bytes, write_evaluation, write_shards
from tests.helpers.tiny_model import write_tiny_model
from training.model.tokenizer import Tokenizer
from training.weights.formats import load_model

# samples 3 and 15 have the same image, 5 and 9 the same caption
SAMPLES = [(png_bytes(3 if row == 15 else row), f"第{5 if row == 9 else row}张图片") for row in range(16)]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return write_shards(tmp_path / "sets" / "mine", SAMPLES, per_shard=6)


def test_equal_images_and_equal_captions_are_one(shards: str) -> None:
    evaluation = read_shards(shards, "mine")
    assert evaluation.image_ids.tolist() == list(range(15))
    assert evaluation.text_ids.tolist() == [row for row in range(16) if row != 9]
    positives = {
        int(text_id): evaluation.image_ids[rows].tolist()
        for text_id, rows in zip(evaluation.text_ids, evaluation.images_of_text, strict=True)
    }
    assert positives[5] == [5, 9]
    assert positives[3] == positives[15] == [3]
    assert evaluation.texts[evaluation.text_ids.tolist().index(15)] == "第15张图片"
    rows = [14, 0, 7, 6, 1]
    assert list(evaluation.image_bytes(rows)) == [SAMPLES[row][0] for row in rows]


def test_scores_equal_those_of_the_same_set_in_chinese_clips_layout(shards: str, tmp_path: Path) -> None:
    images = {row: SAMPLES[row][0] for row in range(15)}
    texts = [(row, SAMPLES[row][1], {5: [5, 9], 15: [3]}.get(row, [row])) for row in range(16) if row != 9]
    plain = read_evaluation(write_evaluation(tmp_path / "plain", "mine", images, texts), "mine")
    evaluation = read_retrieval_set(shards, "mine")
    rng = np.random.default_rng(0)
    image_ND, text_ND = (rng.normal(size=(15, 8)).astype(np.float32) for _ in range(2))
    image_ND, text_ND = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (image_ND, text_ND))
    encoder = ArrayEncoder(image_ND, text_ND)
    scores = evaluate_retrieval(encoder, evaluation).scores
    assert scores == evaluate_retrieval(encoder, plain).scores
    assert list(evaluation.image_bytes(range(15))) == list(plain.image_bytes(range(15)))


def test_cnclip_eval_measures_shards(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, vocabulary = write_tiny_model(tmp_path)
    assert [item.protocol for item in find_sets(str(tmp_path / "sets")).retrieval] == ["mine"]
    out = tmp_path / "out"
    words = ["eval", weights, "--vocab", vocabulary, "--sets", str(tmp_path / "sets"), "--out", str(out)]
    assert command_line.main(words) == 0
    assert "text-to-image R@1" in capsys.readouterr().out
    lines = (out / "mine" / "mine.predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["text_id"] for line in lines] == [row for row in range(16) if row != 9]


def test_shards_serve_a_run_as_an_evaluation_set(shards: str, tmp_path: Path) -> None:
    before = digest_of(EvaluationSource(name="mine", folder=shards))
    assert [marks for _, marks in set_marks(shards, "mine")] == [
        marks_of(np.asarray(decode_upright(data, 1 << 20))) for data, _ in SAMPLES
    ]
    weights, vocabulary = write_tiny_model(tmp_path)
    validate = validator({"mine": shards}, Tokenizer.load(vocabulary), 52)
    assert set(validate(load_model(weights))) == {"mine"}
    path = f"{shards}/00001.parquet"
    pl.read_parquet(path).with_columns(caption=pl.lit("另一句")).write_parquet(path)
    assert digest_of(EvaluationSource(name="mine", folder=shards)) != before


def test_bad_shards_are_said_in_one_line(shards: str, tmp_path: Path) -> None:
    path = Path(shards) / "00001.parquet"
    table = pl.read_parquet(path)
    table.with_columns(caption=pl.lit(" ")).write_parquet(path)
    with pytest.raises(InputError, match=r"00001.parquet: 0+b99a: an empty caption \(6 such samples\)"):
        read_shards(shards, "mine")
    table.drop("offset_bytes").write_parquet(path)
    with pytest.raises(InputError, match=r"00001.parquet: has no column offset_bytes"):
        read_shards(shards, "mine")
    path.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"00001.parquet: not a readable sidecar"):
        read_shards(shards, "mine")
    table.write_parquet(path)
    evaluation = read_shards(shards, "mine")
    (Path(shards) / "00001.tar").write_bytes(b"short")
    with pytest.raises(InputError, match=r"00001.tar: ends inside the image at"):
        list(evaluation.image_bytes([7]))
    with pytest.raises(InputError, match="or shards"):
        digest_of(EvaluationSource(name="none", folder=str(tmp_path)))


def test_a_missing_part_of_a_shard_is_said(shards: str) -> None:
    (Path(shards) / "00002.parquet").unlink()
    with pytest.raises(InputError, match=r"has 00002.tar, but no 00002.parquet; the shards are incomplete"):
        read_shards(shards, "mine")


def test_a_caption_that_is_no_utf8_is_one_line(shards: str) -> None:
    """Parquet does not say of a text whether its bytes are UTF-8; polars ends the process over some."""
    (sidecar, *_) = sorted(Path(shards).rglob("*.parquet"))
    data = sidecar.read_bytes()
    table = pq.read_table(sidecar)
    captions = pa.array([caption.encode() for caption in table["caption"].to_pylist()], pa.large_binary())
    broken = pa.array([b"\xb2" + captions[0].as_py()[1:], *captions.to_pylist()[1:]], pa.large_binary())
    place = table.schema.get_field_index("caption")
    pq.write_table(table.set_column(place, "caption", broken.view(pa.large_string())), sidecar)
    assert sidecar.read_bytes() != data
    with pytest.raises(InputError, match=r"not a readable sidecar \(.*Invalid UTF8 sequence"):
        read_shards(shards, "mine")


def with_captions(folder: str, captions: dict[int, list[str]]) -> None:
    """Let samples of the first shard keep these captions; others of it keep their one."""
    path = Path(folder) / "00000.parquet"
    table = pl.read_parquet(path)
    lists = [captions.get(row) for row in range(table.height)]
    table.with_columns(pl.Series("captions", lists, dtype=pl.List(pl.String))).write_parquet(path)


def test_every_caption_of_a_sample_is_a_text(shards: str) -> None:
    with_captions(shards, {1: ["第1张图片", "另一种说法"], 3: ["又一种说法", "第0张图片"]})
    evaluation = read_shards(shards, "mine")
    assert evaluation.image_ids.tolist() == list(range(15))
    positives = {
        text: evaluation.image_ids[rows].tolist()
        for text, rows in zip(evaluation.texts, evaluation.images_of_text, strict=True)
    }
    assert positives["第1张图片"] == positives["另一种说法"] == [1]
    assert positives["第0张图片"] == [0, 3]
    assert positives["又一种说法"] == [3]
    assert "第3张图片" not in positives
    assert positives["第5张图片"] == [5, 9]
    assert positives["第15张图片"] == [3]
