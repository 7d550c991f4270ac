"""Strict configuration: refusals and their messages, overrides, unions, digests, shipped recipes."""

import dataclasses
import re
import shutil
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
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
from pipeline.tools import configuration_page
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded:
    epochs: Annotated[int, Gt(0)] = 1
    share: Annotated[float | None, Ge(0), Lt(1)] = None
    patience: Annotated[int, Le(9), MultipleOf(3)] = 3
    names: Annotated[tuple[str, ...], MinLen(1), MaxLen(2)] = ("a",)
    label: Annotated[str, MinLen(2)] = "ab"
    mode: Literal["fast", "slow"] = "fast"
    sizes: tuple[float, float] = (1.0, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    stage1: Bounded


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


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"epochs": 0}, "epochs: must be greater than 0, found 0"),
        ({"epochs": "two"}, "epochs: must be an integer, found 'two'"),
        ({"share": -0.5}, "share: must be at least 0, found -0.5"),
        ({"share": 1}, "share: must be less than 1, found 1"),
        ({"share": "1"}, "share: must be a number, found '1'"),
        ({"patience": 12}, "patience: must be at most 9, found 12"),
        ({"patience": 4}, "patience: must be a multiple of 3, found 4"),
        ({"names": []}, "names: must not be empty"),
        ({"names": ["a", "b", "c"]}, "names: must have at most 2 items, found ['a', 'b', 'c']"),
        ({"names": "a"}, "names: must be a list, found 'a'"),
        ({"label": "a"}, "label: must have at least 2 characters, found 'a'"),
        ({"mode": "quick"}, "mode: must be 'fast' or 'slow', found 'quick'"),
        ({"sizes": [1.0]}, "sizes: must have 2 items, found [1.0]"),
        ({"sizes": []}, "sizes: must have 2 items, found []"),
        ({"share": float("nan")}, "share: must be a finite number, found nan"),
        ({"sizes": [1.0, float("-inf")]}, "sizes: must be a finite number, found -inf"),
    ],
)
def test_bounds_of_types_are_told_in_one_dialect(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Stages, {"stage1": table}, "run.toml")
    assert str(caught.value) == f"run.toml: stage1.{message}"


def test_bounds_let_the_limits_and_unset_values_pass() -> None:
    table = {"share": 0, "patience": 9, "names": ["a", "b"]}
    built = build(Stages, {"stage1": table}, "run.toml").stage1
    assert (built.share, built.patience, built.names) == (0.0, 9, ("a", "b"))
    assert build(Stages, {"stage1": {}}, "run.toml").stage1.share is None


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
    with pytest.raises(ConfigError, match=r"^demmo: no such file; did you mean demo\?$"):
        find_recipe("demmo")
    with pytest.raises(ConfigError, match=r"^mine: no such file; give a run's TOML .*recipes: demo, "):
        find_recipe("mine")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match=r"^mine: neither a TOML file nor the folder of a started run; "):
        find_recipe("mine")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage1.epoch=2", "demo.toml: stage1.epoch: unknown key; did you mean stage1.epochs?"),
        ("stage1.augment.horizontal_flips=0.5", "did you mean stage1.augment.horizontal_flip?"),
        ("filtertext.min_score=0.2", "did you mean filter_text?"),
        ("model.name=tiny", "demo.toml: model.name: no model 'tiny'; known: "),
        ("model=3", "demo.toml: model: must be a table, found 3"),
        ("run.processes=two", "demo.toml: run.processes: must be an integer, found 'two'"),
        ("run.processes=0", "demo.toml: run.processes: must be at least 1, found 0"),
        ("launch.stop_seconds=0", "launch.stop_seconds: must be greater than 0, found 0"),
        ("run.seed=-1", "demo.toml: run.seed: must be at least 0, found -1"),
        ("stage1.peak_learning_rate=nan", "stage1.peak_learning_rate: must be a finite number, found nan"),
        (
            "stage1.augment.crop_area=[0.5, inf]",
            "stage1.augment.crop_area: must be a finite number, found inf",
        ),
        ("launch.gpus_per_node=-1", "launch.gpus_per_node: must be at least 0, found -1"),
        ("corpus.kind=demos", "demo.toml: corpus.kind: must be one of 'demo', 'emoji'"),
        ("download.short_side_px=-3", "download.short_side_px: must be at least 1, found -3"),
        ("download.threads=0", "download.threads: must be at least 1, found 0"),
        ("download.jpeg_quality=900", "download.jpeg_quality: must be at most 100, found 900"),
        ("filter_image.evaluation_distance=-5", "evaluation_distance: must be at least 0, found -5"),
        ("filter_text.min_score=7", "demo.toml: filter_text.min_score: must be at most 1, found 7"),
        ("vocabulary.size=-5", "demo.toml: vocabulary.size: must be at least 6, found -5"),
    ],
)
def test_a_run_with_a_wrong_key_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        catalog.load("demo", [override])
    assert words in str(caught.value)
    assert "demo.toml" in str(caught.value)


