"""Losses over the global batch: contrastive (section 2.1) and distillation; no rank holds an N × N matrix.

A rank holds its own rows and gathers all columns, and works tile by tile. The contrastive loss computes its
rows' logits once for both directions: a row's log-sum-exp is complete on its rank; a column's is put together
over ranks, one number a column. A rank whose rows are many computes the tiles again in the backward pass, so
that none ever holds an N × N matrix. Gradients of the gathered columns are summed back to the ranks that own
them, and only where a column wants one: in stage 1 the image features are columns, and no feature gradient
travels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_TILE_SIDE = 1024  # rows and columns of a tile: 4 MiB of float32 logits, which caches hold
_ACCELERATOR_TILE_SIDE = 4096  # enough work for one kernel: 64 MiB
# A rank's logits are kept for the backward pass where they are few (32 MiB): 256 rows of the paper's 32,768.
_KEPT_ELEMENTS = 1 << 23


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
    if (image_id_B is None) != (caption_id_B is None):
        raise ValueError("give the ids of both images and captions, or of neither")
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

        row_lse_B = row_BD.new_full((len(row_BD),), -torch.inf)
        column_lse_N = row_BD.new_full((len(column_ND),), -torch.inf)
        logit_BN = None
        if len(row_BD) * len(column_ND) <= _KEPT_ELEMENTS:
            logit_BN = row_BD.new_empty(len(row_BD), len(column_ND))
        for rows, columns in _tiles(row_BD, column_ND):
            logit = _logits(row_BD, column_ND, scale, rows, columns, first_row, ids_N2)
            if logit_BN is not None:
                logit_BN[rows, columns] = logit
            row_lse, column_lse = _log_sum_exps(logit)
            row_lse_B[rows] = torch.logaddexp(row_lse_B[rows], row_lse)
            column_lse_N[columns] = torch.logaddexp(column_lse_N[columns], column_lse)
        column_lse_N = _log_sum_exp_over_ranks(column_lse_N)

        own = slice(first_row, first_row + len(row_BD))
        diagonal_B = torch.linalg.vecdot(row_BD, column_BD) * scale
        loss: Tensor = (row_lse_B + column_lse_N[own] - 2 * diagonal_B).sum() / (2 * len(column_ND))
        if _world() > 1:
            dist.all_reduce(loss)
        ctx.save_for_backward(row_BD, column_ND, scale, row_lse_B, column_lse_N, logit_BN, ids_N2)
        ctx.num_samples_of_ranks, ctx.first_row = num_samples_of_ranks, first_row
        return loss

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        row_BD, column_ND, scale, row_lse_B, column_lse_N, logit_BN, ids_N2 = ctx.saved_tensors
        wants_row, wants_column = ctx.needs_input_grad[:2]
        factor = output_gradients[0] / (2 * len(column_ND))
        own_column_BD = column_ND[ctx.first_row : ctx.first_row + len(row_BD)]

        grad_row_BD = torch.zeros_like(row_BD)
        grad_column_ND = torch.zeros_like(column_ND) if wants_column else None
        for rows, columns in _tiles(row_BD, column_ND):
            if logit_BN is not None:
                logit = logit_BN[rows, columns]
            else:
                logit = _logits(row_BD, column_ND, scale, rows, columns, ctx.first_row, ids_N2)
            weight = (logit - row_lse_B[rows, None]).exp_()
            weight += (logit - column_lse_N[columns]).exp_()
            grad_row_BD[rows].addmm_(weight, column_ND[columns])
            if grad_column_ND is not None:
                grad_column_ND[columns].addmm_(weight.T, row_BD[rows])
        grad_row_BD.sub_(own_column_BD, alpha=2)  # the positives
        # Logits are scale × row · column, so that the sum of logit × its gradient is that of row × its own.
        grad_logit_scale = torch.linalg.vecdot(row_BD, grad_row_BD).sum() * scale * factor
        grad_column_BD = None
        if grad_column_ND is not None:
            grad_column_BD = _sum_to_owner(grad_column_ND, ctx.num_samples_of_ranks)
            grad_column_BD.sub_(row_BD, alpha=2).mul_(factor * scale)
        grad_row_BD.mul_(factor * scale)
        return grad_row_BD if wants_row else None, grad_column_BD, grad_logit_scale.reshape(1), None, None


def distillation_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    teacher_image_BE: Tensor,
    teacher_text_BE: Tensor,
    teacher_scale: Tensor,
    *,
    temperature: float,
    num_samples_of_ranks: tuple[int, ...],
) -> Tensor:
    """How far the student's similarities are from the teacher's; the same scalar on every rank.

    Both give an N × N matrix of logits over the global batch, scaled cosines divided by the distillation
    temperature T. The loss is the mean Kullback-Leibler divergence of the student's softmax from the
    teacher's over both directions, times T², so that its gradients have the size of the contrastive loss's
    at any T (Hinton et al. 2015):

        T² / 2N · Σ_i [KL(teacher's row i ‖ student's row i) + KL(teacher's column i ‖ student's column i)]

    It compares similarities, not features, so that the widths D and E may differ. Worked through tile by
    tile. Gradients are those by this rank's features: summed over ranks, they are the formula's.
    """
    loss: Tensor = _DistillationLoss.apply(  # type: ignore[no-untyped-call]
        text_BD,
        image_BD,
        logit_scale,
        teacher_text_BE,
        teacher_image_BE,
        teacher_scale,
        temperature,
        num_samples_of_ranks,
    )
    return loss


class _DistillationLoss(torch.autograd.Function):
    """Rows are texts and columns images, as in `_ContrastiveLoss`. Gradients are made with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        row_BD: Tensor,
        column_BD: Tensor,
        logit_scale: Tensor,
        teacher_row_BE: Tensor,
        teacher_column_BE: Tensor,
        teacher_scale: Tensor,
        temperature: float,
        num_samples_of_ranks: tuple[int, ...],
    ) -> Tensor:
        row_BD, column_BD = row_BD.detach(), column_BD.detach()
        sides = (
            (row_BD, _gather(column_BD, num_samples_of_ranks), logit_scale.detach().exp() / temperature),
            (
                teacher_row_BE.to(row_BD.dtype),
                _gather(teacher_column_BE.to(row_BD.dtype), num_samples_of_ranks),
                teacher_scale.detach().to(row_BD.dtype) / temperature,
            ),
        )
        column_ND, scale = sides[0][1], sides[0][2]
        row_lse, column_lse = [], []
        for rows_BX, columns_NX, factor in sides:
            row_lse_B = rows_BX.new_full((len(rows_BX),), -torch.inf)
            column_lse_N = rows_BX.new_full((len(columns_NX),), -torch.inf)
            for rows, columns in _tiles(rows_BX, columns_NX):
                logit = (rows_BX[rows] * factor) @ columns_NX[columns].T
                row_lse_B[rows] = torch.logaddexp(row_lse_B[rows], logit.logsumexp(1))
                column_lse_N[columns] = torch.logaddexp(column_lse_N[columns], logit.logsumexp(0))
            row_lse.append(row_lse_B)
            column_lse.append(_log_sum_exp_over_ranks(column_lse_N))

        wants_column = ctx.needs_input_grad[1]
        loss = row_BD.new_zeros(())
        grad_row_BD = torch.zeros_like(row_BD)
        grad_column_ND = torch.zeros_like(column_ND) if wants_column else None
        for rows, columns in _tiles(row_BD, column_ND):
            logits = [(side[0][rows] * side[2]) @ side[1][columns].T for side in sides]
            weight = torch.zeros_like(logits[0])
            for lses, index in ((row_lse, (rows, None)), (column_lse, (columns,))):
                student, target = (logit - lse[index] for logit, lse in zip(logits, lses, strict=True))
                probability = target.exp()
                loss += (probability * (target - student)).sum()
                weight += student.exp_() - probability
            grad_row_BD[rows].addmm_(weight, column_ND[columns])
            if grad_column_ND is not None:
                grad_column_ND[columns].addmm_(weight.T, row_BD[rows])

        mean = temperature**2 / (2 * len(column_ND))
        if _world() > 1:
            dist.all_reduce(loss)
        ctx.grad_logit_scale = torch.linalg.vecdot(row_BD, grad_row_BD).sum() * scale * mean
        ctx.grad_row_BD = grad_row_BD * (scale * mean)
        ctx.grad_column_BD = None
        if grad_column_ND is not None:
            ctx.grad_column_BD = _sum_to_owner(grad_column_ND, num_samples_of_ranks) * (scale * mean)
        return loss.mul_(mean)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = output_gradients[0]
        column = None if ctx.grad_column_BD is None else ctx.grad_column_BD * factor
        scale = (ctx.grad_logit_scale * factor).reshape(1)
        return ctx.grad_row_BD * factor, column, scale, None, None, None, None, None


