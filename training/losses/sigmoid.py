"""The sigmoid loss over the global batch (SigLIP, Zhai et al. 2023); no rank holds an N × N matrix.

Every pair of an image and a caption is a question of its own, so that a tile of logits is complete in itself:
a rank computes each of its tiles once, and makes the gradients with the loss. Only features travel, and their
gradients if columns want any.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from training.losses.pairs import Pairs
from training.losses.tiles import gather, num_ranks, sum_to_owner, tiles


def sigmoid_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    num_samples_of_ranks: tuple[int, ...],
    image_id_B: Tensor | None = None,
    caption_id_B: Tensor | None = None,
    are_positives: bool = False,
) -> Tensor:
    """Return the sum of all pairs' binary cross-entropies, divided by N; the same scalar on every rank.

    With the features of all ranks in rank order, it is the plain formula

        logits_NN = logit_scale.exp() * text_ND @ image_ND.T + logit_bias
        loss = -F.logsigmoid(sign_NN * logits_NN).sum() / N

    where sign_NN is 1 for i = j and -1 elsewhere. Pairs i ≠ j with the same image id or the same caption id
    are left out of the sum if ids are given; with `are_positives`, their sign is 1.

    `image_BD` and `text_BD` are this rank's unit-norm features, `logit_scale` the [1] logarithm of the factor
    on their products, `logit_bias` [1], `num_samples_of_ranks` how many rows each rank has.

    Gradients are those by what this rank put in: *summed* over ranks, they are those of the formula.

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
    loss: Tensor = _SigmoidLoss.apply(  # type: ignore[no-untyped-call]
        text_BD, image_BD, logit_scale, logit_bias, num_samples_of_ranks, pairs
    )
    return loss


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row_BD: Tensor,
        column_BD: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        num_samples_of_ranks: tuple[int, ...],
        pairs: Pairs,
    ) -> Tensor:
        row_BD, column_BD = row_BD.detach(), column_BD.detach()
        column_ND = gather(column_BD, num_samples_of_ranks)
        scale, bias = logit_scale.detach().exp(), logit_bias.detach()
        wants_gradient, wants_column = any(ctx.needs_input_grad), ctx.needs_input_grad[1]

        loss_B, slope_B = torch.zeros_like(row_BD[:, 0]), torch.zeros_like(row_BD[:, 0])
        grad_row_BD = torch.zeros_like(row_BD)
        grad_column_ND = torch.zeros_like(column_ND) if wants_column else None
        for rows, columns in tiles(row_BD, column_ND):
            # The logits of wrong answers: a positive's has its sign turned.
            wrong = torch.addmm(bias, row_BD[rows] * scale, column_ND[columns].T)
            positive = pairs.positives(rows, columns)
            wrong = torch.where(positive, -wrong, wrong)
            pairs.leave_out(wrong, rows, columns)
            loss_B[rows] += F.softplus(wrong).sum(1)
            if not wants_gradient:
                continue
            weight = wrong.sigmoid_()
            weight = torch.where(positive, -weight, weight)
            slope_B[rows] += weight.sum(1)
            grad_row_BD[rows].addmm_(weight, column_ND[columns])
            if grad_column_ND is not None:
                grad_column_ND[columns].addmm_(weight.T, row_BD[rows])

        loss = loss_B.sum() / len(column_ND)
        if num_ranks() > 1:
            dist.all_reduce(loss)
        ctx.grad_row_BD = ctx.grad_column_BD = None
        if wants_gradient:
            # Logits are scale × row · column + bias, so that the sum of products × gradients is that of
            # row × its own.
            ctx.grad_scale = torch.linalg.vecdot(row_BD, grad_row_BD).sum() * scale / len(column_ND)
            ctx.grad_bias = slope_B.sum() / len(column_ND)
            ctx.grad_row_BD = grad_row_BD.mul_(scale / len(column_ND))
        if grad_column_ND is not None:
            grad_column_BD = sum_to_owner(grad_column_ND, num_samples_of_ranks)
            ctx.grad_column_BD = grad_column_BD.mul_(scale / len(column_ND))
        return loss

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = output_gradients[0]
        row_BD, column_BD = (
            None if grad is None else grad * factor for grad in (ctx.grad_row_BD, ctx.grad_column_BD)
        )
        scale, bias = ((grad * factor).reshape(1) for grad in (ctx.grad_scale, ctx.grad_bias))
        return row_BD, column_BD, scale, bias, None, None
