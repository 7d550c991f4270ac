"""`cnclip.run`: runs all or some stages of a run from Python."""

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnclip.corpus import Corpus
    from cnclip.model import Model


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run's folder after `cnclip.run`, and the number of stages that had to run."""

    recipe: str
    folder: str
    num_run: int  # stages that were not up to date

    @property
    def corpus(self) -> "Corpus":
        """Return the training shards."""
        from cnclip.corpus import Corpus

        return Corpus(self.folder)

    def load(self) -> "Model":
        """Return the model of the last trained stage."""
        from cnclip.model import load

        return load(self.folder)

    @property
    def report(self) -> str:
        """Return the path of the report."""
        from pipeline.core import store

        return store.join(self.folder, "report", "report.html")


def run(
    recipe: str | os.PathLike[str],
    *,
    stage: str | None = None,
    first: str | None = None,
    last: str | None = None,
    redo: bool = False,
    **overrides: Any,
) -> FinishedRun:
    """Run all stages that are not up to date, like `cnclip run`; a second call is a no-op.

    Args:
        recipe: a run's TOML, or the name of a shipped recipe such as "demo".
        stage: the only stage to run.
        first: the first stage to run (`--from`).
        last: the last stage to run (`--to`).
        redo: whether to redo stale stages, which are otherwise an error.
        overrides: settings by their keys in the TOML, with two underscores for the dot, as in
            stage1__epochs=2; or tables, as in run={"folder": "runs/mine"}.

    Raises:
        ConfigError, InputError: one line that names the file and the key and says what to do.
    """
    from pipeline.last_start import start

    path = os.fspath(recipe)
    items = [item for key, value in overrides.items() for item in _as_set(key, value)]
    resolved, num_run, _ = start(path, items, only=stage, first=first, last=last, redo=redo)
    return FinishedRun(path, resolved.folder, num_run)


def _as_set(key: str, value: Any) -> list[str]:
    """Return the `--set` items of one override; a table becomes one item per leaf."""
    dotted = key.replace("__", ".")
    if isinstance(value, dict):
        return [item for name, leaf in value.items() for item in _as_set(f"{dotted}.{name}", leaf)]
    return [f"{dotted}={_toml(value)}"]


def _toml(value: Any) -> str:
    import tomli_w

    if isinstance(value, str | os.PathLike):
        return json.dumps(os.fspath(value), ensure_ascii=False)  # a JSON string is a basic string of TOML
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")
