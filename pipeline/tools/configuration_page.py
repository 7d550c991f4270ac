"""Write docs/reference/configuration.md: every table and key of a run's TOML.

`python -m pipeline.tools.configuration_page` writes the page of this checkout. A key's text is the docstring
under its field; its type, default and bounds are the field's own.
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import AfterValidator

from pipeline.catalog import RunConfig, known_model
from training.model.config import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "configuration.md"

HEAD = """# Configuration

`python -m pipeline.tools.configuration_page` writes this page from the code; do not edit it by hand.

A run is one TOML file. A key that the file leaves out has the default below; `run.resolved.toml` in the
run's folder holds all keys. cnclip refuses an unknown key and names the nearest known one.
`--set stage1.epochs=2` overrides a key for one command.

"Makes stale" says what a changed value means for existing work ([runs](../concepts/runs.md)):

- *yes*: the stage must be redone; *training*: the training stages must be redone;
- *no*: the work stays valid;
- *once done*: a half-done stage continues, a finished one is stale;
- *unless exact*: the stage continues if the result equals that of a run with the new value from the start.

## Top level

| key | type | default | what it is |
| --- | --- | --- | --- |
| `base` | string | unset | Another run's file or a shipped recipe; this file takes precedence. |
| `without` | list of strings | `[]` | Tables of the base to remove. |
"""

_RECIPE = """
`[stage1]`, `[stage2]` and `[finetune]` also take `recipe`: `"paper"`, or for `[finetune]` one of `"muge"`,
`"flickr30k-cn"`, `"coco-cn"` and `"icr"`. It fills in the paper's values for `[model] name`; keys that the
table holds take precedence. For models larger than the paper's, `ViT-g-14` and `ViT-bigG-14`, `"larger"`
fills in ViT-H-14's values with 128 ranks. In `[stage2]`, `"fast"` fills in settings that take a part of the
paper's compute, with `phases`; it has no stage 1.
"""

_TABLE_SOURCES = """
### `[[corpus.sources]]` of a caption table

The keys are those of `[[corpus.tables]]` above; `kind` is required.
"""

_COLUMNS = """
| key | type | default | bounds | makes stale | what it is |
| --- | --- | --- | --- | --- | --- |
"""

_PLAIN = {str: "string", int: "integer", float: "number", bool: "true or false"}
_STALE = {"always": "yes", "exactly": "unless exact", "once done": "once done", "never": "no"}
_BOUNDS: Mapping[type, tuple[str, str]] = {
    annotated_types.Gt: ("> ", "gt"),
    annotated_types.Ge: ("≥ ", "ge"),
    annotated_types.Lt: ("< ", "lt"),
    annotated_types.Le: ("≤ ", "le"),
    annotated_types.MultipleOf: ("multiple of ", "multiple_of"),
    annotated_types.MinLen: ("length ≥ ", "min_length"),
    annotated_types.MaxLen: ("length ≤ ", "max_length"),
}
# Stages of training share one dataclass, and so one section.
_TRAINING = ("english", "stage1", "stage2", "finetune")


def field_docs(cls: type) -> dict[str, str]:
    """Return each field's docstring: the string that stands under it in the class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for item, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[item.target.id] = " ".join(after.value.value.split())
    return found


def page() -> str:
    """Return the page as the code gives it."""
    return HEAD + "".join(_sections())


def _sections() -> Iterator[str]:
    hints = typing.get_type_hints(RunConfig, include_extras=True)
    docs = field_docs(RunConfig)
    for name, hint in hints.items():
        if name in _TRAINING[1:]:
            continue
        title = ", ".join(f"`[{stage}]`" for stage in _TRAINING) if name in _TRAINING else f"`[{name}]`"
        text = _doc(RunConfig, docs, name)
        if name in _TRAINING:
            text = "\n".join(f"- `[{stage}]`: {docs[stage]}" for stage in _TRAINING)
        tables = _tables(hint)
        if typing.get_origin(_bare(hint)) is tuple:
            title = f"`[[{name}]]`"
        if len(tables) > 1:
            yield f"\n## {title}\n\n{text}\n"
            for table in tables:
                yield from _section(table, f'`[{name}]` with `kind = "{_kinds(table)[0]}"`', name, "###")
        else:
            yield from _section(tables[0], title, name, "##", text)


