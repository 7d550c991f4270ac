"""Imports point down only, as the design says: read from the syntax trees of every module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "data_prep", "training", "eval")
BOTTOM = {
    "align", "records", "store", "stage", "config", "processes", "progress", "evaluation_sets",
    "launch_config",
}  # fmt: skip
TOP = {
    "catalog", "runner", "launch", "plan_training", "rank", "why", "tables", "doctor", "__main__",
    "corpus_commands", "diff", "lock", "ray_cluster", "retry", "training_table",
}  # fmt: skip

# What each layer may import of this project besides itself.
ALLOWED = {
    "pipeline bottom": {"pipeline bottom"},
    "data_prep": {"data_prep", "pipeline bottom"},
    "training": {"training", "pipeline bottom"},
    "eval": {"eval", "training", "data_prep", "pipeline bottom"},
    "pipeline top": {"pipeline top", "eval", "training", "data_prep", "pipeline bottom"},
}


def _modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer(module: str) -> str:
    package, _, rest = module.partition(".")
    if package != "pipeline":
        return package
    part = rest.partition(".")[0]
    if part in BOTTOM or part in ("", "recipes"):  # the package itself and its folder of recipes hold no code
        return "pipeline bottom"
    assert part in TOP, f"{module} is in neither layer of pipeline; say in this test where it belongs"
    return "pipeline top"


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


def _wrong_imports(path: Path) -> list[str]:
    allowed = ALLOWED[_layer(_name(path))]
    return [
        f"{path}:{line}: {module}"
        for line, module in _imports(path)
        if module.partition(".")[0] in PACKAGES and _layer(module) not in allowed
    ]


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_imports_point_down(path: Path) -> None:
    assert _wrong_imports(path) == []


def test_the_check_sees_an_import_that_points_up(tmp_path: Path) -> None:
    offender = ROOT / "training" / "stage.py"
    source = "def late():\n    from data_prep import dedup\n    from pipeline.runner import Run\n"
    copy = tmp_path / "stage.py"
    copy.write_text(source)
    layers = {_layer(module) for _, module in _imports(copy)}
    assert layers - ALLOWED[_layer(_name(offender))] == {"data_prep", "pipeline top"}


def test_rules_need_no_torch() -> None:
    rules = [path for path in _modules() if path.name.endswith("_rules.py")]
    assert len(rules) >= 2
    for path in rules:
        assert {module.partition(".")[0] for _, module in _imports(path)}.isdisjoint(
            {"torch", "torchvision", "timm", "transformers", "training", "eval"}
        ), path


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
    joining = {
        _name(path)
        for path in _modules()
        if {"data_prep", "training"} <= {module.partition(".")[0] for _, module in _imports(path)}
    }
    assert joining == {"pipeline.catalog"}
