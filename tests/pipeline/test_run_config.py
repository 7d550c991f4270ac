"""Strict configuration: what is refused and how it is said, overrides, unions, digests, shipped recipes."""

import shutil
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Discriminator

from pipeline import catalog
from pipeline.core.config import (
    NOT_IN_DIGEST,
    apply_overrides,
    build,
    digest,
    find_recipe,
    read_toml,
    to_toml,
)
from pipeline.core.records import ConfigError
from training.model.config import MODELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Apples:
    kind: Literal["apples"]
    num_apples: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pears:
    kind: Literal["pears"]
    num_pears: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Basket:
    fruit: Annotated[Apples | Pears, Discriminator("kind")]
    weight: float = 1.0
    label: str | None = None
    names: tuple[str, ...] = ()
    hands: int = field(default=2, metadata=NOT_IN_DIGEST)

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight {self.weight} is not above 0")


APPLES = {"fruit": {"kind": "apples"}}


def _error(table: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Basket, table, "basket.toml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_key_names_the_nearest_one() -> None:
    assert _error({**APPLES, "wieght": 2.0}) == "basket.toml: wieght: unknown key; did you mean weight?"
    assert _error({"fruit": {"kind": "pears", "num_pear": 2}}) == (
        "basket.toml: fruit.num_pear: unknown key; did you mean fruit.num_pears?"
    )


def test_unknown_key_far_from_all_lists_them() -> None:
    assert _error({**APPLES, "zzz": 1}).endswith("known keys: fruit, weight, label, names, hands")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({**APPLES, "weight": "2"}, ("weight", "'2'")),
        ({**APPLES, "hands": 1.5}, ("hands", "1.5")),
        ({**APPLES, "hands": True}, ("hands", "True")),
        ({**APPLES, "label": 3}, ("label", "3")),
        ({**APPLES, "names": ["a", 4]}, ("names.1", "4")),
        ({"fruit": {"kind": "apples", "num_apples": "many"}}, ("fruit.num_apples", "many")),
        ({"fruit": {"kind": "plums"}}, ("fruit", "apples", "pears")),
        ({"fruit": 7}, ("fruit", "7")),
        ({}, ("fruit", "required")),
        ({**APPLES, "weight": -1.0}, ("weight -1.0 is not above 0",)),
    ],
)
def test_wrong_values_are_named(table: dict[str, object], words: tuple[str, ...]) -> None:
    message = _error(table)
    assert message.startswith("basket.toml: ")
    for word in words:
        assert word.lower() in message.lower()


def test_an_integer_does_for_a_float_and_unions_go_by_kind() -> None:
    basket = build(Basket, {"fruit": {"kind": "pears", "num_pears": 3}, "weight": 2}, "basket.toml")
    assert basket == Basket(fruit=Pears(kind="pears", num_pears=3), weight=2.0)
    assert "num_apples" in _error({"fruit": {"kind": "pears", "num_apples": 3}})


def test_overrides_are_toml_and_bare_words_are_strings() -> None:
    table = {"a": {"b": 1}, "kept": 0}
    changed = apply_overrides(
        table, ["a.b=2", "a.c=word", "d.e=[1, 2]", 'f=["x"]', "g=true", "h=1e-3", "i=a=b", "j="]
    )
    assert changed == {
        "a": {"b": 2, "c": "word"}, "kept": 0, "d": {"e": [1, 2]}, "f": ["x"], "g": True, "h": 1e-3,
        "i": "a=b", "j": "",
    }  # fmt: skip
    assert table == {"a": {"b": 1}, "kept": 0}


@pytest.mark.parametrize("item", ["a.b", "=3", "kept.x=3"])
def test_overrides_that_make_no_sense(item: str) -> None:
    with pytest.raises(ConfigError, match=r"--set"):
        apply_overrides({"a": {"b": 1}, "kept": 0}, [item])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        read_toml(str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("a = = 1\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML: .*line 1"):
        read_toml(str(tmp_path / "bad.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: not valid TOML"):
        read_toml(str(tmp_path / "binary.toml"))


def test_a_digest_counts_what_matters_alone() -> None:
    basket = build(Basket, APPLES, "basket.toml")
    assert digest(basket) == digest(build(Basket, {**APPLES, "hands": 8}, "basket.toml"))
    assert digest(basket) != digest(build(Basket, {**APPLES, "weight": 1.5}, "basket.toml"))
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})


def test_a_resolved_configuration_reads_back_the_same() -> None:
    basket = build(Basket, {**APPLES, "names": ["苹果"]}, "basket.toml")
    assert build(Basket, tomllib.loads(to_toml(basket)), "again") == basket


RECIPES = sorted(
    entry.name for entry in (resources.files("pipeline") / "recipes").iterdir() if entry.name.endswith("toml")
)


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_loads(name: str) -> None:
    run, config = catalog.load(name)
    names = [stage.name for stage in run.stages]
    assert names[0] == "corpus"
    assert names[-1] == "report"
    assert len(set(names)) == len(names)
    for position, stage in enumerate(run.stages):
        assert set(stage.parents) <= set(names[:position]), stage.name
    assert build(catalog.RunConfig, tomllib.loads(to_toml(config)), name) == config


@pytest.mark.parametrize("name", RECIPES)
def test_pictures_of_every_shipped_recipe_leave_room_for_a_crop(name: str) -> None:
    _, config = catalog.load(name)
    if config.download is not None and config.model.name in MODELS:
        assert config.download.short_side_px > MODELS[config.model.name].vision.image_size_px


def test_a_recipe_is_found_by_name_and_by_its_path_in_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_recipe("demo")
    assert find_recipe("demo.toml") == find_recipe("pipeline/recipes/demo.toml") == shipped
    shutil.copy(shipped, tmp_path / "demo.toml")
    assert find_recipe("demo.toml") == "demo.toml"  # a file at hand comes before the shipped one
    with pytest.raises(ConfigError, match=r"demmo: no such file; .*demo\.toml"):
        find_recipe("demmo")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage1.epoch=2", "demo.toml: stage1.epoch: unknown key; did you mean stage1.epochs?"),
        ("stage1.augment.horizontal_flips=0.5", "did you mean stage1.augment.horizontal_flip?"),
        ("filtertext.min_score=0.2", "did you mean filter_text?"),
        ("model.name=tiny", "model.name"),
        ("run.processes=two", "run.processes"),
        ("run.seed=-1", "run.seed = -1: must not be negative"),
        ("stage1.peak_learning_rate=nan", "stage1.peak_learning_rate: must be a finite number, found nan"),
        (
            "stage1.augment.crop_area=[0.5, inf]",
            "stage1.augment.crop_area: must be a finite number, found inf",
        ),
        ("launch.gpus_per_node=-1", "gpus_per_node = -1: must not be negative"),
        ("corpus.kind=demos", "corpus"),
    ],
)
def test_a_run_with_a_wrong_key_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        catalog.load("demo", [override])
    assert words in str(caught.value)
    assert "demo.toml" in str(caught.value)


def test_a_stage_cannot_choose_by_a_set_that_the_run_lacks() -> None:
    with pytest.raises(ConfigError, match=r"\[stage1\] choose_on: no evaluation set 'nope'; the run has"):
        catalog.load("paper_corpus", ['stage1.choose_on=["nope"]'])
