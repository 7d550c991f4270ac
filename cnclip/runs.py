"""`cnclip.run`: a whole run, or a part of it, from Python."""

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnclip.corpus import Corpus
    from cnclip.model import Model


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run's folder after `cnclip.run`, and how many stages had to run."""

    recipe: str
    folder: str
    num_run: int  # stages that were not up to date

    @property
    def corpus(self) -> "Corpus":
        """The training shards."""
        from cnclip.corpus import Corpus

        return Corpus(self.folder)

    def load(self) -> "Model":
        """Return the model of the last trained stage."""
        from cnclip.model import load

        return load(self.folder)

    @property
    def report(self) -> str:
        """Path of the report."""
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
    """Run all stages that are not up to date, as `cnclip run` does; a second call is a no-op.

    Args:
        recipe: a run's TOML, or the name of a shipped recipe such as "demo".
        stage: this stage only.
        first: from this stage on (`--from`).
        last: up to and including this stage (`--to`).
        redo: redo stale stages; without it they are an error.
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
    """Return `--set` items of one override; a table becomes one a leaf."""
    dotted = key.replace("__", ".")
    if isinstance(value, dict):
        return [item for name, leaf in value.items() for item in _as_set(f"{dotted}.{name}", leaf)]
    return [f"{dotted}={_toml(value)}"]


def _toml(value: Any) -> str:
    import tomli_w

    if isinstance(value, str | os.PathLike):
        return json.dumps(os.fspath(value), ensure_ascii=False)  # a basic string of TOML is one of JSON
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")
