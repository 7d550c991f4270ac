"""The loss of true and false statements about what images show (`training.data.statements`).

The loss of a question is the cross-entropy of choosing the true statement by its scaled cosine with the
image, log(1 + exp(s · (cos_false - cos_true))); a batch's is the sum over its questions divided by the
samples of the global batch.
"""

from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


def negation_loss(
    image_BD: Tensor, statement_B2D: Tensor, logit_scale: Tensor, asked_B: Tensor, num_samples: int
) -> Tensor:
    """Return the loss over the global batch of `num_samples`, the same scalar on every rank.

    As with `training.losses.contrastive.contrastive_loss`, gradients are those by this rank's features: they
    add up over ranks.
    """
    cosine_B2 = (image_BD[:, None] * statement_B2D).sum(2)
    per_question_B = F.softplus(logit_scale.exp() * (cosine_B2[:, 1] - cosine_B2[:, 0]))
    own: Tensor = (per_question_B * asked_B).sum() / num_samples
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return own
    everyone = own.detach().clone()
    dist.all_reduce(everyone)
    return own + (everyone - own.detach())
