"""The contrastive loss over the global batch (section 2.1), tile by tile and with each logit computed once.

A rank holds its own rows and gathers all columns. It computes its rows' logits once for both directions: a
row's log-sum-exp is complete on its rank; a column's is put together over ranks, one number a column. The
backward pass computes the tiles again, so that no rank ever holds an N × N matrix. Gradients of the gathered
columns are summed back to the ranks that own them, and only where a column wants one: in stage 1 the image
features are columns, and no feature gradient travels.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_TILE_ELEMENTS = 1 << 22  # 16 MiB of float32 logits at a time


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    num_samples_of_ranks: tuple[int, ...],
    image_id_B: Tensor | None = None,
    caption_id_B: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of both directions over the global batch, the same number on every rank.

    `image_BD` and `text_BD` are this rank's unit-norm features, `logit_scale` the [1] logarithm of the factor
    on their products, `num_samples_of_ranks` how many rows each rank has. Where ids are given, logit (i, j)
    with j ≠ i is left out of both denominators if pairs i and j share the image id or the caption id.

    The backward pass gives each rank the gradient of the global loss by what this rank put in: *summed* over
    ranks, parameter gradients are those of the plain formula.
    """
    # Rows are the side that surely wants a gradient: then columns, which travel, may need none.
    ids_B2 = None
    if image_id_B is not None and caption_id_B is not None:
        ids_B2 = torch.stack([image_id_B, caption_id_B], dim=1)
    loss: Tensor = _ContrastiveLoss.apply(  # type: ignore[no-untyped-call]
        text_BD, image_BD, logit_scale, num_samples_of_ranks, ids_B2
    )
    return loss


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row_BD: Tensor,
        column_BD: Tensor,
        logit_scale: Tensor,
        num_samples_of_ranks: tuple[int, ...],
        ids_B2: Tensor | None,
    ) -> Tensor:
        row_BD, column_BD = row_BD.detach(), column_BD.detach()
        column_ND = _gather(column_BD, num_samples_of_ranks)
        ids_N2 = None if ids_B2 is None else _gather(ids_B2, num_samples_of_ranks)
        first_row = sum(num_samples_of_ranks[: _rank()])
        scale = logit_scale.detach().exp()

        row_lse_B = row_BD.new_empty(len(row_BD))
        column_lse_N = row_BD.new_full((len(column_ND),), -torch.inf)
        diagonal_B = (row_BD * column_BD).sum(1) * scale
        for rows in _tiles(len(row_BD), len(column_ND)):
            logit_RN = _logits(row_BD, column_ND, scale, rows, first_row, ids_N2)
            row_lse_B[rows] = logit_RN.logsumexp(1)
            column_lse_N = torch.logaddexp(column_lse_N, logit_RN.logsumexp(0))
        column_lse_N = _log_sum_exp_over_ranks(column_lse_N)

        own = slice(first_row, first_row + len(row_BD))
        loss = (row_lse_B + column_lse_N[own] - 2 * diagonal_B).sum() / (2 * len(column_ND))
        if _world() > 1:
            dist.all_reduce(loss)
        ctx.save_for_backward(row_BD, column_ND, scale, row_lse_B, column_lse_N, diagonal_B, ids_N2)
        ctx.num_samples_of_ranks, ctx.first_row = num_samples_of_ranks, first_row
        return loss

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        row_BD, column_ND, scale, row_lse_B, column_lse_N, diagonal_B, ids_N2 = ctx.saved_tensors
        wants_row, wants_column = ctx.needs_input_grad[:2]
        factor = output_gradients[0] / (2 * len(column_ND))
        own_column_BD = column_ND[ctx.first_row : ctx.first_row + len(row_BD)]

        grad_row_BD = torch.empty_like(row_BD) if wants_row else None
        grad_column_ND = torch.zeros_like(column_ND) if wants_column else None
        grad_logit_scale = -2 * diagonal_B.sum()  # positives; the tiles below add the softmax terms
        for rows in _tiles(len(row_BD), len(column_ND)):
            logit_RN = _logits(row_BD, column_ND, scale, rows, ctx.first_row, ids_N2)
            weight_RN = (logit_RN - row_lse_B[rows, None]).exp_()
            weight_RN += (logit_RN - column_lse_N).exp_()
            if ids_N2 is not None:
                logit_RN.masked_fill_(logit_RN.isneginf(), 0)  # their weight is 0, and 0 × -inf is no number
            grad_logit_scale += torch.dot(weight_RN.flatten(), logit_RN.flatten())
            if grad_row_BD is not None:
                grad_row_BD[rows] = weight_RN @ column_ND
            if grad_column_ND is not None:
                grad_column_ND.addmm_(weight_RN.T, row_BD[rows])
        grad_column_BD = None
        if grad_row_BD is not None:
            grad_row_BD = (grad_row_BD - 2 * own_column_BD) * (factor * scale)
        if grad_column_ND is not None:
            grad_column_BD = _sum_to_owner(grad_column_ND, ctx.num_samples_of_ranks)
            grad_column_BD = (grad_column_BD - 2 * row_BD) * (factor * scale)
        return grad_row_BD, grad_column_BD, (grad_logit_scale * factor).reshape(1), None, None


