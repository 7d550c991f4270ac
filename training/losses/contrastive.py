"""The contrastive loss over the global batch (section 2.1); no rank holds an N × N matrix.

A rank computes its rows' logits once for both directions, tile by tile (`training.losses.tiles`): a row's
log-sum-exp is complete on its rank; a column's is put together over ranks, one number a column. A rank with
many rows computes the tiles again in the backward pass. Gradients travel only if a column wants one: in
stage 1 the image features are columns, and no feature gradient travels.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from training.losses.pairs import Pairs
from training.losses.tiles import (
    gather,
    host_waits_for,
    log_sum_exp_over_ranks,
    num_ranks,
    sum_to_owner,
    tiles,
)

# A rank's logits are kept for the backward pass if they are few (32 MiB): 256 rows of the paper's 32,768.
_KEPT_ELEMENTS = 1 << 23


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    num_samples_of_ranks: tuple[int, ...],
    image_id_B: Tensor | None = None,
    caption_id_B: Tensor | None = None,
    are_positives: bool = False,
) -> Tensor:
    """Return the mean cross-entropy of both directions over the global batch, the same on every rank.

    With the features of all ranks in rank order, it is the plain formula

        logits_NN = logit_scale.exp() * text_ND @ image_ND.T
        logits_NN = logits_NN.masked_fill(shares_NN, -torch.inf)  # if ids are given
        target_N = torch.arange(N)
        loss = (F.cross_entropy(logits_NN, target_N) + F.cross_entropy(logits_NN.T, target_N)) / 2

    where shares_NN says which pairs i ≠ j have the same image id or the same caption id: they are no
    negatives of each other. With `are_positives`, they are positives of each other in equal parts (UniCL,
    Yang et al. 2022); shares_NN then holds i = j too, no logit is filled, and

        target_NN = shares_NN / shares_NN.sum(1, keepdim=True)

    holds probabilities instead of numbers of classes.

    `image_BD` and `text_BD` are this rank's unit-norm features, `logit_scale` the [1] logarithm of the factor
    on their products, `num_samples_of_ranks` how many rows each rank has.

    The backward pass gives each rank the gradient of the global loss by what this rank put in: *summed* over
    ranks, parameter gradients are those of the plain formula.

    Raises:
        ValueError: if the ids of only one side are given, or positives are asked for without ids.
    """
    pairs = Pairs(
        image_id_B,
        caption_id_B,
        num_samples_of_ranks,
        are_positives=are_positives,
        device=image_BD.device,
    )
    # Rows are the side that surely wants a gradient: then columns, which travel, may need none.
    loss: Tensor = _ContrastiveLoss.apply(  # type: ignore[no-untyped-call]
        text_BD, image_BD, logit_scale, num_samples_of_ranks, pairs
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
        pairs: Pairs,
    ) -> Tensor:
        row_BD, column_BD = row_BD.detach(), column_BD.detach()
        column_ND = gather(column_BD, num_samples_of_ranks)
        scale = logit_scale.detach().exp()

        row_lse_B = row_BD.new_full((len(row_BD),), -torch.inf)
        column_lse_N = row_BD.new_full((len(column_ND),), -torch.inf)
        positive_B = torch.zeros_like(row_lse_B)
        logit_BN = None
        if len(row_BD) * len(column_ND) <= _KEPT_ELEMENTS:
            logit_BN = row_BD.new_empty(len(row_BD), len(column_ND))
        for rows, columns in tiles(row_BD, column_ND):
            logit = _logits(row_BD, column_ND, scale, rows, columns, pairs)
            if pairs.are_positives:
                positive_B[rows] += pairs.targets(rows, columns, logit.dtype).mul_(logit).sum(1)
            if logit_BN is not None:
                logit_BN[rows, columns] = logit
            row_lse, column_lse = _log_sum_exps(logit)
            row_lse_B[rows] = torch.logaddexp(row_lse_B[rows], row_lse)
            column_lse_N[columns] = torch.logaddexp(column_lse_N[columns], column_lse)
        column_lse_N = log_sum_exp_over_ranks(column_lse_N)

        own = slice(pairs.first_row, pairs.first_row + len(row_BD))
        if not pairs.are_positives:
            positive_B = 2 * (torch.linalg.vecdot(row_BD, column_BD) * scale)
        loss: Tensor = (row_lse_B + column_lse_N[own] - positive_B).sum() / (2 * len(column_ND))
        if num_ranks() > 1:
            dist.all_reduce(loss)
        ctx.save_for_backward(row_BD, column_ND, scale, row_lse_B, column_lse_N, logit_BN)
        ctx.num_samples_of_ranks, ctx.pairs = num_samples_of_ranks, pairs
        return loss

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        row_BD, column_ND, scale, row_lse_B, column_lse_N, logit_BN = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        wants_row, wants_column = ctx.needs_input_grad[:2]
        factor = output_gradients[0] / (2 * len(column_ND))
        own_column_BD = column_ND[pairs.first_row : pairs.first_row + len(row_BD)]

        grad_row_BD = torch.zeros_like(row_BD)
        grad_column_ND = torch.zeros_like(column_ND) if wants_column else None
        for rows, columns in tiles(row_BD, column_ND):
            if logit_BN is not None:
                logit = logit_BN[rows, columns]
            else:
                logit = _logits(row_BD, column_ND, scale, rows, columns, pairs)
            weight = (logit - row_lse_B[rows, None]).exp_()
            weight += (logit - column_lse_N[columns]).exp_()
            if pairs.are_positives:
                weight -= pairs.targets(rows, columns, weight.dtype)
            grad_row_BD[rows].addmm_(weight, column_ND[columns])
            if grad_column_ND is not None:
                grad_column_ND[columns].addmm_(weight.T, row_BD[rows])
        if not pairs.are_positives:
            grad_row_BD.sub_(own_column_BD, alpha=2)
        # Logits are scale × row · column, so that the sum of logit × its gradient is that of row × its own.
        grad_logit_scale = torch.linalg.vecdot(row_BD, grad_row_BD).sum() * scale * factor
        grad_column_BD = None
        if grad_column_ND is not None:
            grad_column_BD = sum_to_owner(grad_column_ND, ctx.num_samples_of_ranks)
            if not pairs.are_positives:
                grad_column_BD.sub_(row_BD, alpha=2)
            grad_column_BD.mul_(factor * scale)
        grad_row_BD.mul_(factor * scale)
        return grad_row_BD if wants_row else None, grad_column_BD, grad_logit_scale.reshape(1), None, None


def _logits(
    row_BD: Tensor,
    column_ND: Tensor,
    scale: Tensor,
    rows: slice,
    columns: slice,
    pairs: Pairs,
) -> Tensor:
    """Return the logits of some rows with some columns; -inf if a pair is left out."""
    logit_RC = (row_BD[rows] * scale) @ column_ND[columns].T
    pairs.leave_out(logit_RC, rows, columns)
    return logit_RC


def _log_sum_exps(logit_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp along rows and along columns with one exponential a logit.

    Overwrites `logit_RC`.
    """
    # A row with every logit left out has -inf as its highest, and -inf - -inf is NaN.
    highest_R = logit_RC.amax(1).clamp_(min=torch.finfo(logit_RC.dtype).min)
    exp_RC = (logit_RC - highest_R[:, None]).exp_()
    row_lse_R = exp_RC.sum(1).log_() + highest_R
    highest = highest_R.max()
    sum_C = (highest_R - highest).exp_() @ exp_RC
    # What the rows' shifts took below the smallest number is lost; it may matter only in a sum near there.
    precision = torch.finfo(logit_RC.dtype)
    is_lossy = sum_C.min() < len(logit_RC) * precision.tiny / precision.eps
    if host_waits_for(logit_RC):
        return row_lse_R, torch.where(is_lossy, logit_RC.logsumexp(0), sum_C.log() + highest)
    return row_lse_R, logit_RC.logsumexp(0) if is_lossy else sum_C.log_() + highest
