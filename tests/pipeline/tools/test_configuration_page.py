"""docs/reference/configuration.md equals the output of its generator, which covers every key."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Lt, MinLen

from pipeline.catalog import RunConfig
from pipeline.tools import configuration_page
from training.config.train import TrainConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Basket:
    """`[basket]`."""

    weight: Annotated[float, Ge(0), Lt(10)] = 1e-3
    """Weight in
    kilograms.
    """
    fruit: Annotated[tuple[str, ...], MinLen(1)] = ("apple",)
    """Names."""
    lid: Literal["open", "shut"] | None = None
    """How it is closed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bare:
    """`[bare]`."""

    told: int = 1
    """A number."""
    untold: int = 2


def test_the_page_is_that_of_the_code() -> None:
    written = configuration_page.PAGE.read_text(encoding="utf-8")
    assert written == configuration_page.page(), "run python -m pipeline.tools.configuration_page"


def test_every_table_and_key_is_on_it() -> None:
    page = configuration_page.page()
    for field in dataclasses.fields(RunConfig):
        assert f"`[{field.name}]`" in page or f"`[[{field.name}]]`" in page
    for field in dataclasses.fields(TrainConfig):
        assert f"\n| `{field.name}` | " in page


def test_tracking_makes_nothing_stale() -> None:
    section = configuration_page.page().partition("## `[tracking]`")[2].partition("\n## ")[0]
    assert "| no |" in section
    assert "| yes |" not in section


def test_a_section_shows_type_default_bounds_and_docstring() -> None:
    lines = "".join(configuration_page._section(Basket, "`[basket]`", "basket", "##", "Fruit.")).splitlines()
    assert lines[1:4] == ["## `[basket]`", "", "Fruit."]
    assert "| `weight` | number | `0.001` | ≥ 0, < 10 | yes | Weight in kilograms. |" in lines
    assert '| `fruit` | list of strings | `["apple"]` | length ≥ 1 | yes | Names. |' in lines
    assert '| `lid` | `"open"`, `"shut"` | unset | – | yes | How it is closed. |' in lines


def test_a_key_without_a_docstring_is_named() -> None:
    with pytest.raises(KeyError, match=r"Bare\.untold: write a docstring under the field"):
        list(configuration_page._section(Bare, "`[bare]`", "bare", "##"))


def test_outside_a_checkout_it_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(configuration_page, "PAGE", tmp_path / "docs" / "configuration.md")
    assert configuration_page.main() == 1
    assert "docs: no such folder; run this from a checkout" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
