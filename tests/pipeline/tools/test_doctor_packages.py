"""Which packages `cnclip doctor` looks for."""

from importlib import metadata

import pytest

from pipeline.tools import doctor


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names that count as installed; a test changes the set."""
    names = {"torch", "deepspeed", "transformers", "timm", "img2dataset", "faiss-cpu", "polars"}

    def version(name: str) -> str:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    return names


def test_either_build_of_faiss_will_do(installed: set[str]) -> None:
    assert doctor._packages("").fit
    installed.remove("faiss-cpu")
    assert not doctor._packages("").fit
    installed.add("faiss-gpu-cu12")
    assert doctor._packages("").fit


def test_both_builds_of_faiss_are_not_fit_and_the_remedy_names_the_commands(installed: set[str]) -> None:
    installed.add("faiss-gpu-cu12")
    finding = doctor._packages("")
    assert not finding.fit
    assert "pip uninstall faiss-cpu" in finding.remedy
    assert "--force-reinstall --no-deps faiss-gpu-cu12" in finding.remedy
