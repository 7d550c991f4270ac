"""Finds what changed since a stage's work began, and decides whether that makes the work stale.

`started.json` in a stage's folder binds work to its settings and inputs by digest. It also holds the settings
themselves, so that changes can be named and judged by the metadata of their fields
(`pipeline.core.config.Binds`). Old stages without recorded settings are judged by digest.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.core import store
from pipeline.core.config import Binds, build, plain
from pipeline.core.files.sealed import seal, unseal
from pipeline.core.records import ConfigError
from pipeline.core.stage import Change, Context, Stage, Task, inputs_digest

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Started:
    """The settings and inputs with which a stage's work began."""

    config_digest: str
    inputs_digest: str
    bound_inputs_digest: str | None = None  # without `Stage.unbound_inputs`
    settings: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, stage: Stage, context: Context, tasks: list[Task]) -> "Started":
        """Return the settings and inputs with which work would begin now."""
        return cls(
            stage.config_digest,
            inputs_digest(tasks),
            inputs_digest(tasks, without=stage.unbound_inputs),
            settings_of(stage, context),
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether work is stale, and what users should know about the changes."""

    stale: str = ""  # the reason; empty: not stale
    kept: tuple[str, ...] = ()  # changes that the work continues under, or that finished work stays under
    goes_on: str = ""  # how finished work continues from an earlier state; empty if it does not


@dataclass(slots=True)
class _Findings:
    stale: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    goes_on: list[str] = field(default_factory=list)


def started_path(context: Context) -> str:
    """Return the path of the file that binds a stage's half-done work."""
    return context.path("started.json")


def read_started(context: Context) -> Started | None:
    """Return how a stage's work began; None if it has not begun, or if the file is damaged.

    Receipts and checkpoints themselves record what they are made from.
    """
    if not store.exists(started_path(context)):
        return None
    try:
        data = store.read_bytes(started_path(context))
    except IsADirectoryError:
        return None
    try:  # only for parsing: a store that fails says nothing about the file
        return build(Started, unseal(data), started_path(context))
    except (ValueError, ConfigError):
        return None


def write_started(context: Context, stage: Stage, tasks: list[Task]) -> None:
    """Bind half-done work (checkpoints, partial downloads) to its settings and inputs."""
    store.write_text(started_path(context), seal(dataclasses.asdict(Started.of(stage, context, tasks))))


def settings_of(stage: Stage, context: Context) -> dict[str, Any]:
    """Return what determines the work of a stage in addition to its inputs, as plain values."""
    seed = {"seed": context.seed} if stage.is_seeded else {}
    settings: dict[str, Any] = json.loads(
        json.dumps({"version": stage.version, **seed, "config": plain(stage.config)})
    )
    return settings


def judge(
    stage: Stage,
    context: Context,
    tasks: list[Task],
    made: Started,
    *,
    is_done: bool,
) -> Verdict:
    """Compare how work was made (`made`) with how the stage would make it now.

    More changes make finished work stale than half-done work, which can still follow a change.
    """
    now = Started.of(stage, context, tasks)
    if made.settings is None:
        made = _with_settings(stage, context, made, now)
    if made.settings is None or made.bound_inputs_digest is None:
        return Verdict(stale=_by_digest(made, now))
    found = _Findings()
    for change in changes(stage, context, made.settings):
        _judge_change(stage, context, change, is_done, found)
    reasons = [f"its configuration changed: {', '.join(found.stale)}"] if found.stale else []
    if made.bound_inputs_digest != now.bound_inputs_digest:
        reasons.append("its inputs changed")
    elif made.inputs_digest != now.inputs_digest:
        found.kept.append(f"another {' and '.join(sorted(stage.unbound_inputs))} file")
    return Verdict(" and ".join(reasons), tuple(found.kept), "; ".join(found.goes_on))


def _judge_change(stage: Stage, context: Context, change: Change, is_done: bool, found: _Findings) -> None:
    if change.binds == "never" or (change.binds == "once done" and not is_done):
        found.kept.append(str(change))
        return
    if change.binds == "exactly" and stage.continues is not None:
        does, sentence = stage.continues(stage.config, context, change, is_done)
        if not does:
            found.stale.append(f"{change} ({sentence})")
        else:
            found.kept.append(f"{change} ({sentence})")
            if is_done:
                found.goes_on.append(f"{change}: {sentence}")
        return
    found.stale.append(str(change))


def changes(stage: Stage, context: Context, before: Mapping[str, Any]) -> list[Change]:
    """Return the settings that differ from `before`, a result of `settings_of`."""
    now = settings_of(stage, context)
    old = dict(_leaves(before))
    new = dict(_leaves(now))
    binds = dict(_binds(stage.config, "config."))
    return [
        Change(key, old.get(key), new.get(key), binds.get(key, "always"))
        for key in sorted(old.keys() | new.keys())
        # Old runs did not record their seed.
        if old.get(key, _ABSENT) != new.get(key, _ABSENT) and not (key == "seed" and key not in old)
    ]


def _with_settings(stage: Stage, context: Context, made: Started, now: Started) -> Started:
    """Add settings to the record of an earlier release if the stage knows settings with its digest."""
    begun = stage.begun_with(stage.config, context) if stage.begun_with is not None else None
    if begun is None or made.inputs_digest != now.inputs_digest:
        return made
    config, seed = begun
    before = dataclasses.replace(stage, config=config)
    if before.config_digest != made.config_digest:
        return made
    settings = settings_of(before, dataclasses.replace(context, seed=seed))
    return dataclasses.replace(made, settings=settings, bound_inputs_digest=now.bound_inputs_digest)


def _by_digest(made: Started, now: Started) -> str:
    reasons = []
    if made.config_digest != now.config_digest:
        reasons.append("its configuration changed")
    if made.inputs_digest != now.inputs_digest:
        reasons.append("its inputs changed")
    return " and ".join(reasons)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything except tables; a list is one value."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), value


def _binds(config: Any, prefix: str) -> Iterator[tuple[str, Binds]]:
    """Yield (dotted key, effect of a change) of the fields of nested dataclasses."""
    if not dataclasses.is_dataclass(config):
        return
    for item in dataclasses.fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        yield key, item.metadata.get("binds", "always")
        yield from _binds(value, f"{key}.")
