"""Chooses where FAISS computes: on the CPU, or on the GPUs that the installed FAISS can use.

faiss-cpu and faiss-gpu are the same module with different attributes. On GPUs FAISS supports flat indices,
IVF with flat, scalar and product codes, and transforms before these, but not HNSW or RaBitQ. Indices on disk
always have the CPU form, which any FAISS reads.
"""

from typing import Any, Literal

from eval.index.files import faiss_reason
from pipeline.core.records import ConfigError, InputError

Device = Literal["cpu", "gpu", "gpu-shards"]


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


def to_build(device: Device) -> Device:
    """Return where an index is filled: rows are added to copies, not to shards."""
    return "gpu" if device == "gpu-shards" else device


def from_device(index: Any, device: Device) -> Any:
    """Return the CPU form of an index that `to_device` returned."""
    import faiss

    return index if device == "cpu" else faiss.index_gpu_to_cpu(index)
