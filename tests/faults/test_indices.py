"""Damaged FAISS indices, descriptions of them, and features: refused in one line, or searched."""

import functools
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from eval.index.embeddings import Embeddings
from eval.index.files import load_index
from eval.index.partitioned import PartedIndex, build_parts
from pipeline.core.records import InputError
from tests.faults.fuzzing import COUNTS, Case, fuzz, outcome_of
from tests.helpers.mutations import mutate

DIM, ROWS = 16, 300
FACTORIES = (
    "Flat", "SQ8", "PQ4x4", "PQ8x4fs", "RaBitQ", "RaBitQfs", "RQ2x4", "LSQ2x4", "HNSW8", "HNSW8_SQ8", "NSG8",
    "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4", "IVF8,PQ4x4fs", "IVF8,RaBitQ", "IVF8,RaBitQfs", "IVF8,RQ2x4fs",
    "OPQ4,IVF8,PQ4x4", "PCA8,Flat", "IVF8_HNSW8,PQ4x4,RFlat", "L2norm,HNSW8", "IVF8,FlatDedup",
)  # fmt: skip


def unit_rows() -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


@functools.cache
def whole_index(factory: str) -> bytes:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(unit_rows())
    index.add(unit_rows())
    return bytes(faiss.serialize_index(index).tobytes())


def judge_index(case: Case) -> str:
    path = case.folder / "damaged.index"
    path.write_bytes(mutate(whole_index(FACTORIES[case.number % len(FACTORIES)]), case.rng))

    def read() -> None:
        index = load_index(str(path))
        if index.d != DIM:
            raise InputError(f"{path}: of another width")
        for k in (1, 10):
            index.search(unit_rows()[case.number % 50 :: 50], k)

    return outcome_of(read, path)


@functools.cache
def whole_features() -> list[bytes]:
    import io

    found = []
    for array in (unit_rows(), unit_rows().astype(np.float16), np.asfortranarray(unit_rows())):
        file = io.BytesIO()
        np.save(file, array)
        found.append(file.getvalue())
    return found


def judge_features(case: Case) -> str:
    path = case.folder / "damaged.npy"
    path.write_bytes(mutate(whole_features()[case.number % 3], case.rng))

    def read() -> None:
        embeddings = Embeddings.open(str(path))
        for _ in embeddings.blocks(0, embeddings.num_rows):
            pass
        embeddings.rows(np.arange(min(3, embeddings.num_rows)))

    return outcome_of(read, path)


def judge_parts(case: Case) -> str:
    """One file of an index's folder is damaged; what is found then is what is found in the whole one."""
    folder = case.folder / "index"
    files = whole_folder(case.folder.parent)
    names = sorted(name for name in files if name != ".lock")
    damaged = names[case.number % len(names)]
    for name, data in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(mutate(data, case.rng) if name == damaged else data)
    is_same = (folder / damaged).read_bytes() == files[damaged]

    def read() -> None:
        index = PartedIndex.open(str(folder))
        _, rows_QK = index.search(unit_rows()[:5], 3)
        is_of_parts = damaged.startswith("parts/") and not is_same
        assert not is_of_parts, "a damaged part was searched"
        assert rows_QK[:, 0].tolist() == [0, 1, 2, 3, 4]

    return outcome_of(read, folder)


_folders: dict[Path, dict[str, bytes]] = {}


def whole_folder(place: Path) -> dict[str, bytes]:
    if place not in _folders:
        np.save(place / "rows.npy", unit_rows())
        build_parts(
            Embeddings.open(str(place / "rows.npy")),
            str(place / "whole"), factory="Flat", rows_per_part=100, train_rows=ROWS,
        )  # fmt: skip
        _folders[place] = {
            str(path.relative_to(place / "whole")): path.read_bytes()
            for path in (place / "whole").rglob("*")
            if path.is_file()
        }
    return _folders[place]


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_indices_are_refused_or_searched(count: int) -> None:
    found = fuzz(judge_index, count)
    assert set(found) == {"read", "refused"}, found


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_features_are_refused_or_read(count: int) -> None:
    found = fuzz(judge_features, count)
    assert set(found) == {"read", "refused"}, found


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_file_of_an_index_in_parts_changes_no_answer(count: int) -> None:
    found = fuzz(judge_parts, count)
    assert set(found) == {"read", "refused"}, found


def test_a_description_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    whole_folder(tmp_path)
    path = tmp_path / "whole" / "index.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for change in (
        {"path": "../../rows.npy"},
        {"path": "/etc/passwd"},
        {"num_rows": 10**18},
        {"num_rows": True},
        {"first_row": -1},
        {"digest": 5},
        {"other": 1},
    ):
        parts = [fields["parts"][0] | change, *fields["parts"][1:]]
        path.write_text(json.dumps(fields | {"parts": parts}), encoding="utf-8")
        with pytest.raises(InputError, match=r"index\.json: not an index's description"):
            PartedIndex.open(str(tmp_path / "whole"))
    for text in ("[" * 100_000, "[]", "null", '{"parts": []}', '{"parts": 3}', "{}"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"index\.json: not an index's description"):
            PartedIndex.open(str(tmp_path / "whole"))