def _logits(
    row_BD: Tensor, column_ND: Tensor, scale: Tensor, rows: slice, first_row: int, ids_N2: Tensor | None
) -> Tensor:
    """Logits of some rows with all columns; -inf where a pair is no negative of the other."""
    logit_RN = (row_BD[rows] * scale) @ column_ND.T
    if ids_N2 is not None:
        own_ids_R2 = ids_N2[first_row:][rows]
        shares_RN = (own_ids_R2[:, None, 0] == ids_N2[:, 0]) | (own_ids_R2[:, None, 1] == ids_N2[:, 1])
        index_R = torch.arange(len(own_ids_R2), device=shares_RN.device)
        shares_RN[index_R, first_row + rows.start + index_R] = False  # the positive stays
        logit_RN.masked_fill_(shares_RN, -torch.inf)
    return logit_RN


def _tiles(num_rows: int, num_columns: int) -> list[slice]:
    height = max(1, _TILE_ELEMENTS // num_columns)
    return [slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height)]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(local_BX: Tensor, num_samples_of_ranks: tuple[int, ...]) -> Tensor:
    """All ranks' rows in rank order. Collectives want equal sizes, so shorter ranks are padded on the way."""
    if _world() == 1:
        return local_BX
    longest = max(num_samples_of_ranks)
    padded = local_BX.new_zeros((longest, *local_BX.shape[1:]))
    padded[: len(local_BX)] = local_BX
    parts = [torch.empty_like(padded) for _ in num_samples_of_ranks]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, num_samples_of_ranks, strict=True)])


def _sum_to_owner(grad_ND: Tensor, num_samples_of_ranks: tuple[int, ...]) -> Tensor:
    """Sum over ranks of the rows that belong to this rank: `_gather` backwards."""
    if _world() == 1:
        return grad_ND
    longest, own = max(num_samples_of_ranks), num_samples_of_ranks[_rank()]
    parts = [
        torch.nn.functional.pad(part, (0, 0, 0, longest - len(part)))
        for part in torch.split(grad_ND, list(num_samples_of_ranks))
    ]
    summed = torch.empty_like(parts[0])
    dist.reduce_scatter(summed, parts)
    return summed[:own]


def _log_sum_exp_over_ranks(lse_N: Tensor) -> Tensor:
    if _world() == 1:
        return lse_N
    highest_N = lse_N.clone()
    dist.all_reduce(highest_N, op=dist.ReduceOp.MAX)
    # A column whose every negative on some rank is left out has -inf there; its positive's rank has a number.
    sum_N = (lse_N - highest_N).exp()
    dist.all_reduce(sum_N)
    return highest_N + sum_N.log()
