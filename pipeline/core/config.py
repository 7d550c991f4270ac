"""Strict configuration: TOML → frozen dataclasses, with errors that name file, key and the nearest known key.

Relative paths in a run's TOML and in `--set` are relative to the folder the command is started in.
"""

import copy
import dataclasses
import datetime
import difflib
import hashlib
import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from importlib import resources
from typing import Any, Literal, TypeVar

from pipeline.core import store
from pipeline.core.files.foreign import foreign
from pipeline.core.records import ConfigError

T = TypeVar("T")

_MOST_DEPTH = 64  # of nested tables and lists; settings have five

# Metadata of fields that cannot change a stage's output, such as process counts and timeouts. They stay out
# of the stage's digest.
NOT_IN_DIGEST: Mapping[str, Any] = types.MappingProxyType({"in_digest": False})
# For fields of later releases: their default does not change the digest of a configuration.
IN_DIGEST_IF_SET: Mapping[str, Any] = types.MappingProxyType({"in_digest_if_set": True})

# The effect of a change of a field on existing work, in the field's metadata under "binds":
# "always"     existing work is stale. This is the default.
# "exactly"    existing work is stale unless the stage finds that it continues exactly (`Stage.continues`).
# "once done"  half-done work continues; finished work is stale.
# "never"      the same work, computed in another way. The digest includes such fields, because digests of
#              older runs do; `run` reports a change, which makes nothing stale.
Binds = Literal["always", "exactly", "once done", "never"]
BINDS_EXACTLY: Mapping[str, Any] = types.MappingProxyType({"binds": "exactly"})
BINDS_ONCE_DONE: Mapping[str, Any] = types.MappingProxyType({"binds": "once done"})
BINDS_NEVER: Mapping[str, Any] = types.MappingProxyType({"binds": "never"})


