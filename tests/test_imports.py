"""Imports point down only, as docs and CONTRIBUTING say: read from the syntax trees of every module."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cnclip", "pipeline", "data_prep", "training", "eval")

# What each layer may import of this project besides itself.
ALLOWED = {
    "pipeline.core": set[str](),
    "data_prep": {"pipeline.core"},
    "training": {"pipeline.core"},
    "eval": {"training", "data_prep", "pipeline.core"},
    "pipeline": {"eval", "training", "data_prep", "pipeline.core"},
    "cnclip": {"pipeline", "eval", "training", "data_prep", "pipeline.core"},
}
HEAVY = {"torch", "torchvision", "timm", "transformers", "training", "eval"}


def _modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer(module: str) -> str:
    if module == "pipeline.core" or module.startswith("pipeline.core."):
        return "pipeline.core"
    return module.partition(".")[0]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also inside functions; a submodule named after `from` counts as one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                below = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = below.with_suffix(".py").is_file() or below.is_dir()
                yield node.lineno, f"{node.module}.{alias.name}" if is_module else node.module


def _wrong_imports(path: Path, layer: str) -> list[str]:
    return [
        f"{path}:{line}: {module}"
        for line, module in _imports(path)
        if module.partition(".")[0] in PACKAGES and _layer(module) not in ALLOWED[layer] | {layer}
    ]


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_imports_point_down(path: Path) -> None:
    assert _wrong_imports(path, _layer(_name(path))) == []


def test_the_check_sees_an_import_that_points_up(tmp_path: Path) -> None:
    copy = tmp_path / "stages.py"
    copy.write_text(
        "def late():\n    from data_prep.dedup import exact\n    from pipeline.runner import execute\n"
        "    from pipeline.core import store\n"
    )
    assert [line.partition(": ")[2] for line in _wrong_imports(copy, "training")] == [
        "data_prep.dedup.exact",
        "pipeline.runner",
    ]


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports, the first one again at the end; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports under TYPE_CHECKING and inside functions count too."""
    names = {_name(path) for path in _modules()}
    graph = {_name(path): {module for _, module in _imports(path) if module in names} for path in _modules()}
    assert _circle(graph) == []


def test_the_check_sees_a_circle() -> None:
    assert set(_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_rules_need_no_torch() -> None:
    rules = sorted((ROOT / "data_prep" / "rules").glob("*.py"))
    assert len(rules) >= 4
    for path in rules:
        assert {module.partition(".")[0] for _, module in _imports(path)}.isdisjoint(HEAVY), path


def test_eval_hides_no_builtin() -> None:
    """`import eval.x` would bind the name `eval`; `from eval.x import y` does not."""
    sources = [*_modules(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    found = [
        f"{path}:{node.lineno}"
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.partition(".")[0] == "eval"
    ]
    assert found == []


def test_only_the_catalogue_joins_data_and_training() -> None:
    """Nothing but the catalogue and the package's entry points, which use it, knows both sides."""
    joining = {
        _name(path)
        for path in _modules()
        if _layer(_name(path)) != "cnclip"  # the Python API, above the catalogue
        and {"data_prep", "training"} <= {module.partition(".")[0] for _, module in _imports(path)}
    }
    assert joining == {"pipeline.catalog"}
