"""Validation by all ranks: each does a part, in training's precision, and all have the numbers of one."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.features import evaluation_set
from eval.features.evaluation_set import validator
from tests.helpers.evaluation_files import small_evaluation
from tests.helpers.launched_jobs import read_metrics
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import make_job, small_models
from training import encoder
from training.config.job import TrainJob
from training.model.clip import CLIP
from training.model.config import MODELS
from training.model.tokenizer import Tokenizer

IMAGES = 20  # in batches of 8, with one text each in batches of about 40 tokens


@contextlib.contextmanager
def noted_features() -> Iterator[list[bytes]]:
    """The bytes of the features that are validated inside: images and texts, in turn."""
    found: list[bytes] = []
    check = evaluation_set.check_vectors

    def noted(vectors_ND: Any, what: str) -> None:
        check(vectors_ND, what)
        found.append(vectors_ND.tobytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "TOKENS_PER_BATCH", 40)
        patch.setattr(evaluation_set, "check_vectors", noted)
        yield found


def real_validation(job: TrainJob) -> Any:
    MODELS.update(small_models())
    return validator(job.evaluations, Tokenizer.load(job.vocabulary), job.config.context_length, batch_size=8)


def train_and_note(job: TrainJob) -> tuple[list[int], list[int], list[bytes]]:
    """Train and validate; the images that this rank decodes, how many texts it encodes, and the features."""
    from training.pretrain import pretrain

    decoded: list[int] = []
    texts: list[int] = []
    decode, encode = evaluation_set.decoded_rows, CLIP.encode_text

    def noted_images(evaluation: Any, rows: Any, *arguments: Any) -> torch.Tensor:
        decoded.extend(rows.tolist())
        return decode(evaluation, rows, *arguments)

    def noted_texts(clip: CLIP, tokens_BL: torch.Tensor, **more: Any) -> torch.Tensor:
        if not clip.training:
            texts.append(len(tokens_BL))
        return encode(clip, tokens_BL, **more)

    with pytest.MonkeyPatch.context() as patch, noted_features() as features:
        patch.setattr(evaluation_set, "decoded_rows", noted_images)
        patch.setattr(CLIP, "encode_text", noted_texts)
        pretrain(job, real_validation(job))
    return decoded, texts, features


@pytest.mark.parametrize("deepspeed", ["zero1_autocast", pytest.param("zero3", marks=pytest.mark.slow)])
def test_ranks_share_a_validation_and_give_the_numbers_of_one(tmp_path: Path, deepspeed: str) -> None:
    from training.pretrain import build_model

    job = make_job(tmp_path, "run", sizes=(16,), epochs=1, ranks=2, deepspeed=deepspeed)
    folder = small_evaluation(tmp_path / "small", count=IMAGES)
    job = dataclasses.replace(job, evaluations={"small": folder})
    found = run_ranks(train_and_note, 2, job)
    recalls = [line["recall"] for line in read_metrics(job) if "recall" in line]

    validate = real_validation(job)
    clip = build_model(job, Tokenizer.load(job.vocabulary))
    casts = deepspeed == "zero1_autocast"
    with noted_features() as features, torch.autocast("cpu", torch.bfloat16, enabled=casts):
        alone = validate(clip)["small"]
    assert recalls[0] == alone
    for decoded, texts, of_rank in found:
        assert of_rank[:2] == features  # bit for bit, in the precision of training
        assert len(of_rank) == 4  # of images and texts, before the first step and after the last
        assert max(texts) <= 8
        assert 0 < sum(texts) < 2 * IMAGES
        assert len(decoded) < IMAGES
    # The second rank has one of three batches, and runs it again for the sake of the other's weights.
    assert [decoded for decoded, *_ in found] == [[*range(8), *range(16, 20)], [*range(8, 16)]]
