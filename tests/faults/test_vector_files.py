"""Damaged files of vectors: read or refused in one line, never more memory than the file has bytes."""

from pathlib import Path

import numpy as np
import pytest

from eval.index.embeddings import Embeddings
from tests.faults.fuzzing import COUNTS, Case, fuzz, outcome_of
from tests.helpers.mutations import mutate

SUFFIXES = (".fbin", ".u8bin", ".fvecs", ".bvecs", ".hdf5", ".parquet")


def whole(suffix: str, folder: Path) -> bytes:
    path = folder / f"whole{suffix}"
    if path.exists():
        return path.read_bytes()
    rows_ND = np.random.default_rng(0).integers(1, 99, (40, 8))
    if suffix == ".hdf5":
        import h5py

        with h5py.File(path, "w") as file:
            file.attrs["distance"] = "euclidean"
            file.create_dataset("train", data=rows_ND.astype("<f4"), chunks=(10, 8), compression="gzip")
    elif suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"v": [row.tolist() for row in rows_ND.astype(float)]}), path)
    elif suffix.endswith("bin"):
        kind = "<f4" if suffix == ".fbin" else "u1"
        path.write_bytes(np.array(rows_ND.shape, "<u4").tobytes() + rows_ND.astype(kind).tobytes())
    else:
        kind = "<f4" if suffix == ".fvecs" else "u1"
        width = np.array([8], "<i4").tobytes()
        path.write_bytes(b"".join(width + row.tobytes() for row in rows_ND.astype(kind)))
    return path.read_bytes()


def judge(case: Case) -> str:
    suffix = SUFFIXES[case.number % len(SUFFIXES)]
    path = case.folder / f"rows{suffix}"
    path.write_bytes(mutate(whole(suffix, case.folder), case.rng))

    def read() -> None:
        rows = Embeddings.open(str(path), metric="l2")
        for _ in rows.blocks(0, rows.num_rows):
            pass
        rows.rows(np.arange(min(3, rows.num_rows)))

    return outcome_of(read, path)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_files_of_vectors_are_read_or_refused(count: int) -> None:
    pytest.importorskip("h5py")
    found = fuzz(judge, count)
    assert min(found["read"], found["refused"]) > count // 50