def test_every_number_of_a_run_has_bounds() -> None:
    rows = [line.split(" | ") for line in configuration_page.page().splitlines() if line.startswith("| `")]
    unbounded = [row[0] for row in rows if re.search("integer|number", row[1]) and row[3] == "–"]
    # Scores of a classifier and a sequence's mutual information are any numbers
    assert unbounded == ["| `min_score`", "| `max_score`", "| `ngram_min_cohesion`"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['model.start_weights="w.pt"'], "model.start_weights is a whole model: leave out"),
        (
            ['model.start_weights="w.pt"', 'model.text_weights="bert"'],
            "model: start_weights is a whole model: leave out",
        ),
        (['model.image_weights="w.pt"'], "model.image_weights and [english] both give the image tower"),
        (["filter_score.min_score=0.2"], "filter_score: nothing to judge without [score]"),
    ],
)
def test_tables_that_exclude_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        catalog.load("demo", overrides)
    assert f"demo.toml: {message}" in str(caught.value)


def test_a_kind_that_brings_images_is_sent_to_the_sources(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    for corpus, key, kind in (
        ('kind = "tables"\n[[corpus.tables]]\nkind = "huggingface"\npath = "a"\nname = "a"\n'
         'image_column = "png"\n', "corpus.tables.0.kind", "huggingface"),
        ('kind = "webdataset"\npath = "a/*.tar"\n', "corpus.kind", "webdataset"),
    ):  # fmt: skip
        path.write_text(f'[run]\nfolder = "run"\n[corpus]\n{corpus}')
        with pytest.raises(ConfigError) as caught:
            catalog.load(str(path))
        assert str(caught.value) == (
            f"{path}: {key}: {kind!r} is a kind of [[corpus.sources]], which bring their images;"
            f' write [corpus] kind = "sources" and [[corpus.sources]] kind = "{kind}" with its settings'
        )


def test_a_stage_cannot_choose_by_a_set_that_the_run_lacks() -> None:
    with pytest.raises(ConfigError, match=r"\[stage1\] choose_on: no evaluation set 'nope'; the run has"):
        catalog.load("paper_corpus", ['stage1.choose_on=["nope"]'])


def test_a_precision_of_features_reaches_its_stages_and_the_default_changes_no_digest() -> None:
    plain, _ = catalog.load("demo")
    rounded, _ = catalog.load("demo", ["embed.precision=bf16"])
    assert rounded.stage("embed").config.precision == "bf16"
    before = dataclasses.asdict(plain.stage("embed").config)
    assert before.pop("precision") == "float32"
    assert digest(plain.stage("embed").config) == digest(before)
    assert digest(rounded.stage("embed").config) != digest(before)
    with pytest.raises(ConfigError, match=r"embed\.precision: must be 'float32' or 'bf16'"):
        catalog.load("demo", ["embed.precision=fp16"])
