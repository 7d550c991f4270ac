"""Damaged files of evaluation sets: refused in one line that names the file, or read."""

import contextlib
import functools
import random
import tempfile
from pathlib import Path

import pytest

from eval.datasets.classification import read_classification
from eval.datasets.cnclip_tsv import check_scorable, read_images
from eval.datasets.discover import find_sets
from eval.datasets.retrieval_set import read_retrieval_set
from pipeline.core.files.images import BadImageError, decode_upright
from tests.faults.fuzzing import COUNTS, Case, fuzz, outcome_of
from tests.helpers import classification_files
from tests.helpers.evaluation_files import png_bytes, small_evaluation, write_shards
from tests.helpers.mutations import mutate


@functools.cache
def seed(layout: str) -> dict[str, bytes]:
    """Path → bytes of a small set in a layout."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "seed"
        if layout == "cnclip":
            small_evaluation(root, "small", count=10)
        elif layout == "shards":
            write_shards(root, [(png_bytes(row), f"第{row}张图片") for row in range(10)], per_shard=5)
        elif layout == "folders":
            classification_files.write_cnclip(root, count=2)
        else:
            classification_files.write_web(root, count=2)
            (root / "index.json").write_text("[5, 4, 3, 2, 1, 0]")
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def damaged(case: Case, layout: str) -> Path:
    """Write a set of which one file, or two, are damaged; text files more often than images."""
    files, root = seed(layout), case.folder / "fuzzed"
    names = sorted(files)
    worth = [0.2 if name.endswith((".png", ".tar")) else 1.0 for name in names]
    chosen = set(case.rng.choices(names, worth, k=case.rng.randint(1, 2)))
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(harm(data, case.rng) if name in chosen else data)
    return root


# What people's tools put where it does not belong, and what breaks parsers that trust their input.
_ODD = (
    b"\xef\xbb\xbf", b"\r\n", b"\n\n", b"\t", b"\0", b"null", b"NaN", b"1e999", b"-1", b"9" * 30,
    b"1" * 5000, b"[" * 20_000, b'{"a":' * 5000, b"\\ud83d", "\u2028".encode(), b"\xff\xfe", b" ", b"[]",
)  # fmt: skip


def harm(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        return mutate(data, rng)
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_ODD) + data[at + rng.choice((0, 0, 1, 8)) :]


def judge_retrieval(case: Case) -> str:
    layout = ("cnclip", "cnclip", "shards")[case.number % 3]
    root = damaged(case, layout)

    def read() -> None:
        sources = find_sets(str(root))
        for source in sources.retrieval:
            evaluation = read_retrieval_set(source.folder, source.name)
            for data in evaluation.image_bytes(range(evaluation.num_images)):
                decode(data)
            check_scorable(evaluation)
        if layout == "cnclip":
            read_images(str(root / "small_imgs.tsv"))

    return outcome_of(read, root)


def judge_classification(case: Case) -> str:
    root = damaged(case, ("folders", "web")[case.number % 2])

    def read() -> None:
        data = read_classification(str(root))
        for image in data.images:
            decode(image.read())

    return outcome_of(read, root)


def decode(data: bytes) -> None:
    with contextlib.suppress(BadImageError):  # counted by the one who evaluates
        decode_upright(data, 1_000_000)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_retrieval_sets_are_refused_or_read(count: int) -> None:
    assert set(fuzz(judge_retrieval, count)) == {"read", "refused"}


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_classification_sets_are_refused_or_read(count: int) -> None:
    assert set(fuzz(judge_classification, count)) == {"read", "refused"}
