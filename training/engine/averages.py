"""Running averages of weights, kept by rank 0 next to the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.config.averages import AveragesConfig
from training.model.clip import CLIP

PREFIX = "average."  # of their names in a checkpoint


class RunningAverages:
    """Exponential and even averages in float32 of all weights and running statistics, after every step.

    In bfloat16 they average the rounded weights that compute, which the average of many steps undoes.
    """

    def __init__(self, config: AveragesConfig, total_steps: int) -> None:
        self._decay, self._num_last = config.ema, config.last_steps
        self._first_of_last = total_steps - config.last_steps  # steps before the even average begins
        self._averages: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, clip: CLIP, step: int) -> None:
        """Take in the weights after `step` steps; the host waits for nothing."""
        now = {name: value for name, value in clip.state_dict().items() if value.is_floating_point()}
        if self._decay is not None:
            self._lerp("ema", now, 1 - min(self._decay, (1 + step) / (10 + step)))
        if self._num_last and step > self._first_of_last:
            self._lerp("last", now, 1 / (step - self._first_of_last))

    def _lerp(self, kind: str, now: Mapping[str, Tensor], weight: float) -> None:
        if kind not in self._averages:
            self._averages[kind] = {name: value.detach().float().clone() for name, value in now.items()}
            return
        held = self._averages[kind]
        torch._foreach_lerp_(list(held.values()), [now[name].float() for name in held], weight)

    def weights(self, plain: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return each average as whole weights on the CPU; counters are those of the plain weights."""
        return {
            kind: {**plain, **{name: value.cpu() for name, value in held.items()}}
            for kind, held in self._averages.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of them."""
        return {
            f"{PREFIX}{kind}.{name}": value
            for kind, held in self._averages.items()
            for name, value in held.items()
        }

    def restore(self, state: Mapping[str, Tensor], step: int, like: CLIP) -> None:
        """Take over a checkpoint's; an even average that its run began earlier than this one is left out."""
        device: Any = like.logit_scale.device
        self._averages = {}
        for key, value in state.items():
            if key.startswith(PREFIX):
                kind, _, name = key.removeprefix(PREFIX).partition(".")
                if kind != "last" or step > self._first_of_last:
                    self._averages.setdefault(kind, {})[name] = value.to(device)


def interpolated(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return start + share × (end - start), tensor by tensor; counters are those of the end."""
    return {
        name: torch.lerp(start[name].float(), value.float(), share) if value.is_floating_point() else value
        for name, value in end.items()
    }
