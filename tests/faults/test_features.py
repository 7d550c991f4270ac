"""Damaged `.npy` features: read, or refused before memory is taken for what a header makes up."""

import io
import struct
from functools import cache

import numpy as np
import pytest

from eval.features.layout import read_vectors
from eval.index.partitioned import Embeddings
from tests.faults.fuzzing import COUNTS, Case, fuzz, outcome_of
from tests.helpers.mutations import mutate


@cache
def seeds() -> list[bytes]:
    made = []
    vectors_ND = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    for array in (vectors_ND, vectors_ND.astype(np.float16), np.asfortranarray(vectors_ND)):
        for version in ((1, 0), (2, 0)):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=version)
            made.append(buffer.getvalue())
    return made


_HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 16), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (7, %d), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (%d, 0), }",
    "{'descr': '|V%d', 'fortran_order': False, 'shape': (7, 16), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (7, %d), }",
    "{'descr': '<U%d', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': [('a', '<f4', (%d, 16))], 'fortran_order': False, 'shape': (7,), }",
    "[" * 500 + "%d",
)


def with_header(case: Case) -> bytes:
    """A file whose header names an array of any size."""
    number = case.rng.choice((-1, 0, 7, 2**31, 2**40, 2**62, 2**64, 10**30))
    header = (case.rng.choice(_HEADERS) % number).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + seeds()[0][-448:]


def judge(case: Case) -> str:
    path = case.folder / "features.npy"
    seed = seeds()[case.number % len(seeds())]
    path.write_bytes(with_header(case) if case.rng.random() < 0.3 else mutate(seed, case.rng))

    def take_rows() -> None:
        features = Embeddings.open(str(path))
        features.rows(np.arange(min(2, features.first_rows[-1])))
        for _ in features.blocks(0, features.first_rows[-1]):
            pass

    outcome = outcome_of(take_rows, path)
    outcome_of(lambda: read_vectors(str(path)), path)
    return outcome


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_features_are_read_or_refused(count: int) -> None:
    found = fuzz(judge, count)
    assert min(found["read"], found["refused"]) > count // 50
