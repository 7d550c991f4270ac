"""Muon for the towers' matrices and AdamW for all other weights (Jordan et al. 2024, Liu et al. 2025)."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from training.flops import MUON_ITERATIONS

MOMENTUM = 0.95  # decay per step of the mean of gradients (Jordan et al. 2024)
# The root mean square of AdamW's steps, so that learning rates and decay hold for both (Liu et al. 2025, 2.2)
_STEP_RMS = 0.2
# x → a x + b x³ + c x⁵ on singular values, which takes them near to 1 (Jordan et al. 2024)
_A, _B, _C = 3.4445, -4.7750, 2.0315
_TINY = 1e-7

Places = tuple[tuple[int, torch.Size], ...]  # of matrices in a flat vector: start, and shape


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `is_muon` take Muon's steps.

    A step of Muon goes along the orthogonal matrix that is nearest to the mean of gradients, so that all
    directions of a matrix are learned equally fast. Its only state is that mean, `exp_avg`.

    At ZeRO 1 and 2, a group has one flat part of its matrices, and `places` says where each starts in the
    whole, and its shape. A rank makes the steps of all matrices of which it has a part, and gets what it
    lacks of their means from the others, in bfloat16 on a GPU.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__([{"is_muon": False, "places": None, **group} for group in groups], **settings)
        self.matrices = frozenset(
            parameter for group in self.param_groups if group["is_muon"] for parameter in group["params"]
        )
        # Of its own, since hooks around a step would run again around that of a base class.
        self._adam = torch.optim.AdamW(self.param_groups, **settings)
        self._adam.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; nothing changes if `found_inf`, a scalar on the device, is true."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if group["is_muon"]:
                _step(group, self.state, found_inf)
        others = [group for group in self.param_groups if not group["is_muon"]]
        if others:
            self._adam.param_groups = others
            if found_inf is not None:
                self._adam.found_inf = found_inf  # type: ignore[attr-defined]
            self._adam.step()


def _step(group: dict[str, Any], states: dict[Tensor, Any], found_inf: Tensor | None) -> None:
    ahead = []
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    for parameter in parameters:
        state = states[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1 if found_inf is None else 1 - found_inf.squeeze()
        mean = state["exp_avg"].lerp(parameter.grad, 1 - MOMENTUM)
        ahead.append(parameter.grad.lerp(mean, MOMENTUM))  # Nesterov's
        _replace(state["exp_avg"], mean, found_inf)
    if group["places"] is None:
        directions = orthogonal(ahead)
    else:
        directions = [_own_part(part, group["places"]) for part in ahead]
    for parameter, direction in zip(parameters, directions, strict=True):
        decayed = parameter * (1 - group["lr"] * group["weight_decay"])
        _replace(parameter, decayed.add_(direction, alpha=-group["lr"]), found_inf)


def _replace(old: Tensor, new: Tensor, unless: Tensor | None) -> None:
    old.copy_(new if unless is None else torch.where(unless.bool(), old, new))


def _own_part(part: Tensor, places: Places) -> Tensor:
    """Return this rank's part of the steps of all matrices, of its part of their means. A collective."""
    size, rank = len(part), dist.get_rank()
    spans = _spans(places, size, dist.get_world_size())
    own_places, begin, end = spans[rank]
    part = part.to(_computed_in(part))
    # What a rank needs of the others' parts lies end to end: all that arrives is its span.
    sent = [_overlap((rank * size, (rank + 1) * size), (low, high)) for _, low, high in spans]
    taken = [_overlap((other * size, (other + 1) * size), (begin, end)) for other in range(len(spans))]
    pieces = [part[low - rank * size : high - rank * size] for low, high in sent]
    whole = part.new_empty(end - begin)
    dist.all_to_all_single(
        whole,
        torch.cat(pieces),
        [high - low for low, high in taken],
        [len(piece) for piece in pieces],
    )
    matrices = [
        whole[start - begin : start - begin + shape.numel()].view(shape) for start, shape in own_places
    ]
    own = torch.zeros(size, device=part.device)  # padding has no step
    for (start, shape), step in zip(own_places, orthogonal(matrices), strict=True):
        low, high = _overlap((rank * size, (rank + 1) * size), (start, start + shape.numel()))
        own[low - rank * size : high - rank * size] = step.flatten()[low - start : high - start]
    return own


@functools.lru_cache(maxsize=8)
def _spans(places: Places, size: int, ranks: int) -> list[tuple[Places, int, int]]:
    """Return, for each rank, the matrices of which its part has some, and the span that they take."""
    spans = []
    for rank in range(ranks):
        low, high = rank * size, (rank + 1) * size
        own = tuple(place for place in places if place[0] < high and place[0] + place[1].numel() > low)
        end = own[-1][0] + own[-1][1].numel() if own else 0
        spans.append((own, own[0][0] if own else 0, end))
    return spans


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Return the common part of two half-open spans; an empty one begins where the first does."""
    low, high = max(one[0], other[0]), min(one[1], other[1])
    return (low, high) if low < high else (one[0], one[0])


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return steps along the orthogonal matrices that are nearest to `matrices`, float32.

    Those of a shape are computed together. Singular values end between about 0.7 and 1.2, times
    0.2 · √(the longer side), which makes the root mean square of a whole step about 0.2.
    """
    of_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        of_shape[matrix.shape].append(number)
    found: dict[int, Tensor] = {}
    for shape, numbers in of_shape.items():
        steps_NRC = _orthogonal(torch.stack([matrices[number] for number in numbers]))
        steps_NRC = steps_NRC.float().mul_(_STEP_RMS * max(shape) ** 0.5)
        found.update(zip(numbers, steps_NRC.unbind(), strict=True))
    return [found[number] for number in range(len(matrices))]


def _orthogonal(matrix_NRC: Tensor) -> Tensor:
    """Return near orthogonal matrices by five Newton-Schulz iterations (Jordan et al. 2024)."""
    is_tall = matrix_NRC.shape[1] > matrix_NRC.shape[2]
    x = matrix_NRC.mT if is_tall else matrix_NRC
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_TINY)
    x = x.to(_computed_in(x))
    for _ in range(MUON_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if is_tall else x


def _computed_in(tensor: Tensor) -> torch.dtype:
    """Return bfloat16 where a GPU has units for it, as Jordan's code does."""
    is_gpu = tensor.device.type == "cuda"
    has_units = is_gpu and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    return torch.bfloat16 if has_units else torch.float32
