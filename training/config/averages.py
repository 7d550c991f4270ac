"""The settings of averages of weights. No heavy imports here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

Share = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragesConfig:
    """Averages of weights that are scored after the last step, next to the plain weights.

    `averages.json` in the stage's folder has the scores, `model_ema.safetensors` and so on the weights.
    """

    ema: Share | None = None
    """Decay per step of an exponential moving average; in step t it is (1 + t) / (10 + t) at most."""
    last_steps: Annotated[int, Ge(0)] = 0
    """Last steps whose weights are averaged evenly (LAWA, Kaddour 2022). 0: none."""
    interpolate: tuple[Share, ...] = ()
    """Shares of the final weights in interpolations with the start's (WiSE-FT, Wortsman et al. 2022)."""
    use: Literal["plain", "ema", "last", "best"] = "plain"
    """Weights with which the stage ends: the plain ones, one of the two averages, or those with the best mean
    recall, interpolations included.
    """

    def __post_init__(self) -> None:
        if len(self.names) == 1:
            raise ValueError("averages: nothing to average; give ema, last_steps or interpolate")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"averages: interpolate = {list(self.interpolate)}: give each share once")
        if self.use in ("ema", "last") and self.use not in self.names:
            setting = {"ema": "ema", "last": "last_steps"}[self.use]
            raise ValueError(f'averages: use = "{self.use}", but {setting} is not set')

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the weights that are scored, the plain ones first."""
        return ("plain", *self._running, *(f"interpolated_{share:g}" for share in self.interpolate))

    @property
    def num_running(self) -> int:
        """Return the number of averages that are kept while the stage trains."""
        return len(self._running)

    @property
    def _running(self) -> list[str]:
        return [name for name, is_set in (("ema", self.ema), ("last", self.last_steps)) if is_set]

    @property
    def files(self) -> tuple[str, ...]:
        """Return the files that they leave in the stage's folder, besides the model's."""
        return ("averages.json", *(f"model_{name}.safetensors" for name in self.names))
