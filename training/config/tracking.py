"""`[tracking]` of a run's TOML: where its training stages send their curves. No heavy imports here."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import MinLen

_Name = Annotated[str, MinLen(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbConfig:
    """Weights & Biases, which reads its own variables such as WANDB_API_KEY."""

    project: _Name
    """Project of the tracked runs, one for each training stage."""
    entity: str | None = None
    """Team or user. Unset: your default entity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlflowConfig:
    """MLflow, which reads its own variables such as MLFLOW_TRACKING_TOKEN."""

    uri: _Name
    """Tracking server or store, such as `http://host:5000` or `sqlite:///runs/mlflow.db`."""
    experiment: _Name
    """Experiment of the tracked runs, one for each training stage; created if missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """`[tracking]`: where curves go in addition to metrics.jsonl. Changes never make a stage stale."""

    tensorboard: bool = True
    """Whether to write `tensorboard/` into the folder of each training stage."""
    wandb: WandbConfig | None = None
    """Where to track training in Weights & Biases (extra `wandb`). Unset: nowhere."""
    mlflow: MlflowConfig | None = None
    """Where to track training in MLflow (extra `mlflow`). Unset: nowhere."""
