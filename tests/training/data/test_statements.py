import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from pipeline.core.records import ConfigError
from tests.helpers.rank_processes import run_ranks
from tests.helpers.shard_files import COLOURS, SHAPES, VOCABULARY, draw
from tests.helpers.train_jobs import build_config, make_job, train_rank
from training.config.job import TrainJob
from training.config.train import NegationConfig
from training.data.statements import Statements
from training.encoder import Encoder
from training.losses.negation import negation_loss
from training.model.tokenizer import Tokenizer
from training.weights.weights import load_checkpoint

# Templates in the characters that the small vocabulary has.
CONFIG_OF_SHAPES = NegationConfig(objects=("圆", "方"), affirmed=("图片的{}",), negated=("图片零{}", "零{}"))
CAPTIONS = ["一个红色的圆", "一个绿色的方图片", "一个圆一个方", "图片"]


def statements(seed: int = 7) -> Statements:
    return Statements(CONFIG_OF_SHAPES, Tokenizer(VOCABULARY), context_length=12, seed=seed)


def words(tokens: torch.Tensor) -> str:
    return "".join(VOCABULARY[token] for token in tokens.tolist() if token not in (0, 2, 3))


def test_true_statements_are_true_and_false_ones_false() -> None:
    made = statements()
    mentioned_NO = made.mentions(pa.array(CAPTIONS))
    assert mentioned_NO.tolist() == [[True, False], [False, True], [True, True], [False, False]]
    seen = set()
    for epoch in range(40):
        keys = [f"{row:032x}".encode() for row in range(4)]
        questions = made.draw(list(mentioned_NO), keys, [epoch] * 4)
        assert questions.asked_B.tolist() == [True, True, False, False]  # none to name, or none absent
        for row, (shown, absent) in enumerate((("圆", "方"), ("方", "圆"))):
            true, false = (words(tokens) for tokens in questions.tokens_B2L[row])
            seen.add((row, true))
            expected = {f"图片的{shown}": f"图片的{absent}"}
            expected |= {template.format(absent): template.format(shown) for template in ("图片零{}", "零{}")}
            assert expected[true] == false
        again = made.draw([mentioned_NO[1]], [keys[1]], [epoch])
        assert words(again.tokens_B2L[0, 0]) == words(questions.tokens_B2L[1, 0])
    assert len(seen) == 6  # every template with either picture


def test_the_loss_is_the_plain_formula_s() -> None:
    generator = torch.Generator().manual_seed(0)
    image_BD = F.normalize(torch.randn(5, 4, generator=generator, dtype=torch.float64), dim=1)
    statement_B2D = F.normalize(torch.randn(5, 2, 4, generator=generator, dtype=torch.float64), dim=2)
    scale = torch.tensor([1.3], dtype=torch.float64)
    asked_B = torch.tensor([True, True, False, True, False])
    leaves = [tensor.requires_grad_() for tensor in (image_BD, statement_B2D, scale)]
    ours = negation_loss(image_BD, statement_B2D, scale, asked_B, 9)
    logits_B2 = scale.exp() * torch.einsum("bd,bsd->bs", image_BD, statement_B2D)
    target_B = torch.zeros(5, dtype=torch.int64)
    plain = (F.cross_entropy(logits_B2, target_B, reduction="none") * asked_B).sum() / 9
    torch.testing.assert_close(ours, plain)
    for mine, theirs in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def train_without_dropout(job: TrainJob) -> None:
    train_rank(job, dropout=0.0)


