"""Chooses where FAISS computes: on the CPU, or on the GPUs that the installed FAISS can use.

faiss-cpu and faiss-gpu are the same module with different attributes. On GPUs FAISS supports flat indices,
IVF with flat, scalar and product codes, and transforms before these, but not HNSW or RaBitQ. Indices on disk
always have the CPU form, which any FAISS reads. Exact search also has a GPU without FAISS's
(`eval.index.gpu_search`).

`CAGRA64` is a graph with 64 links a row (Ootomo et al., arXiv 2308.15136), which cuVS builds on a GPU if
FAISS has it. Its CPU form is an HNSW graph of one level, which any FAISS searches with efSearch.
"""

import ctypes
import functools
import re
from typing import Any, Literal

from eval.index.files import faiss_reason
from eval.index.metric import Metric, faiss_metric
from pipeline.core.arrays import Float32Array
from pipeline.core.records import ConfigError, InputError

Device = Literal["cpu", "gpu", "gpu-shards"]

_CAGRA = re.compile(r"CAGRA([1-9][0-9]{0,2})")


def check_device(device: Device) -> None:
    """Check that FAISS has a GPU here if one is requested.

    Raises:
        ConfigError: if it has no GPU.
    """
    import faiss

    if device == "cpu":
        return
    if not hasattr(faiss, "StandardGpuResources"):
        raise ConfigError(
            f"--device {device}: the installed faiss {faiss.__version__} is built only for CPUs: replace"
            " faiss-cpu by faiss-gpu-cu12 (make gpu), or use --device cpu"
        )
    if not faiss.get_num_gpus():
        raise ConfigError(f"--device {device}: faiss finds no GPU on this machine; use --device cpu")


@functools.cache
def torch_device() -> str | None:
    """Return torch's name of the GPU for exact search, or None without one.

    It looks for the driver first, since torch takes seconds to import.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else None


def to_device(index: Any, device: Device, factory: str) -> Any:
    """Return the index on the GPUs, or unchanged for the CPU.

    With "gpu" each GPU has a copy, and they share the queries. With "gpu-shards" each has a share of the
    rows, for an index that is larger than one GPU's memory; rows must be in the index already.

    Raises:
        InputError: if FAISS supports this kind of index only on CPUs.
    """
    import faiss

    if device == "cpu":
        return index
    try:
        options: Any = faiss.GpuMultipleClonerOptions()  # type: ignore[attr-defined]
        options.shard = device == "gpu-shards"
        return faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as error:
        raise InputError(
            f"FAISS has no {factory!r} for GPUs ({faiss_reason(error)}); use --device cpu"
        ) from None


def is_cagra(factory: str) -> bool:
    """Return whether a factory string names a CAGRA graph, which FAISS's own factory does not know."""
    return _CAGRA.fullmatch(factory) is not None


def new_cagra(dim: int, factory: str, metric: Metric) -> Any:
    """Return an empty CAGRA graph in its CPU form.

    Raises:
        InputError: for an odd number of links.
    """
    import faiss

    kinds: Any = faiss  # its stubs lack this one
    return kinds.IndexHNSWCagra(dim, _links(factory) // 2, faiss_metric(metric))


def build_cagra(rows_ND: Float32Array, factory: str, metric: Metric, device: Device) -> Any:
    """Build a CAGRA graph of all rows on the first GPU and return its CPU form.

    Raises:
        ConfigError: without a GPU, or if the installed FAISS lacks cuVS.
        InputError: if cuVS refuses the rows.
    """
    import faiss

    if device == "cpu":
        raise ConfigError(
            f"{factory}: a CPU searches a CAGRA graph but does not build it; use --device gpu, or HNSW32"
        )
    if not hasattr(faiss, "GpuIndexCagra"):
        raise ConfigError(
            f"{factory}: the installed faiss {faiss.__version__} is built without cuVS; install conda's"
            " faiss-gpu-cuvs, or use IVF"
        )
    gpu: Any = faiss  # the stubs are faiss-cpu's
    config = gpu.GpuIndexCagraConfig()
    config.graph_degree = _links(factory)
    config.intermediate_graph_degree = 2 * config.graph_degree
    try:
        built = gpu.GpuIndexCagra(gpu.StandardGpuResources(), rows_ND.shape[1], faiss_metric(metric), config)
        built.train(rows_ND)
        return faiss.index_gpu_to_cpu(built)
    except RuntimeError as error:
        raise InputError(f"{factory} on {len(rows_ND)} rows: {faiss_reason(error)}") from None


def to_search(device: Device, factory: str) -> Device:
    """Return where an index is searched: a CAGRA graph on the CPU."""
    return "cpu" if is_cagra(factory) else device


def to_build(device: Device) -> Device:
    """Return where an index is filled: rows are added to copies, not to shards."""
    return "gpu" if device == "gpu-shards" else device


def from_device(index: Any, device: Device) -> Any:
    """Return the CPU form of an index that `to_device` returned."""
    import faiss

    return index if device == "cpu" else faiss.index_gpu_to_cpu(index)


def _links(factory: str) -> int:
    match = _CAGRA.fullmatch(factory)
    assert match is not None  # is_cagra
    links = int(match[1])
    if links % 2 or links < 4:
        raise InputError(f"{factory}: {links} links a row; give an even number from 4 on, such as CAGRA64")
    return links
