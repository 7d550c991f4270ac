"""The distillation loss over the global batch: a larger model's similarities."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from training.losses.tiles import gather, log_sum_exp_over_ranks, num_ranks, sum_to_owner, tiles


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
    """Return how far the student's similarities are from the teacher's; the same on every rank.

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
    """Rows are texts and columns images, as in the contrastive loss.

    Gradients are made with the loss.
    """

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
            (row_BD, gather(column_BD, num_samples_of_ranks), logit_scale.detach().exp() / temperature),
            (
                teacher_row_BE.to(row_BD.dtype),
                gather(teacher_column_BE.to(row_BD.dtype), num_samples_of_ranks),
                teacher_scale.detach().to(row_BD.dtype) / temperature,
            ),
        )
        column_ND, scale = sides[0][1], sides[0][2]
        row_lse, column_lse = [], []
        for rows_BX, columns_NX, factor in sides:
            row_lse_B = rows_BX.new_full((len(rows_BX),), -torch.inf)
            column_lse_N = rows_BX.new_full((len(columns_NX),), -torch.inf)
            for rows, columns in tiles(rows_BX, columns_NX):
                logit = (rows_BX[rows] * factor) @ columns_NX[columns].T
                row_lse_B[rows] = torch.logaddexp(row_lse_B[rows], logit.logsumexp(1))
                column_lse_N[columns] = torch.logaddexp(column_lse_N[columns], logit.logsumexp(0))
            row_lse.append(row_lse_B)
            column_lse.append(log_sum_exp_over_ranks(column_lse_N))

        wants_column = ctx.needs_input_grad[1]
        loss = row_BD.new_zeros(())
        grad_row_BD = torch.zeros_like(row_BD)
        grad_column_ND = torch.zeros_like(column_ND) if wants_column else None
        for rows, columns in tiles(row_BD, column_ND):
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
        if num_ranks() > 1:
            dist.all_reduce(loss)
        ctx.grad_logit_scale = torch.linalg.vecdot(row_BD, grad_row_BD).sum() * scale * mean
        ctx.grad_row_BD = grad_row_BD * (scale * mean)
        ctx.grad_column_BD = None
        if grad_column_ND is not None:
            ctx.grad_column_BD = sum_to_owner(grad_column_ND, num_samples_of_ranks) * (scale * mean)
        return loss.mul_(mean)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = output_gradients[0]
        column = None if ctx.grad_column_BD is None else ctx.grad_column_BD * factor
        scale = (ctx.grad_logit_scale * factor).reshape(1)
        return ctx.grad_row_BD * factor, column, scale, None, None, None, None, None
