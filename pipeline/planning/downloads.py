"""Downloads weights that a run names before its first stage, and lists them for a plan."""

from collections.abc import Sequence

from pipeline.core import store
from pipeline.core.run import Run, manifest_path
from pipeline.core.stage import Stage
from pipeline.planning.memory import num_parameters
from training.model.config import MODELS
from training.weights.hub.cache import cache_folder
from training.weights.hub.locate import missing_bytes, obtain
from training.weights.hub.names import PUBLISHED, HubId

_BYTES_OF_A_PARAMETER = 4  # published weights are float32
_MIB = 1 << 20


def obtain_weights(run: Run, stages: Sequence[Stage], *, force: bool = False) -> None:
    """Look up the weights that stages name, and download those of stages that will need them.

    This happens first, because a corpus takes days, and an unknown name must not surface after it. With
    `force`, finished stages also need their weights.
    """
    for stage in stages:
        if stage.weights is not None:
            is_needed = force or not store.exists(manifest_path(run, stage.name))
            obtain(run.folder, stage.weights(stage.config).values(), download_too=is_needed)


def downloads(run: Run) -> list[str]:
    """Return a line for each name whose weights unfinished stages would download, without network access."""
    stages: dict[str, list[str]] = {}
    for stage in run.stages:
        if stage.weights is None or store.exists(manifest_path(run, stage.name)):
            continue
        for label, text in stage.weights(stage.config).items():
            stages.setdefault(text, []).append(f"{stage.name} ({label})")
    return [
        f"to download for {', '.join(users)}: {_named(text, wanted)}, {_size(wanted, num_bytes)}, to"
        f" {cache_folder()}"
        for text, users in stages.items()
        if (found := missing_bytes(run.folder, text)) is not None
        for wanted, num_bytes in [found]
    ]


def _named(text: str, wanted: HubId) -> str:
    return str(wanted) if text == str(wanted) else f"{text}: {wanted}"


def _size(wanted: HubId, num_bytes: int | None) -> str:
    if num_bytes is not None:
        return f"{num_bytes / _MIB:,.0f} MiB"
    name = next((name for name, known in PUBLISHED.items() if known.repo == wanted.repo), None)
    if name is None:
        return "unknown size"
    return f"about {sum(num_parameters(MODELS[name])) * _BYTES_OF_A_PARAMETER / _MIB:,.0f} MiB"
