"""FAISS on GPUs: the same neighbours as on the processor where there is one, a clear refusal where not."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from eval.index import build, device
from eval.index.files import load_index
from eval.index.metric import Metric
from eval.index.partitioned import Embeddings, PartedIndex, build_parts
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


def cpu_form(rows_ND: npt.NDArray[np.float32], factory: str, metric: Metric, *_: object) -> Any:
    """Return a graph in the form in which FAISS copies one from a GPU: without upper levels and entry."""
    index = device.new_cagra(rows_ND.shape[1], factory, metric)
    index.add(rows_ND)
    index.base_level_only, index.hnsw.entry_point, index.hnsw.max_level = True, -1, -1
    return index


def test_a_cagra_graph_is_tuned_and_served_on_the_processor(
    features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["index", features, str(tmp_path / "graph"), "--factory", "CAGRA32", "--rows-per-part", "2000"]
    assert command_line.main(words) == 2
    assert "CAGRA32: a CPU searches a CAGRA graph but does not build it" in capsys.readouterr().err
    # Only cuVS builds it; all that comes after the build is the same as after a build on a GPU.
    monkeypatch.setattr(build, "build_cagra", cpu_form)
    assert command_line.main([*words, "--recall", "0.95"]) == 0
    served = PartedIndex.open(str(tmp_path / "graph"))
    assert served.tuned is not None
    assert served.tuned.parameters.startswith("efSearch=")
    rows_ND = np.load(features)
    _, found_QK = served.search(rows_ND[::40], 10)
    exact_QK = np.argsort(-rows_ND[::40] @ rows_ND.T, axis=1)[:, :10]
    recalls = [len(np.intersect1d(*pair)) / 10 for pair in zip(found_QK, exact_QK, strict=True)]
    assert np.mean(recalls) > 0.93


def test_only_a_cagra_graph_leaves_the_gpu_for_its_searches() -> None:
    assert device.to_search("gpu", "CAGRA64") == "cpu"
    assert [device.to_search(each, "IVF8,Flat") for each in ("cpu", "gpu", "gpu-shards")] == [
        "cpu", "gpu", "gpu-shards",
    ]  # fmt: skip


def test_a_damaged_cagra_graph_is_refused(tmp_path: Path) -> None:
    rows_ND = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    path = tmp_path / "index"
    for entries in (0, 1 << 30):
        index = cpu_form(rows_ND, "CAGRA8", "ip")
        index.num_base_level_search_entrypoints = entries
        faiss.write_index(index, str(path))
        with pytest.raises(InputError, match=f"enters at {entries} rows"):
            load_index(str(path), metric="ip")
    with pytest.raises(InputError, match="CAGRA7: 7 links a row; give an even number"):
        build.new_index(16, "CAGRA7")


@pytest.mark.skipif(not HAS_GPU or not hasattr(faiss, "GpuIndexCagra"), reason="this FAISS has no cuVS")
def test_cuvs_builds_a_graph_that_the_processor_searches(features: str, tmp_path: Path) -> None:
    words = ["index", features, str(tmp_path / "graph"), "--factory", "CAGRA32", "--device", "gpu"]
    assert command_line.main([*words, "--recall", "0.95"]) == 0
