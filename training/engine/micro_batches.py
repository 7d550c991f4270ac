"""The loss of one rank's part of a batch and its backward pass: at once, or in micro-batches."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from training.data.loader import Batch
from training.engine.teacher import TeacherFeatures
from training.engine.towers import Engine, Features, Towers, running_statistics
from training.model.transfer import send


def whole_batch(engine: Engine, batch: Batch, seed: int) -> tuple[Tensor, Callable[[], None]]:
    """Return the loss, a scalar on the device, and its backward pass, with all activations held."""
    _seed_dropout(seed, batch.step)
    device = engine.module.clip.logit_scale.device
    image, tokens_XL, kept_BP = _inputs(batch, slice(None), device)
    taught = engine.module.teacher_features(image, tokens_XL[: len(image)])
    loss = engine.module.loss(engine(image, tokens_XL, kept_BP), batch, taught=taught)
    # The loss's gradients add up over ranks; DeepSpeed averages.
    return loss.detach(), lambda: engine.backward(_spoilt_if_not_finite(loss) * dist.get_world_size())


def in_micro_batches(engine: Engine, batch: Batch, seed: int) -> tuple[Tensor, Callable[[], None]]:
    """Return the same with the activations of one micro-batch held at a time (GradCache, Gao et al. 2021).

    A first pass without activations gives every feature; the loss over the whole global batch gives each
    feature's gradient; then every micro-batch runs again, with the same dropout, and takes the gradients of
    its own features back. What a locked tower gave in the first pass is not computed again.

    A batch norm that is trained normalises within a micro-batch, as it does within a rank, and its running
    statistics see every micro-batch once.

    A rank with fewer samples than another has micro-batches computes its first sample again when it has none
    left: collectives want every rank. What comes of it is dropped.
    """
    towers: Towers = engine.module
    device = towers.clip.logit_scale.device
    rows = np.arange(len(batch.tokens_BL))
    num_parts = min(towers.num_micro_batches, len(rows))
    parts = [slice(part[0], part[-1] + 1) for part in np.array_split(rows, num_parts)]
    parts += [slice(0, 1)] * (towers.num_micro_batches - num_parts)

    statistics = [(tensor, tensor.clone()) for tensor in running_statistics(towers.clip)]
    features, taught = list[Features](), list[TeacherFeatures]()
    with torch.no_grad():
        for number, part in enumerate(parts):
            image, tokens_XL, kept_BP = _inputs(batch, part, device)
            _seed_dropout(seed, batch.step, number)
            with towers.autocast():
                features.append(towers(image, tokens_XL, kept_BP))
            if (known := towers.teacher_features(image, tokens_XL[: len(image)])) is not None:
                taught.append(known)
    for tensor, before in statistics:
        tensor.copy_(before)
    features, taught = features[:num_parts], taught[:num_parts]
    leaves = _as_leaves(features, image_wants_gradient=not towers.clip.image_tower_locked)
    loss = towers.loss(leaves, batch, taught=_joined(taught))

    def backward() -> None:
        _spoilt_if_not_finite(loss).backward()  # type: ignore[no-untyped-call]
        factors = _factors(leaves)
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            engine.set_gradient_accumulation_boundary(is_last)
            _seed_dropout(seed, batch.step, number)
            image, tokens_XL, kept_BP = _inputs(batch, part, device)
            if towers.clip.image_tower_locked:
                image = leaves.image_BD[part].detach()
            statistics_before = [tensor.clone() for tensor, _ in statistics]
            again = engine(image, tokens_XL, kept_BP)
            is_extra = number >= num_parts
            surrogate = again.logit_scale.new_zeros(())
            # The temperature's gradient, and the bias's, are the whole batch's, so they go back once.
            for leaf, factor in zip(factors, _factors(again), strict=True):
                assert leaf.grad is not None
                surrogate = surrogate + (factor * leaf.grad * is_last).sum()
            # Linear in the features, with the slope that the loss has there.
            for leaf, feature in zip(_sides(leaves), _sides(again), strict=True):
                if leaf.grad is not None:
                    slope = torch.zeros_like(leaf.grad[part]) if is_extra else leaf.grad[part]
                    surrogate = surrogate + (slope * feature).sum()
            engine.backward(surrogate * dist.get_world_size())
            if is_extra:  # only now: the backward pass reads the statistics as the forward pass left them
                for (tensor, _), before in zip(statistics, statistics_before, strict=True):
                    tensor.copy_(before)

    return loss.detach(), backward


def _spoilt_if_not_finite(loss: Tensor) -> Tensor:
    """Return the loss with a gradient that is not finite either if the loss is not.

    Whoever looks at the gradient then leaves the step out; nobody has to wait for the loss.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def _seed_dropout(seed: int, step: int, *micro_batch: int) -> None:
    """Seed dropout here, so that it does not depend on what ran before, even in a resumed run."""
    purpose = np.random.SeedSequence([seed, step, dist.get_rank(), *micro_batch])
    torch.manual_seed(int(purpose.generate_state(1, np.uint64)[0]))


def _inputs(batch: Batch, part: slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (images, token ids of captions and statements, patches) of some rows, as `Towers` reads them.

    Token ids stay on the CPU, where the text tower packs them: their padding is never computed on.
    """
    texts = [batch.tokens_BL[part]]
    if batch.questions is not None:
        texts.append(batch.questions.tokens_B2L[part].flatten(0, 1))
    longest = max(tokens.shape[1] for tokens in texts)
    tokens_XL = torch.cat([F.pad(tokens, (0, longest - tokens.shape[1])) for tokens in texts])
    kept_BP = None if batch.kept_BP is None else send(batch.kept_BP[part], device)
    return send(batch.image[part], device), tokens_XL, kept_BP


def _factors(features: Features) -> list[Tensor]:
    """Return what has no row a sample: the temperature's logarithm, and the bias if there is one."""
    factors = (features.logit_scale, features.logit_bias)
    return [factor for factor in factors if factor is not None]


def _sides(features: Features) -> list[Tensor]:
    """Return the features that have a row a sample."""
    sides = (features.image_BD, features.text_BD, features.statement_B2D)
    return [side for side in sides if side is not None]


def _as_leaves(parts: Sequence[Features], *, image_wants_gradient: bool) -> Features:
    """Return the parts' features joined, each a leaf that gathers its gradient."""
    image_BD, *texts = (torch.cat(side) for side in zip(*map(_sides, parts), strict=True))
    for leaf in (*texts, *_factors(parts[0])):
        leaf.requires_grad_()
    image_BD.requires_grad_(image_wants_gradient)
    statements = texts[1] if len(texts) > 1 else None
    return Features(image_BD, texts[0], parts[0].logit_scale, statements, parts[0].logit_bias)


def _joined(taught: list[TeacherFeatures]) -> TeacherFeatures | None:
    if not taught:
        return None
    return TeacherFeatures(
        torch.cat([part.image_BE for part in taught]), torch.cat([part.text_BE for part in taught])
    )
