import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.rank_processes import run_ranks
from training.losses import contrastive as loss_module
from training.losses import tiles
from training.losses.contrastive import contrastive_loss
from training.losses.sigmoid import sigmoid_loss

N, D = 22, 8
BIAS = -3.0  # of the sigmoid loss


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    image_id = torch.randint(0, 12, (N,), generator=generator)
    caption_id = torch.randint(0, 12, (N,), generator=generator)
    scale = torch.tensor([math.log(20.0)], dtype=dtype)
    return image.to(dtype), text.to(dtype), scale, image_id, caption_id


# What pairs that share an image or a caption are to each other.
Sharing = Literal["negatives", "left out", "positives"]
SHARING: tuple[Sharing, ...] = get_args(Sharing)


def plain_loss(image: Tensor, text: Tensor, scale: Tensor, shares: Tensor, sharing: Sharing) -> Tensor:
    """The formula with its N × N matrix, of unit-norm features."""
    logits = scale.exp() * image @ text.T
    target = torch.eye(len(image), dtype=logits.dtype)
    if sharing == "positives":
        target = shares.to(logits.dtype) / shares.sum(1, keepdim=True)
    if sharing == "left out":
        logits = logits.masked_fill(shares & (target == 0), -torch.inf)
        target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def plain_sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, shares: Tensor, sharing: Sharing
) -> Tensor:
    """The formula with its N × N matrix, of unit-norm features."""
    logits, same = scale.exp() * image @ text.T + bias, torch.eye(len(image), dtype=torch.bool)
    sign = torch.where(shares if sharing == "positives" else same, 1.0, -1.0)
    is_asked = ~shares | same if sharing == "left out" else torch.ones_like(same)
    return -(F.logsigmoid(sign * logits) * is_asked).sum() / len(image)


def shares_image_or_caption(image_id: Tensor, caption_id: Tensor) -> Tensor:
    return (image_id[:, None] == image_id) | (caption_id[:, None] == caption_id)


def plain(sharing: Sharing, *, sigmoid: bool = False) -> tuple[Tensor, ...]:
    image, text, scale, image_id, caption_id = make_inputs()
    leaves = [tensor.requires_grad_() for tensor in (image, text, scale)]
    shares = shares_image_or_caption(image_id, caption_id)
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    if not sigmoid:
        loss = plain_loss(image, text, scale, shares, sharing)
    else:
        leaves.append(torch.tensor([BIAS], dtype=torch.float64, requires_grad=True))
        loss = plain_sigmoid_loss(image, text, scale, leaves[-1], shares, sharing)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def tiled(
    sizes: tuple[int, ...],
    sharing: Sharing,
    locked: bool,
    tile_side: int,
    kept_elements: int = 0,
    *,
    sigmoid: bool = False,
) -> list[npt.NDArray[np.float64]]:
    """Loss and this rank's gradients; run in a rank."""
    rank = 0
    if len(sizes) > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
    tiles._TILE_SIDE, loss_module._KEPT_ELEMENTS = tile_side, kept_elements
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    image, text, scale, image_id, caption_id = make_inputs()
    image, text = image[own].clone(), text[own].clone()
    leaves = [text.requires_grad_(), scale.requires_grad_()]
    if not locked:
        leaves.insert(0, image.requires_grad_())
    more: dict[str, Any] = {}
    if sharing != "negatives":
        more = {"image_id_B": image_id[own], "caption_id_B": caption_id[own]}
        more["are_positives"] = sharing == "positives"
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    if not sigmoid:
        loss = contrastive_loss(image, text, scale, num_samples_of_ranks=sizes, **more)
    else:
        leaves.append(torch.tensor([BIAS], dtype=scale.dtype, requires_grad=True))
        loss = sigmoid_loss(image, text, scale, leaves[-1], num_samples_of_ranks=sizes, **more)
    return [tensor.detach().numpy() for tensor in (loss, *torch.autograd.grad(loss, leaves))]


def tiled_cases(
    sizes: tuple[int, ...], cases: list[tuple[Sharing, bool]], locked: bool, tile_side: int
) -> list[list[npt.NDArray[np.float64]]]:
    """What `tiled` gives in each case; run in a rank."""
    return [tiled(sizes, sharing, locked, tile_side, sigmoid=sigmoid) for sharing, sigmoid in cases]


@pytest.fixture
def _tile_sizes_as_before() -> Iterator[None]:
    before = tiles._TILE_SIDE, loss_module._KEPT_ELEMENTS
    yield
    tiles._TILE_SIDE, loss_module._KEPT_ELEMENTS = before


