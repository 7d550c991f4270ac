"""Evaluation sets of a run: found by name without being read, bound by the digests of their files."""

from pathlib import Path

import pytest

from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.evaluation_sets import (
    EvaluationFacts,
    EvaluationSet,
    EvaluationSource,
    check_size,
    digest_of,
    evaluation_named,
    evaluations_of,
    is_scored_image_to_text,
)
from pipeline.core.records import InputError, Manifest, Shard
from pipeline.core.stage import Context
from tests.helpers.evaluation_files import png_bytes, small_evaluation, write_shards


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A run whose corpus stage made one set and was given two, one of them shards."""
    given = small_evaluation(tmp_path / "given", "given")
    packed = write_shards(tmp_path / "packed", [(png_bytes(1), "一张图片")], 1)
    made = small_evaluation(tmp_path / "run" / "corpus" / "sets", "made")
    sources = (
        EvaluationSource(name="given", folder=given),
        EvaluationSource(name="packed", folder=packed),
    )
    shards = tuple(
        Shard(f"sets/{path.name}", 1, 1, store.digest_file(str(path))) for path in Path(made).iterdir()
    )
    extra = {"demo": EvaluationFacts.of({"made": "sets"}, sources).to_json()}
    corpus = Manifest("corpus", 1, "", "", {}, shards, 0, 0, {}, extra)
    return Context(str(tmp_path / "run"), "embed", 0, {"corpus": corpus})


def test_finding_sets_reads_none_of_their_files(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: str, *_: object, **__: object) -> None:
        raise AssertionError(f"{path} was read")

    for name in ("digest_file", "open_read", "read_bytes", "read_text"):
        monkeypatch.setattr(store, name, read)
    assert [item.name for item in evaluations_of(context)] == ["given", "made", "packed"]
    assert evaluation_named(context, "given").folder.endswith("given")
    assert evaluation_named(context, "made").folder == context.path_in("corpus", "sets")
    with pytest.raises(InputError, match="other: the corpus has no such evaluation set"):
        evaluation_named(context, "other")


def test_a_set_is_bound_by_the_digests_of_its_files(context: Context, tmp_path: Path) -> None:
    for name, folder in (("given", "given"), ("made", "run/corpus/sets")):
        files = [tmp_path / folder / f"{name}{suffix}" for suffix in ("_imgs.tsv", "_texts.jsonl")]
        expected = ":".join(store.digest_file(str(path)) for path in files)
        assert evaluation_named(context, name).digest == expected
    sidecar = store.digest_file(str(tmp_path / "packed" / "00000.parquet"))
    assert evaluation_named(context, "packed").digest == digest([sidecar])
    (tmp_path / "given" / "given_texts.jsonl").unlink()
    with pytest.raises(InputError, match=r"given_texts\.jsonl: no such file"):
        _ = evaluation_named(context, "given").digest


def test_facts_keep_their_keys() -> None:
    noted = EvaluationFacts({"made": "sets"}, {"given": "/given"})
    assert noted.to_json() == {"evaluations": {"made": "sets"}, "own_evaluations": {"given": "/given"}}
    assert EvaluationFacts.from_json(noted.to_json()) == noted
    assert EvaluationFacts.from_json({"urls": 3}) == EvaluationFacts({}, {})


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("muge-valid", "evaluation"),
        ("MUGE_test", "sets"),
        ("valid", "datasets/MUGE"),
        ("MR_valid", "datasets/muge/"),
        ("muge", "runs/muge"),
    ],
)
def test_muge_is_scored_text_to_image_only_however_it_is_named(name: str, folder: str) -> None:
    assert not is_scored_image_to_text(name, folder)
    assert EvaluationSet(name, folder).scored_by == {f"directions of {name}": "text-to-image"}


@pytest.mark.parametrize(
    ("name", "folder"),
    [("coco-cn-valid", "evaluation/muge"), ("valid", "datasets/COCO-CN"), ("smuge", "s"), ("unseen", "x")],
)
def test_other_sets_are_scored_both_ways_and_keep_their_inputs(name: str, folder: str) -> None:
    assert is_scored_image_to_text(name, folder)
    assert EvaluationSet(name, folder).scored_by == {}


@pytest.mark.parametrize("suffix", ["_imgs.tsv", "_texts.jsonl"])
def test_an_empty_set_is_refused_before_anything_is_made_for_it(tmp_path: Path, suffix: str) -> None:
    folder = small_evaluation(tmp_path / "given", "given")
    (Path(folder) / f"given{suffix}").write_text("")
    with pytest.raises(InputError, match=rf"given{suffix}: empty; give \[\[evaluation\]\] given images and"):
        digest_of(EvaluationSource(name="given", folder=folder))


@pytest.mark.parametrize(("name", "images", "texts", "few"), [
    ("mine", 10, 10, None), ("mine", 9, 10, "9 images"), ("mine", 10, 9, "9 texts"), ("muge", 10, 3, None),
    ("muge", 3, 30, "3 images"),
])  # fmt: skip
def test_a_set_too_small_for_its_recall_is_refused_before_anything_runs(
    name: str, images: int, texts: int, few: str | None, tmp_path: Path
) -> None:
    (tmp_path / f"{name}_imgs.tsv").write_text("1\tabc\n\n" * images)
    (tmp_path / f"{name}_texts.jsonl").write_text("{}\n" * texts)
    source = EvaluationSource(name=name, folder=str(tmp_path))
    if few is None:
        check_size(source)
        return
    with pytest.raises(InputError, match=rf"{name}_.*: {few} are too few for recall at 10; give \[\[eval"):
        check_size(source)


def test_a_set_of_few_shards_is_counted_by_its_sidecars(tmp_path: Path) -> None:
    few = write_shards(tmp_path / "few", [(png_bytes(1), "一张图片")] * 9, 4)
    with pytest.raises(InputError, match=r"few: 9 images are too few for recall at 10"):
        check_size(EvaluationSource(name="few", folder=few))
    check_size(
        EvaluationSource(name="a", folder=write_shards(tmp_path / "a", [(png_bytes(1), "一张图片")] * 10, 4))
    )