def _section(cls: type, title: str, path: str, level: str, text: str = "") -> Iterator[str]:
    """Yield the section of one table, then those of the tables in it."""
    first, *more = _paragraphs(cls)
    yield f"\n{level} {title}\n" + "".join(f"\n{part}\n" for part in (text or first, *more))
    if path in _TRAINING:
        yield _RECIPE
    yield _COLUMNS
    hints, docs = typing.get_type_hints(cls, include_extras=True), field_docs(cls)
    inner = []
    for field in dataclasses.fields(cls):
        tables = _tables(hints[field.name])
        inner += [(field.name, table, hints[field.name]) for table in tables]
        kind = "table" if tables and typing.get_origin(_bare(hints[field.name])) is not tuple else None
        cells = [
            f"`{field.name}`",
            kind or ("list of tables" if tables else _type(hints[field.name])),
            _default(field, is_table=kind is not None),
            ", ".join(_bounds(hints[field.name])) or "–",
            _stale(path, field),
            _doc(cls, docs, field.name),
        ]
        yield f"| {' | '.join(cells)} |\n"
    for name, table, hint in inner:
        below = f"[{path}.{name}]" if typing.get_origin(_bare(hint)) is not tuple else f"[[{path}.{name}]]"
        if path in _TRAINING:
            below = f"[STAGE.{name}]"
        if name == "sources" and "table" in _kinds(table):
            yield _TABLE_SOURCES
            continue
        kinds = _kinds(table)
        suffix = f" with `kind` {', '.join(f'`{kind}`' for kind in kinds)}" if kinds else ""
        yield from _section(table, f"`{below}`{suffix}", f"{path}.{name}", "###")


def _stale(path: str, field: "dataclasses.Field[Any]") -> str:
    """Return what a change means: some tables enter no stage's digest, except for the seed."""
    if path.partition(".")[0] in ("run", "launch", "tracking"):
        return "training" if field.name == "seed" else "no"
    in_digest = field.metadata.get("in_digest", True)
    return _STALE[field.metadata.get("binds", "always")] if in_digest else "no"


def _doc(cls: type, docs: Mapping[str, str], name: str) -> str:
    if name not in docs:
        raise KeyError(f"{cls.__module__}.{cls.__name__}.{name}: write a docstring under the field")
    return docs[name]


def _paragraphs(cls: type) -> list[str]:
    """Return the paragraphs of a class's docstring, one line each."""
    return [" ".join(text.split()) for text in (inspect.getdoc(cls) or "").split("\n\n")]


def _bare(hint: Any) -> Any:
    """Return a hint without its bounds and without None."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        left = [part for part in typing.get_args(hint) if part is not type(None)]
        if len(left) == 1:
            return _bare(left[0])
    return hint


def _parts(hint: Any) -> list[Any]:
    """Return the leaves of a hint."""
    hint = _bare(hint)
    arguments = typing.get_args(hint)
    if not arguments or typing.get_origin(hint) is typing.Literal:
        return [hint]
    return [leaf for part in arguments for leaf in _parts(part)]


def _tables(hint: Any) -> list[type]:
    return [part for part in _parts(hint) if isinstance(part, type) and dataclasses.is_dataclass(part)]


def _kinds(cls: type) -> list[str]:
    hint = typing.get_type_hints(cls).get("kind")
    return list(typing.get_args(hint)) if hint is not None else []


def _type(hint: Any) -> str:
    hint = _bare(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f'`"{value}"`' for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inside = typing.get_args(hint)
        if inside[-1] is Ellipsis:
            return f"list of {_type(inside[0])}s"
        return f"list of {len(inside)} {_type(inside[0])}s"
    if typing.get_origin(hint) is Mapping:
        item = _type(typing.get_args(hint)[1])
        return f"table of {item.replace('list', 'lists')}" if "list" in item else f"table of {item}s"
    return _PLAIN[hint]


def _default(field: "dataclasses.Field[Any]", *, is_table: bool) -> str:
    if field.default is None:
        return "unset"
    if is_table:
        return "its defaults"
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "**required**"
    value = field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return f"`[{', '.join(_value(item) for item in value)}]`"
    return f"`{_value(value)}`"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-") if not value.is_integer() else f"{value:.1f}"
    return f"{value:_}" if value >= 10_000 else str(value)


def _bounds(hint: Any) -> Iterator[str]:
    """Yield the bounds of a field or, of a list, those of its items."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        for part in typing.get_args(hint):
            yield from _bounds(part)
    elif typing.get_origin(hint) is typing.Annotated:
        inside, *marks = typing.get_args(hint)
        yield from _bounds(inside)
        for mark in marks:
            if type(mark) in _BOUNDS:
                sign, attribute = _BOUNDS[type(mark)]
                bound = getattr(mark, attribute)
                yield f"{sign}{bound:_}" if isinstance(bound, int) else f"{sign}{bound:g}"
            elif isinstance(mark, AfterValidator) and mark.func is known_model:
                yield ", ".join(f"`{model}`" for model in MODELS)
    elif typing.get_origin(hint) is tuple:
        yield from _bounds(typing.get_args(hint)[0])


def main() -> int:
    if not PAGE.parent.is_dir():
        print(f"error: {PAGE.parent}: no such folder; run this from a checkout", file=sys.stderr)
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
