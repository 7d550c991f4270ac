"""Running averages of weights, kept by rank 0 next to the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.config.averages import AveragesConfig
from training.model.clip import CLIP

PREFIX = "average."  # of their names in a checkpoint
_NUM_LAST = f"{PREFIX}num_last"  # steps in the even average


class RunningAverages:
    """Exponential and even averages in float32 of all weights and running statistics, after every step.

    Locked weights are left out: their average is what they are, and what computes may be rounded. In bfloat16
    the average of the weights that compute is one of rounded weights, which many steps undo.
    """

    def __init__(self, config: AveragesConfig, total_steps: int) -> None:
        self._decay, self._num_last = config.ema, config.last_steps
        # Steps before the even average begins; a stage that is shorter averages all of its steps.
        self._before_last = max(0, total_steps - config.last_steps)
        self._steps_in_last = 0
        self._averages: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, clip: CLIP, step: int) -> None:
        """Take in the weights after `step` steps; the host waits for nothing."""
        locked = {name for name, parameter in clip.named_parameters() if not parameter.requires_grad}
        now = {
            name: value
            for name, value in clip.state_dict().items()
            if value.is_floating_point() and name not in locked
        }
        if self._decay is not None:
            self._lerp("ema", now, 1 - min(self._decay, (1 + step) / (10 + step)))
        if self._num_last and step > self._before_last:
            self._steps_in_last += 1
            self._lerp("last", now, 1 / self._steps_in_last)

    def _lerp(self, kind: str, now: Mapping[str, Tensor], weight: float) -> None:
        if kind not in self._averages:
            self._averages[kind] = {name: value.detach().float().clone() for name, value in now.items()}
            return
        held = self._averages[kind]
        torch._foreach_lerp_(list(held.values()), [now[name].float() for name in held], weight)

    def weights(self, plain: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return each average as whole weights on the CPU; locked weights and counters are the plain ones."""
        return {
            kind: {**plain, **{name: value.cpu() for name, value in held.items()}}
            for kind, held in self._averages.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of them."""
        held = {
            f"{PREFIX}{kind}.{name}": value
            for kind, held in self._averages.items()
            for name, value in held.items()
        }
        return {**held, _NUM_LAST: torch.tensor(self._steps_in_last)}

    def restore(self, state: Mapping[str, Tensor], step: int, like: CLIP) -> None:
        """Take over a checkpoint's averages; the even one only if this run begins it at the same step.

        With more epochs it begins later than in the run that wrote the checkpoint.
        """
        device: Any = like.logit_scale.device
        num_last = int(state[_NUM_LAST])
        is_same = step - num_last == self._before_last
        self._averages, self._steps_in_last = {}, num_last if is_same else 0
        for key, value in state.items():
            if key.startswith(PREFIX) and key != _NUM_LAST:
                kind, _, name = key.removeprefix(PREFIX).partition(".")
                if kind != "last" or is_same:
                    self._averages.setdefault(kind, {})[name] = value.to(device)


def interpolated(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return start + share × (end - start), tensor by tensor; counters are those of the end."""
    return {
        name: torch.lerp(start[name].float(), value.float(), share) if value.is_floating_point() else value
        for name, value in end.items()
    }
