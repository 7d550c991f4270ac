"""Tiles of the N × N matrix of logits, and the rows and columns that ranks exchange for them.

A rank holds its own rows and gathers all columns, and works tile by tile, so that no rank holds an N × N
matrix. Gradients of the gathered columns are summed back to the ranks that own them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch import distributed as dist

_TILE_SIDE = 1024  # rows and columns of a tile: 4 MiB of float32 logits, which caches hold
_ACCELERATOR_TILE_SIDE = 4096  # enough work for one kernel: 64 MiB


def tiles(row_BD: Tensor, column_ND: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the tiles of the matrix of rows and columns as (rows, columns)."""
    side = _TILE_SIDE if row_BD.device.type == "cpu" else _ACCELERATOR_TILE_SIDE
    for first_row in range(0, len(row_BD), side):
        rows = slice(first_row, min(first_row + side, len(row_BD)))
        for first_column in range(0, len(column_ND), side):
            yield rows, slice(first_column, min(first_column + side, len(column_ND)))


def host_waits_for(tensor: Tensor) -> bool:
    """Return true if a branch on a tensor's values makes the host wait for a device.

    There all that a branch may need is computed; a CPU computes only what it needs.
    """
    return tensor.device.type != "cpu"


def own_rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(local_BX: Tensor, num_samples_of_ranks: tuple[int, ...]) -> Tensor:
    """Return all ranks' rows in rank order.

    Collectives want equal sizes, so shorter ranks are padded on the way.
    """
    if num_ranks() == 1:
        return local_BX
    longest = max(num_samples_of_ranks)
    padded = local_BX.new_zeros((longest, *local_BX.shape[1:]))
    padded[: len(local_BX)] = local_BX
    parts = [torch.empty_like(padded) for _ in num_samples_of_ranks]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, num_samples_of_ranks, strict=True)])


def sum_to_owner(grad_ND: Tensor, num_samples_of_ranks: tuple[int, ...]) -> Tensor:
    """Return the sum over ranks of the rows that belong to this rank: `gather` backwards."""
    if num_ranks() == 1:
        return grad_ND
    longest, own = max(num_samples_of_ranks), num_samples_of_ranks[own_rank()]
    parts = [
        torch.nn.functional.pad(part, (0, 0, 0, longest - len(part)))
        for part in torch.split(grad_ND, list(num_samples_of_ranks))
    ]
    summed = torch.empty_like(parts[0])
    dist.reduce_scatter(summed, parts)
    return summed[:own]


def log_sum_exp_over_ranks(lse_N: Tensor) -> Tensor:
    """Return the log-sum-exp of all ranks' terms, given that of this rank's."""
    if num_ranks() == 1:
        return lse_N
    highest_N = lse_N.clone()
    dist.all_reduce(highest_N, op=dist.ReduceOp.MAX)
    # A column without a negative on some rank has -inf there; its positive's rank has a number.
    sum_N = (lse_N - highest_N).exp()
    dist.all_reduce(sum_N)
    return highest_N + sum_N.log()
