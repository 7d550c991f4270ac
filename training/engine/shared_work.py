"""Work on rows that all ranks share: each does its part, and every rank gets all results."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from pipeline.core.arrays import Int64Array


def place() -> tuple[int, int]:
    """Return this process's rank and the number of ranks: 0 and 1 if there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def embed_by_all(
    batches: Sequence[Int64Array], embed: Callable[[int], Tensor], dim: int, device: torch.device
) -> Tensor:
    """Return feature_ND in float32 on the CPU, of all rows; a collective, so every rank calls it.

    `batches` are the rows of each batch, every row once; `embed` returns feature_BD of the batch with a
    number. Ranks take whole batches in turn, so that their number changes no bit of a feature.
    """
    rank, ranks = place()
    feature_ND = torch.zeros(sum(map(len, batches)), dim, device=device)
    for first in range(0, len(batches), ranks):
        number = first + rank
        if number < len(batches):
            feature_ND[torch.from_numpy(batches[number]).to(device)] = embed(number).float()
        else:
            # ZeRO 3 gathers a layer's weights from all ranks, which therefore have to run it equally often.
            embed(rank % len(batches))
    return summed(feature_ND).cpu()


def split_evenly(num_rows: int) -> slice:
    """Return this rank's share of rows; without any if there are fewer rows than ranks."""
    rank, ranks = place()
    return slice(num_rows * rank // ranks, num_rows * (rank + 1) // ranks)


def summed(parts: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor in which each filled in its part of zeros; a collective."""
    if place()[1] > 1:
        dist.all_reduce(parts)
    return parts