def _logits(
    row_BD: Tensor,
    column_ND: Tensor,
    scale: Tensor,
    rows: slice,
    columns: slice,
    first_row: int,
    ids_N2: Tensor | None,
) -> Tensor:
    """Logits of some rows with some columns; -inf where a pair is no negative of the other."""
    logit_RC = (row_BD[rows] * scale) @ column_ND[columns].T
    if ids_N2 is not None:
        row_number_R = torch.arange(rows.start, rows.stop, device=row_BD.device) + first_row
        column_number_C = torch.arange(columns.start, columns.stop, device=row_BD.device)
        shares_RC = (ids_N2[row_number_R, None] == ids_N2[columns]).any(2)
        shares_RC &= row_number_R[:, None] != column_number_C
        logit_RC.masked_fill_(shares_RC, -torch.inf)
    return logit_RC


def _log_sum_exps(logit_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp along rows and along columns with one exponential a logit; takes `logit_RC` as its own."""
    # A row with every logit left out has -inf as its highest, and -inf - -inf is no number.
    highest_R = logit_RC.amax(1).clamp_(min=torch.finfo(logit_RC.dtype).min)
    exp_RC = (logit_RC - highest_R[:, None]).exp_()
    row_lse_R = exp_RC.sum(1).log_() + highest_R
    highest = highest_R.max()
    sum_C = (highest_R - highest).exp_() @ exp_RC
    # What the rows' shifts took below the smallest number is lost; it may matter only in a sum near there.
    precision = torch.finfo(logit_RC.dtype)
    if sum_C.min() < len(logit_RC) * precision.tiny / precision.eps:
        return row_lse_R, logit_RC.logsumexp(0)
    return row_lse_R, sum_C.log_() + highest


def _tiles(row_BD: Tensor, column_ND: Tensor) -> Iterator[tuple[slice, slice]]:
    side = _TILE_SIDE if row_BD.device.type == "cpu" else _ACCELERATOR_TILE_SIDE
    for first_row in range(0, len(row_BD), side):
        rows = slice(first_row, min(first_row + side, len(row_BD)))
        for first_column in range(0, len(column_ND), side):
            yield rows, slice(first_column, min(first_column + side, len(column_ND)))


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