def losses(job: TrainJob) -> list[float]:
    lines = (Path(job.folder) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("cached", [False, True])
def test_two_ranks_in_micro_batches_learn_as_one_does(tmp_path: Path, cached: bool) -> None:
    changes: dict[str, Any] = {"lock_image": True, "cached_views": 1} if cached else {}
    one = make_job(tmp_path, "one", negation=CONFIG_OF_SHAPES, **changes)
    two = make_job(tmp_path, "two", negation=CONFIG_OF_SHAPES, ranks=2, micro_batch=3, **changes)
    run_ranks(train_without_dropout, 1, one)
    run_ranks(train_without_dropout, 2, two)
    np.testing.assert_allclose(losses(two), losses(one), atol=2e-5)
    if not cached:
        alone = make_job(tmp_path, "alone")
        run_ranks(train_without_dropout, 1, alone)
        # Before anything is learned, a question costs log 2, and all captions name one of the two shapes.
        assert losses(one)[0] == pytest.approx(losses(alone)[0] + np.log(2), abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": ("圆",)}, "at least two different words"),
        ({"objects": ("圆", "")}, "none empty"),
        ({"negated": ("没有",)}, r"template '没有': must hold \{\} once"),
        ({"affirmed": ()}, "negation.affirmed: must not be empty"),
        ({"weight": 0.0}, "negation.weight: must be greater than 0, found 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    negation = {**dataclasses.asdict(CONFIG_OF_SHAPES), **changes}
    with pytest.raises(ConfigError, match=message):
        build_config({"negation": negation})


def test_braces_beside_the_place_of_the_thing_are_text() -> None:
    config = dataclasses.replace(CONFIG_OF_SHAPES, affirmed=("{}零{x}",), negated=("{零}{}",))
    assert build_config({"negation": config}).negation == config
    made = Statements(config, Tokenizer([*VOCABULARY, "{", "}", "x"]), context_length=12, seed=7)
    mentioned_NO, keys = (
        made.mentions(pa.array(CAPTIONS[:1] * 20)),
        [f"{row:032x}".encode() for row in range(20)],
    )
    words = [*VOCABULARY, "{", "}", "x"]
    true_B = made.draw(list(mentioned_NO), keys, [0] * 20).tokens_B2L[:, 0]
    read = {"".join(words[token] for token in row if token not in (0, 2, 3)) for row in true_B.tolist()}
    assert read == {"圆零{x}", "{零}方"}


@pytest.mark.parametrize(
    ("objects", "is_said"), [(("圆", "方"), False), (("红", "零"), False), (("零", "图片零"), True)]
)
def test_statements_that_no_caption_leads_to_are_said(
    tmp_path: Path, objects: tuple[str, ...], is_said: bool
) -> None:
    negation = dataclasses.replace(CONFIG_OF_SHAPES, objects=objects)
    run_ranks(train_without_dropout, 2, job := make_job(tmp_path, "run", negation=negation, ranks=2))
    lines = [json.loads(line) for line in (Path(job.folder) / "log.jsonl").read_text().splitlines()]
    notices = [line["notice"] for line in lines if "negation" in line.get("notice", "")]
    assert len(notices) == is_said
    if is_said:
        (said,) = notices
        assert said.startswith(
            "[stage2] negation: in 3 steps no caption named some of objects = 零, 图片零 and"
        )


def test_a_statement_longer_than_a_caption_may_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="longer than context_length = 4"):
        Statements(CONFIG_OF_SHAPES, Tokenizer(VOCABULARY), context_length=4, seed=0)


def share_of_right_answers(job: TrainJob, template: str) -> float:
    """Compute how often "no <absent colour>" is nearer to a new image than "no <its colour>"."""
    encoder = Encoder(load_checkpoint(job.output_model), Tokenizer(VOCABULARY), device="cpu")
    random = np.random.default_rng(99)
    text_OD = encoder.embed_texts([template.format(colour) for colour in COLOURS], context_length=12)
    right = []
    for row, rgb in enumerate(COLOURS.values()):
        pictures = [draw(rgb, SHAPES[number % 2], 40, random) for number in range(10)]
        cosine_NO = encoder.embed_images(pictures) @ text_OD.T
        right.append(np.delete(cosine_NO, row, axis=1) > cosine_NO[:, [row]])
    return float(np.mean(right))


@pytest.mark.slow
def test_negation_is_learned_from_the_statements_alone(tmp_path: Path) -> None:
    """Captions never negate: without statements, a negated colour stays the colour's text."""
    colours = NegationConfig(objects=tuple(COLOURS), affirmed=("图片的{}",), negated=("零{}",))
    settings: dict[str, Any] = {"sizes": (64, 64), "epochs": 12, "model": "small-rn"}
    found = {}
    for name, negation in (("without", None), ("with", colours)):
        job = make_job(tmp_path, name, negation=negation, **settings)
        run_ranks(train_without_dropout, 1, job)
        found[name] = share_of_right_answers(job, "零{}")
    assert found["without"] < 0.5
    assert found["with"] > 0.8
