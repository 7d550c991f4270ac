import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from rank_processes import run_ranks
from torch import Tensor
from torch.nn import functional as F

from training import loss as loss_module
from training.loss import contrastive_loss

N, D = 22, 8


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    image_id = torch.randint(0, 12, (N,), generator=generator)
    caption_id = torch.randint(0, 12, (N,), generator=generator)
    scale = torch.tensor([math.log(20.0)], dtype=dtype)
    return image.to(dtype), text.to(dtype), scale, image_id, caption_id


def plain_loss(image: Tensor, text: Tensor, scale: Tensor, shares: Tensor | None) -> Tensor:
    """The formula with its N × N matrix."""
    logits = scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    if shares is not None:
        logits = logits.masked_fill(shares & ~torch.eye(N, dtype=torch.bool), -torch.inf)
    target = torch.arange(N)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def shares_image_or_caption(image_id: Tensor, caption_id: Tensor) -> Tensor:
    return (image_id[:, None] == image_id) | (caption_id[:, None] == caption_id)


def plain(exclude: bool) -> tuple[Tensor, ...]:
    image, text, scale, image_id, caption_id = make_inputs()
    leaves = [tensor.requires_grad_() for tensor in (image, text, scale)]
    shares = shares_image_or_caption(image_id, caption_id) if exclude else None
    loss = plain_loss(image, text, scale, shares)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def tiled(
    sizes: tuple[int, ...], exclude: bool, locked: bool, tile_elements: int
) -> list[npt.NDArray[np.float64]]:
    """Loss and this rank's gradients; run in a rank."""
    rank = 0
    if len(sizes) > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
    loss_module._TILE_ELEMENTS = tile_elements
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    image, text, scale, image_id, caption_id = make_inputs()
    image, text = image[own].clone(), text[own].clone()
    leaves = [text.requires_grad_(), scale.requires_grad_()]
    if not locked:
        leaves.insert(0, image.requires_grad_())
    ids = {"image_id_B": image_id[own], "caption_id_B": caption_id[own]} if exclude else {}
    loss = contrastive_loss(
        F.normalize(image, dim=1), F.normalize(text, dim=1), scale, num_samples_of_ranks=sizes, **ids
    )
    return [tensor.detach().numpy() for tensor in (loss, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("tile_elements", [1, 5 * N, 1 << 22])
def test_one_rank_equals_the_plain_formula(exclude: bool, tile_elements: int) -> None:
    default = loss_module._TILE_ELEMENTS
    try:
        found = tiled((N,), exclude, False, tile_elements)
    finally:
        loss_module._TILE_ELEMENTS = default
    for ours, theirs in zip(found, plain(exclude), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "exclude", "locked"),
    [
        ((11, 11), True, False),
        ((12, 10), False, True),
        ((6, 5, 6, 5), True, False),
        ((6, 5, 6, 5), True, True),
    ],
)
def test_ranks_together_equal_the_plain_formula(sizes: tuple[int, ...], exclude: bool, locked: bool) -> None:
    loss, image_grad, text_grad, scale_grad = plain(exclude)
    results = run_ranks(tiled, len(sizes), sizes, exclude, locked, 4 * N)
    found = [[torch.from_numpy(array) for array in rank] for rank in results]
    for rank in found:
        torch.testing.assert_close(rank[0], loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([rank[-2] for rank in found]), text_grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sum(rank[-1] for rank in found), scale_grad, rtol=1e-9, atol=1e-12)
    if not locked:
        torch.testing.assert_close(torch.cat([rank[1] for rank in found]), image_grad, rtol=1e-9, atol=1e-12)


def test_all_pairs_share_a_caption_leaves_a_loss_of_zero() -> None:
    image, text, scale, image_id, _ = make_inputs()
    loss = contrastive_loss(
        F.normalize(image, dim=1),
        F.normalize(text, dim=1),
        scale,
        num_samples_of_ranks=(N,),
        image_id_B=image_id,
        caption_id_B=torch.zeros(N, dtype=torch.int64),
    )
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_no_tensor_has_the_size_of_the_batch_squared() -> None:
    num_samples = 4096
    feature = F.normalize(torch.randn(num_samples, 16), dim=1)
    image, text = feature.clone().requires_grad_(), feature.flip(0).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = contrastive_loss(image, text, torch.zeros(1), num_samples_of_ranks=(num_samples,))
        torch.autograd.grad(loss, (image, text))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert loss_module._TILE_ELEMENTS * 4 <= largest <= num_samples**2 * 4 // 3
