"""FAISS on GPUs: the same neighbours as on the processor where there is one, a clear refusal where not."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from eval.index.partitioned import Embeddings, build_parts
from pipeline import cli as command_line
from pipeline.core.records import ConfigError, InputError

HAS_GPU = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@pytest.fixture
def features(tmp_path: Path) -> str:
    rows = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return str(tmp_path / "rows.npy")


@pytest.mark.skipif(not HAS_GPU, reason="this FAISS has no GPU here")
def test_a_gpu_builds_what_the_processor_searches(features: str, tmp_path: Path) -> None:
    embeddings = Embeddings.open(features)
    queries_QD = embeddings.rows(np.arange(0, 4000, 40))
    exact = build_parts(
        embeddings, str(tmp_path / "exact"), factory="Flat", rows_per_part=4000, train_rows=4000
    )
    built = build_parts(
        embeddings, str(tmp_path / "gpu"), factory="IVF16,Flat", rows_per_part=3000, train_rows=4000,
        device="gpu",
    )  # fmt: skip
    _, expected_QK = exact.search(queries_QD, 10)
    _, found_QK = built.search(queries_QD, 10, parameters="nprobe=16")
    assert np.mean(found_QK == expected_QK) > 0.99
    words = ["bench-index", features, "--grid", "Flat;IVF16,SQ8", "--device", "gpu", "--num-queries", "50"]
    assert command_line.main(words) == 0
    assert command_line.main([*words[:-3], "gpu-shards", *words[-2:]]) == 0
    with pytest.raises(InputError, match="FAISS has no 'HNSW32' for GPUs"):
        build_parts(
            embeddings, str(tmp_path / "no"), factory="HNSW32", rows_per_part=4000, train_rows=4000,
            device="gpu",
        )  # fmt: skip


@pytest.mark.skipif(HAS_GPU, reason="this FAISS has a GPU here")
def test_a_gpu_that_is_not_there_is_said(
    features: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["index", features, str(tmp_path / "out"), "--device", "gpu"],
        ["bench-index", features, "--device", "gpu"],
        ["bench-index", features, "--device", "gpu-shards"],
    ):
        assert command_line.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --device {words[-1]}: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--device gpu"):
        build_parts(
            Embeddings.open(features), str(tmp_path / "out"), factory="Flat", rows_per_part=9, train_rows=9,
            device="gpu",
        )  # fmt: skip