@pytest.mark.usefixtures("_tile_sizes_as_before")
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("tile_side", "kept"), [(1, 0), (5, 0), (5, N * N), (N, 0), (1024, 1 << 23)])
def test_one_rank_equals_the_plain_formula(
    sharing: Sharing, sigmoid: bool, tile_side: int, kept: int
) -> None:
    found = tiled((N,), sharing, False, tile_side, kept, sigmoid=sigmoid)
    for ours, theirs in zip(found, plain(sharing, sigmoid=sigmoid), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "locked"), [((11, 11), False), ((12, 10), True), ((6, 5, 6, 5), False), ((6, 5, 6, 5), True)]
)
def test_ranks_together_equal_the_plain_formula(sizes: tuple[int, ...], locked: bool) -> None:
    cases: list[tuple[Sharing, bool]] = [
        (sharing, sigmoid) for sharing in SHARING for sigmoid in (False, True)
    ]
    results = run_ranks(tiled_cases, len(sizes), sizes, cases, locked, 4)
    for (sharing, sigmoid), *of_ranks in zip(cases, *results, strict=True):
        loss, image_grad, text_grad, *slopes = plain(sharing, sigmoid=sigmoid)
        found = [[torch.from_numpy(array) for array in rank] for rank in of_ranks]
        rows = [text_grad] if locked else [image_grad, text_grad]
        for rank in found:
            torch.testing.assert_close(rank[0], loss, rtol=1e-10, atol=1e-12)
        for place, expected in enumerate(rows, start=1):
            together = torch.cat([rank[place] for rank in found])
            torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-12)
        for place, expected in enumerate(slopes, start=1 + len(rows)):
            together = sum(rank[place] for rank in found)
            torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-12)


def test_the_sigmoid_loss_equals_that_of_open_clip() -> None:
    """In float32 to 1e-6, with one rank; the logits' scale and the bias have shape [] there."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, 300, 64, generator=generator)
    for sharpness, bias in ((10.0, -10.0), (100.0, -16.5)):
        image, text = (F.normalize(side, dim=1).requires_grad_() for side in (features[0], features.sum(0)))
        scale, offset = torch.tensor([math.log(sharpness)]), torch.tensor([bias])
        theirs = SigLipLoss()(image, text, scale.exp()[0], offset[0])
        ours = sigmoid_loss(image, text, scale, offset, num_samples_of_ranks=(300,))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        for mine, peer in zip(
            torch.autograd.grad(ours, (image, text)), torch.autograd.grad(theirs, (image, text)), strict=True
        ):
            torch.testing.assert_close(mine, peer, rtol=1e-6, atol=1e-6 * peer.abs().max().item())


def test_positives_without_ids_are_refused() -> None:
    image, text, scale, image_id, _ = make_inputs()
    with pytest.raises(ValueError, match="ids that make samples positives"):
        contrastive_loss(image, text, scale, num_samples_of_ranks=(N,), are_positives=True)
    with pytest.raises(ValueError, match="of both images and captions"):
        contrastive_loss(image, text, scale, num_samples_of_ranks=(N,), image_id_B=image_id)


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


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features of any number and width, a temperature, and ids that repeat."""
    num_samples, dim = draw(st.integers(1, 23)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    image, text = F.normalize(
        torch.randn(2, num_samples, dim, generator=generator, dtype=torch.float64), dim=-1
    )
    scale = torch.tensor([draw(st.floats(0, math.log(100)))], dtype=torch.float64)
    kinds = draw(st.integers(1, 30))
    image_id, caption_id = torch.randint(0, kinds, (2, num_samples), generator=generator)
    return image, text, scale, image_id, caption_id


@pytest.mark.usefixtures("_tile_sizes_as_before")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    batch=batches(),
    sharing=st.sampled_from(SHARING),
    tile_side=st.integers(1, 24),
    keeps=st.booleans(),
    wide=st.booleans(),
)
def test_any_batch_equals_the_plain_formula(
    batch: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    sharing: Sharing,
    tile_side: int,
    keeps: bool,
    wide: bool,
) -> None:
    """1e-6 in float64, 1e-5 in float32, the loss relative to the logits it is a difference of."""
    tiles._TILE_SIDE, loss_module._KEPT_ELEMENTS = tile_side, 1 << 23 if keeps else 0
    image, text, scale, image_id, caption_id = batch
    expected = [leaf.clone().requires_grad_() for leaf in (image, text, scale)]
    theirs = plain_loss(*expected, shares_image_or_caption(image_id, caption_id), sharing)
    dtype, tolerance = (torch.float64, 1e-6) if wide else (torch.float32, 1e-5)
    found = [leaf.to(dtype).requires_grad_() for leaf in (image, text, scale)]
    more: dict[str, Any] = {}
    if sharing != "negatives":
        more = {"image_id_B": image_id, "caption_id_B": caption_id}
        more["are_positives"] = sharing == "positives"
    ours = contrastive_loss(*found, num_samples_of_ranks=(len(image),), **more)
    assert abs(ours.item() - theirs.item()) <= tolerance * max(1.0, scale.exp().item())
    for mine, plain_gradient in zip(
        torch.autograd.grad(ours, found), torch.autograd.grad(theirs, expected), strict=True
    ):
        # A gradient is a sum of scale × weight × feature, with weights of at most 2 / N.
        largest = max(1.0, scale.exp().item()) ** 2 if not wide else 1.0
        assert (mine.double() - plain_gradient).abs().max() <= tolerance * largest


