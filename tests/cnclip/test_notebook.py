"""docs/notebooks/data_to_search.ipynb runs from top to bottom and gives outputs like those that it shows."""

import copy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "notebooks" / "data_to_search.ipynb"
_MAX_BYTES = 400_000  # with its images


def _notebook() -> Any:
    import nbformat

    return nbformat.read(PATH, as_version=4)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _shape(cell: Any) -> list[tuple[str, list[str], str]]:
    """Return kind, formats and beginning of each output: of tables their size, of printed text its lines.

    Standard error is left out: warnings and progress depend on the machine.
    """
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            if output.name == "stdout":
                found.append(("stdout", [], f"{len(output.text.splitlines())} lines"))
            continue
        text = output.data.get("text/plain", "")
        found.append((output.output_type, sorted(output.data), text.splitlines()[0]))
    return found


def test_the_notebook_is_valid_and_has_outputs() -> None:
    import nbformat

    notebook = _notebook()
    nbformat.validate(notebook)
    assert PATH.stat().st_size < _MAX_BYTES
    code = _code(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert len([cell for cell in code if not _shape(cell)]) <= 1, "only the imports show nothing"
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert str(ROOT) not in PATH.read_text(encoding="utf-8")


def test_the_notebook_is_linked() -> None:
    for page in ("docs/README.md", "docs/guides/python-api.md"):
        assert "notebooks/data_to_search.ipynb)" in (ROOT / page).read_text(encoding="utf-8"), page


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shown = _notebook()
    ran = copy.deepcopy(shown)
    for cell in _code(ran):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(
        ran, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    for before, after in zip(_code(shown), _code(ran), strict=True):
        assert _shape(after) == _shape(before), before.source
    # A trained model finds the colour that was asked for far above chance, on any machine.
    search = next(cell for cell in _code(ran) if cell.source.startswith("query = "))
    captions = "".join(output.text for output in search.outputs if output.get("name") == "stdout")
    assert sum("红色" in line for line in captions.splitlines()) >= 8, captions
