"""Where FAISS computes: on the processor, or on the accelerators that the installed FAISS can use.

faiss-cpu and faiss-gpu are one module; which one is installed shows in what it has. On accelerators FAISS
knows flat indices, IVF with flat, scalar and product codes, and transforms before these; not HNSW or RaBitQ.
What is written to disk is always the processor's form, which any FAISS reads.
"""

from typing import Any, Literal

from eval.index.files import faiss_reason
from pipeline.core.records import ConfigError, InputError

Device = Literal["cpu", "gpu"]


def check_device(device: Device) -> None:
    """Check that FAISS has accelerators here, if they are asked for.

    Raises:
        ConfigError: if it has none.
    """
    import faiss

    if device == "cpu":
        return
    if not hasattr(faiss, "StandardGpuResources"):
        raise ConfigError(
            f"--device gpu: the installed faiss {faiss.__version__} is built for processors only: put"
            " faiss-gpu-cu12 in place of faiss-cpu (make gpu), or take --device cpu"
        )
    if not faiss.get_num_gpus():
        raise ConfigError("--device gpu: faiss finds no GPU on this machine; take --device cpu")


def to_device(index: Any, device: Device, factory: str) -> Any:
    """Return the index on the accelerators (copied to each, queries shared out), or as it is.

    Raises:
        InputError: for a kind of index that FAISS has for processors only.
    """
    import faiss

    if device == "cpu":
        return index
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError as error:
        raise InputError(
            f"FAISS has no {factory!r} for GPUs ({faiss_reason(error)}); take --device cpu"
        ) from None


def from_device(index: Any, device: Device) -> Any:
    """Return the processor's form of an index that `to_device` gave."""
    import faiss

    return index if device == "cpu" else faiss.index_gpu_to_cpu(index)