def formerly(name: str, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a field's metadata with the name that the field had in earlier releases.

    Files that have it keep working: runs keep theirs for years.
    """
    return types.MappingProxyType({**metadata, "formerly": name})


def find_recipe(name: str) -> str:
    """Return the path of a run's TOML: the file itself, or a shipped recipe (`demo`, `demo.toml`).

    Raises:
        ConfigError: if neither exists; it names the shipped recipes.
    """
    if os.path.isfile(name):
        return name
    shipped = resources.files("pipeline") / "recipes"
    stem = os.path.basename(name).removesuffix(".toml")
    if (shipped / f"{stem}.toml").is_file() and (
        os.path.dirname(name) in ("", os.path.join("pipeline", "recipes"))
    ):
        return str(shipped / f"{stem}.toml")
    if not name.endswith(".toml") and store.exists(name):
        raise ConfigError(
            f"{name}: neither a TOML file nor the folder of a started run; give a run's TOML file"
        )
    if os.path.dirname(name) and not name.endswith(".toml"):
        raise ConfigError(
            f"{name}: no such folder or file; give a run's TOML file, or its folder once started"
        )
    known = sorted(entry.name[:-5] for entry in shipped.iterdir() if entry.name.endswith(".toml"))
    near = difflib.get_close_matches(stem, known, n=1)
    others = f"give a run's TOML file or one of the shipped recipes: {', '.join(known)}"
    advice = f"did you mean {near[0]}?" if near else others
    raise ConfigError(f"{name}: no such file; {advice}")


def read_toml(path: str) -> dict[str, Any]:
    """Return the table of a TOML file.

    Raises:
        ConfigError: if it cannot be read.
    """
    with foreign(path, "TOML file", "correct it", error=ConfigError), store.open_read(path) as file:
        try:
            table = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from None
    _refuse_unusable(table, path)
    return table


def apply_overrides(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `--set key=value` items; the value is TOML, and a bare word is a string."""
    table = copy.deepcopy(table)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set {item}: expected key=value, for example --set stage1.epochs=2")
        with foreign(f"--set {_shorten_text(item)}", "value", "correct it", error=ConfigError):
            try:
                value = tomllib.loads(f"value = {text}")["value"]
            except tomllib.TOMLDecodeError:
                value = text
        _refuse_unusable(value, f"--set {_shorten_text(item)}", key.strip())
        place = table
        *folders, leaf = key.strip().split(".")
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {item}: {folder} is a value, not a table")
        place[leaf] = value
    return table


def read_run(path: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return the table of a run's file, merged with that of its `base`, with `--set` items applied."""
    return apply_overrides(_with_base(read_toml(path), path), overrides)


def _with_base(table: dict[str, Any], where: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Merge a table with that of its `base`, another run's file, minus the tables that `without` removes.

    Values of the table take precedence; tables are merged key by key, lists are replaced.
    """
    own = dict(table)
    base, without = own.pop("base", None), own.pop("without", [])
    if base is None:
        if without:
            raise ConfigError(f"{where}: without: removes tables of a base, but there is no base")
        return own
    if not isinstance(base, str) or base in seen:
        raise ConfigError(f"{where}: base: found {base!r}; give the name or path of another run's file")
    try:
        path = find_recipe(base)
    except ConfigError as error:
        raise ConfigError(f"{where}: base: {error}") from None
    joined = _with_base(read_toml(path), path, (*seen, base))
    if not (isinstance(without, list) and all(isinstance(name, str) for name in without)):
        raise ConfigError(f"{where}: without: found {without!r}; give a list of names of tables")
    for name in without:
        if name not in joined:
            raise ConfigError(f"{where}: without: {base} has no {name!r}; it has {', '.join(joined)}")
        del joined[name]
    for key, value in own.items():
        before = joined.get(key)
        joined[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return joined


def build(cls: type[T], table: Mapping[str, Any], where: str, *, allow_nan: bool = False) -> T:
    """Check a TOML table against a dataclass and build it.

    Types are strict: a string is not a number and 1.5 not an integer, but an integer is valid for a float.
    No setting may be nan or inf; with `allow_nan` a table of figures may use nan for missing measurements.
    Bounds are part of the types (`Annotated[int, Gt(0)]`); rules across fields are in `__post_init__`.

    Raises:
        ConfigError: names `where` (the file), the key, what is wrong and what was found.
    """
    import pydantic

    table = _with_new_names(cls, table, where, "")
    _refuse_unknown_keys(cls, table, where, "")
    if not allow_nan:
        _refuse_non_finite(table, where)
    _refuse_unusable(table, where)
    try:
        built: T = pydantic.TypeAdapter(cls).validate_json(json.dumps(table), strict=True)
        return built
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing" and isinstance(first["loc"][-1], int):  # a list that is too short
            missing = [item for item in error.errors() if item["loc"][:-1] == first["loc"][:-1]]
            count = len(first["input"]) + len(missing)
            place = _readable_location(table, first["loc"][:-1])
            raise ConfigError(f"{where}: {place}: must have {count} items, found {first['input']}") from None
        # The location contains class names or tags of union members; users need only keys and indices.
        location = _readable_location(table, first["loc"])
        message = _complaint(first["type"], first["msg"], first.get("ctx", {}), first["input"])
        if first["type"].startswith("union_tag"):
            location = f"{location}.kind" if location else "kind"
        place = f"{where}: {location}" if location else where
        raise ConfigError(f"{place}: {message}") from None


def digest(*values: Any) -> str:
    """Return the sha256 (hex) of values' canonical JSON, without the dataclass fields NOT_IN_DIGEST."""
    text = json.dumps([plain(value) for value in values], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def to_toml(config: Any) -> str:
    """Return a resolved configuration as TOML without unset values (None), because TOML has no null."""
    import tomli_w

    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def plain(value: Any, *, without: Collection[Binds] = ()) -> Any:
    """Return dataclasses as mappings of plain values, without fields NOT_IN_DIGEST and those in `without`."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: plain(getattr(value, field.name), without=without)
            for field in dataclasses.fields(value)
            if field.metadata.get("in_digest", True)
            and field.metadata.get("binds", "always") not in without
            and not is_left_out(field, value)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item, without=without) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, without=without) for item in value]
    return value


def is_left_out(field: "dataclasses.Field[Any]", value: Any) -> bool:
    """Return whether a field of a dataclass value is IN_DIGEST_IF_SET and has its default."""
    return "in_digest_if_set" in field.metadata and getattr(value, field.name) == field.default


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def _with_new_names(cls: Any, table: Any, where: str, prefix: str) -> Any:
    """Return a table in which fields that were renamed have their names of today.

    Raises:
        ConfigError: if both names of a field are there.
    """
    if isinstance(table, list):
        return [_with_new_names(cls, item, where, prefix) for item in table]
    cls = _dataclass_for(cls, table)
    if cls is None or not isinstance(table, Mapping):
        return table
    hints, found = typing.get_type_hints(cls), dict(table)
    for field in dataclasses.fields(cls):
        old = field.metadata.get("formerly")
        if old in found:
            if field.name in found:
                raise ConfigError(
                    f"{where}: {prefix}{old}: the earlier name of {prefix}{field.name}, which is set too;"
                    " leave one out"
                )
            found[field.name] = found.pop(old)
    return {
        key: _with_new_names(hints[key], value, where, f"{prefix}{key}.") if key in hints else value
        for key, value in found.items()
    }


def _refuse_unknown_keys(cls: Any, table: Any, where: str, prefix: str) -> None:
    cls = _dataclass_for(cls, table)
    if cls is None or not isinstance(table, dict):
        return
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}: {prefix}{key}: unknown key; {advice}")
        items = value if isinstance(value, list) else [value]
        for item in items:
            _refuse_unknown_keys(hints[key], item, where, f"{prefix}{key}.")


def _refuse_unusable(value: Any, where: str, key: str = "", depth: int = 0) -> None:
    """Refuse TOML values that cannot be settings: dates, huge numbers, NUL and invalid text.

    A NUL ends a path for the system; Python turns an argument's bytes that are not UTF-8 into unpaired
    surrogates.

    Raises:
        ConfigError: for each of these.
    """
    place = f"{where}: {_shorten_text(key)}" if key else where
    if depth > _MOST_DEPTH:
        raise ConfigError(f"{place[:200]}: nested deeper than {_MOST_DEPTH} tables and lists")
    if isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_unusable(str(name), where, f"{key}.{name}" if key else str(name), depth + 1)
            _refuse_unusable(item, where, f"{key}.{name}" if key else str(name), depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_unusable(item, where, key, depth + 1)
    elif isinstance(value, datetime.date | datetime.time):
        raise ConfigError(f"{place}: must be text, a number or true or false, found the date or time {value}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{place}: must be a number of at most 64 bits, found one of {value.bit_length()}")
    elif isinstance(value, str) and ("\0" in value or not _is_text(value)):
        raise ConfigError(f"{place}: must be text in UTF-8 without a NUL character, found {_shorten(value)}")


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shorten_text(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _refuse_non_finite(value: Any, where: str, key: str = "") -> None:
    """Refuse nan and inf in settings, because comparisons let nan pass every limit.

    Raises:
        ConfigError: for each of these.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {key}: must be a finite number, found {value}")
    if isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_non_finite(item, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_non_finite(item, where, key)


def _dataclass_for(hint: Any, table: Any) -> Any:
    """Return a hint's dataclass: itself, inside `X  None` or `tuple[X, ...]`, or a union's by `kind`."""
    if dataclasses.is_dataclass(hint):
        return hint
    candidates = [found for part in typing.get_args(hint) if (found := _dataclass_for(part, table))]
    if len(candidates) > 1 and isinstance(table, dict):
        for candidate in candidates:
            if table.get("kind") in typing.get_args(typing.get_type_hints(candidate).get("kind")):
                return candidate
        return None
    return candidates[0] if candidates else None


def _readable_location(table: Any, location: tuple[int | str, ...]) -> str:
    place, parts = table, list[str]()
    for part in location:
        if isinstance(place, dict) and part in place:
            place = place[part]
            parts.append(str(part))
        elif isinstance(place, list) and isinstance(part, int):
            place = place[part] if part < len(place) else None
            parts.append(str(part))
        elif isinstance(place, dict) and part == location[-1]:
            parts.append(str(part))  # a missing key
    return ".".join(parts)


# Messages for pydantic's error types; names in braces come from the error's context.
_COMPLAINTS = {
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "multiple_of": "must be a multiple of {multiple_of:g}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be {expected}",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "dataclass_type": "must be a table",
}


def _complaint(kind: str, message: str, facts: Mapping[str, Any], found: Any) -> str:
    """Return this project's message for one of pydantic's errors."""
    if kind == "value_error":  # raised by the dataclass itself, whose message has the value
        return message.removeprefix("Value error, ")
    if kind in ("missing", "union_tag_not_found"):
        return "required, but not set"
    if kind == "union_tag_invalid":
        return f"must be one of {facts['expected_tags']}, found {facts['tag']!r}"
    if kind == "too_short" and facts["min_length"] == 1:
        return "must not be empty"
    known = _COMPLAINTS.get(kind)
    text = known.format(**facts) if known else message.replace("Input should be", "must be")
    return f"{text}, found {_shorten(found)}"


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