def test_on_a_device_the_loss_waits_for_nothing() -> None:
    """Tensors of the meta device have no values: whatever asks for one fails."""
    with torch.device("meta"):
        image, text, scale = torch.rand(9000, D), torch.rand(9000, D), torch.rand(1)
        ids = torch.zeros(9000, dtype=torch.int64)
    leaves, sizes = [tensor.requires_grad_() for tensor in (image, text, scale)], (9000,)
    for are_positives in (False, True):
        more: dict[str, Any] = {"image_id_B": ids, "caption_id_B": ids, "are_positives": are_positives}
        for loss in (
            contrastive_loss(image, text, scale, num_samples_of_ranks=sizes, **more),
            sigmoid_loss(image, text, scale, scale, num_samples_of_ranks=sizes, **more),
        ):
            shapes = [gradient.shape for gradient in torch.autograd.grad(loss, leaves)]
            assert shapes == [(9000, D)] * 2 + [(1,)]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_column_far_below_its_rows_keeps_its_numbers(
    monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    """Every row has a logit of 100 in one column, next to which exp() of the others is 0 in float32."""
    monkeypatch.setattr(loss_module, "host_waits_for", lambda tensor: on_device)
    angle = torch.tensor([0.0, 0.0, math.pi])  # two images beside every text, one opposite to all
    image = torch.stack([angle.cos(), angle.sin()], dim=1)
    text = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    scale = torch.tensor([math.log(100.0)])
    leaves = [tensor.requires_grad_() for tensor in (image, text)]
    loss = contrastive_loss(*leaves, scale, num_samples_of_ranks=(3,))
    assert loss.item() == pytest.approx(plain_value(image, text, scale), rel=1e-5)
    assert all(bool(gradient.isfinite().all()) for gradient in torch.autograd.grad(loss, leaves))


def plain_value(image: Tensor, text: Tensor, scale: Tensor) -> float:
    logits = scale.exp() * image @ text.T
    target = torch.arange(len(image))
    return ((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2).item()


@pytest.mark.parametrize("sigmoid", [False, True])
def test_no_tensor_has_the_size_of_the_batch_squared(sigmoid: bool) -> None:
    num_samples = 4096
    feature = F.normalize(torch.randn(num_samples, 16), dim=1)
    image, text = feature.clone().requires_grad_(), feature.flip(0).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        zero, sizes = torch.zeros(1), (num_samples,)
        loss = (
            sigmoid_loss(image, text, zero, zero, num_samples_of_ranks=sizes)
            if sigmoid
            else contrastive_loss(image, text, zero, num_samples_of_ranks=sizes)
        )
        torch.autograd.grad(loss, (image, text))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert tiles._TILE_SIDE**2 * 4 <= largest <= num_samples**2 * 4 // 8


def bytes_that_travel(sizes: tuple[int, ...], locked: bool, exclude: bool) -> dict[str, int]:
    """Bytes that this rank gives to each kind of collective in a forward and a backward pass."""
    dist = torch.distributed
    dist.init_process_group("gloo")
    found: dict[str, int] = {"all_gather": 0, "all_reduce": 0, "reduce_scatter": 0}
    whole = {name: getattr(dist, name) for name in found}

    def watched(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            sent = arguments[0] if name == "all_reduce" else arguments[1]
            tensors = sent if isinstance(sent, list) else [sent]
            found[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return whole[name](*arguments, **options)

        return call

    patch = pytest.MonkeyPatch()
    for name in dir(dist):  # whatever else would send is an error
        if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv", "isend")):
            patch.setattr(dist, name, watched(name) if name in found else None)
    rank = dist.get_rank()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    image, text, scale, image_id, caption_id = make_inputs(torch.float32)
    ids = {"image_id_B": image_id[own], "caption_id_B": caption_id[own]} if exclude else {}
    leaves = [text[own].clone().requires_grad_(), scale.requires_grad_()]
    image = image[own].clone().requires_grad_(not locked)
    loss = contrastive_loss(image, leaves[0], scale, num_samples_of_ranks=sizes, **ids)
    torch.autograd.grad(loss, leaves if locked else [image, *leaves])
    patch.undo()
    return found


@pytest.mark.parametrize(("locked", "exclude"), [(True, False), (False, False), (False, True)])
def test_only_features_statistics_and_needed_gradients_travel(locked: bool, exclude: bool) -> None:
    """Features of one side once, two numbers a column, the loss; in stage 1 no gradient of a feature."""
    sizes = (12, 10)
    longest, float32, int64 = max(sizes), 4, 8
    for found in run_ranks(bytes_that_travel, 2, sizes, locked, exclude):
        ids = longest * 2 * int64 if exclude else 0
        assert found["all_gather"] == longest * D * float32 + ids
        assert found["all_reduce"] == (2 * N + 1) * float32
        assert found["reduce_scatter"] == (0 if locked else len(sizes) * longest * D * float32)


def largest_errors_of_random_batches(ranks: int, cases: int) -> list[tuple[float, float]]:
    """(error, tolerance) of each random batch: the worst of this rank's numbers against the formula."""
    dist = torch.distributed
    dist.init_process_group("gloo")
    rank, random = dist.get_rank(), np.random.default_rng(ranks)
    found = []
    for case in range(cases):
        sizes = tuple(int(size) for size in random.integers(1, 9, ranks))
        num_samples, dim = sum(sizes), int(random.integers(1, 10))
        tiles._TILE_SIDE = int(random.integers(1, 12))
        loss_module._KEPT_ELEMENTS = int(random.choice([0, 1 << 23]))
        features = torch.from_numpy(random.normal(size=(2, num_samples, dim)))
        image, text = F.normalize(features, dim=2)
        scale = torch.tensor([float(random.uniform(0, math.log(100)))], dtype=torch.float64)
        kinds = int(random.integers(1, 30))
        image_id, caption_id = (torch.from_numpy(random.integers(0, kinds, num_samples)) for _ in range(2))
        exclude, wide = bool(random.integers(2)), case % 2 == 0
        leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
        logits = leaves[2].exp() * leaves[0] @ leaves[1].T
        if exclude:
            others = ~torch.eye(num_samples, dtype=torch.bool)
            logits = logits.masked_fill(shares_image_or_caption(image_id, caption_id) & others, -torch.inf)
        target = torch.arange(num_samples)
        plain_loss_value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        expected = torch.autograd.grad(plain_loss_value, leaves)

        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        dtype, tolerance = (torch.float64, 1e-6) if wide else (torch.float32, 1e-5)
        mine = [tensor.to(dtype).requires_grad_() for tensor in (image[own], text[own], scale)]
        ids = {"image_id_B": image_id[own], "caption_id_B": caption_id[own]} if exclude else {}
        loss = contrastive_loss(*mine, num_samples_of_ranks=sizes, **ids)
        gradients = list(torch.autograd.grad(loss, mine))
        dist.all_reduce(gradients[2])
        rows = [expected[0][own], expected[1][own], expected[2]]
        errors = [
            (ours.double() - theirs).abs().max().item() for ours, theirs in zip(gradients, rows, strict=True)
        ]
        largest = scale.exp().item() ** (1 if wide else 2)
        found.append((max(*errors, abs(loss.item() - plain_loss_value.item())), tolerance * largest))
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_batch_over_ranks_equals_the_plain_formula(ranks: int) -> None:
    """Random shapes, uneven ranks, duplicates: 1e-6 in float64, 1e-5 in float32, of what logits reach."""
    for found in run_ranks(largest_errors_of_random_batches, ranks, ranks, 40):
        assert len(found) == 40
        for error, tolerance in found:
            assert error <= tolerance


def test_ids_of_one_side_alone_are_refused() -> None:
    image, text, scale, image_id, _ = make_inputs()
    with pytest.raises(ValueError, match="the ids of both images and captions, or of neither"):
        contrastive_loss(image, text, scale, num_samples_of_ranks=(N,), image_id_B=image_id)
