"""Classification sets of a run: measured by its final model, and next to the paper in its report."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from eval.paper.published import ClassificationProtocol
from eval.report.collect import comparisons
from eval.report.stage import ReportConfig
from eval.stages import EvaluationConfig
from eval.zeroshot import measure as classify
from eval.zeroshot.stage import (
    ClassificationSource,
    ZeroshotConfig,
    ZeroshotFacts,
    ZeroshotStageConfig,
    plan,
    run,
)
from pipeline.catalog import load
from pipeline.core import store
from pipeline.core.records import Manifest, Shard
from pipeline.core.stage import Context, Task
from tests.helpers.classification_files import write_cnclip
from tests.helpers.tiny_model import write_tiny_model


def manifest(stage: str, name: str, path: Path) -> Manifest:
    shard = Shard(name, 1, path.stat().st_size, store.digest_file(str(path)))
    return Manifest(stage, 1, "", "", {}, (shard,), 0, 0, {}, {})


@pytest.fixture
def context(tmp_path: Path) -> Context:
    for name in ("stage2", "vocabulary"):
        (tmp_path / "run" / name).mkdir(parents=True)
    write_tiny_model(tmp_path)
    weights = tmp_path / "run" / "stage2" / "model.safetensors"
    vocabulary = tmp_path / "run" / "vocabulary" / "caption.txt"
    shutil.move(tmp_path / "model.safetensors", weights)
    shutil.move(tmp_path / "vocab.txt", vocabulary)
    write_cnclip(tmp_path / "sets" / "mnist", count=5)
    write_cnclip(tmp_path / "sets" / "colours", count=3)
    parents = {
        "stage2": manifest("stage2", "model.safetensors", weights),
        "vocabulary": manifest("vocabulary", "caption.txt", vocabulary),
    }
    return Context(str(tmp_path / "run"), "zeroshot", 0, parents)


def config_of(tmp_path: Path, **zeroshot: str) -> ZeroshotStageConfig:
    return ZeroshotStageConfig(
        zeroshot=ZeroshotConfig(**zeroshot),  # type: ignore[arg-type]
        sets=tuple(
            ClassificationSource(name=name, folder=str(tmp_path / "sets" / name))
            for name in ("mnist", "colours")
        ),
        stage="stage2",
        vocabulary=None,
        context_length=52,
    )


def no_progress(done: int, total: int, text: str = "") -> None:
    pass


def test_scores_reach_the_report(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    score = EvaluationConfig(stages=("stage2",), vocabulary=None, context_length=52)
    report = ReportConfig(score=score, model="RN50", training_stages=(), titles={})

    def tables() -> dict[int | None, list[tuple[str, float | None]]]:
        outcomes = {task.name: run(config, context, task, no_progress) for task in plan(config, context)}
        assert outcomes["mnist"].num_kept == 15
        extra = {name: outcome.extra for name, outcome in outcomes.items()}
        done = Manifest("zeroshot", 1, "", "", {}, (), 0, 0, {}, json.loads(json.dumps(extra)))
        corpus = Manifest("corpus", 1, "", "", {}, (), 0, 0, {}, {})
        found = comparisons(
            report, dataclasses.replace(context, parents={"corpus": corpus, "zeroshot": done})
        )
        return {table.number: [(line.label, line.paper) for line in table.lines] for table in found}

    assert tables() == {12: [("MNIST", None)], 5: [("MNIST", None)], None: [("colours", None)]}
    pinned = ClassificationProtocol(id="mnist", title="MNIST", classes=3, images=15, metric="accuracy")
    monkeypatch.setattr(classify, "classification_protocol", lambda name: pinned if name == "mnist" else None)
    assert tables()[12] == [("MNIST", 50.2)]
    assert (
        json.loads((tmp_path / "run" / "zeroshot" / "mnist" / "submission.json").read_text())["n_shot"] == 0
    )


def test_a_task_is_bound_to_images_labels_templates_and_model(context: Context, tmp_path: Path) -> None:
    def inputs(**zeroshot: str) -> dict[str, dict[str, str]]:
        found: list[Task] = plan(config_of(tmp_path, **zeroshot), context)
        return {task.name: dict(task.inputs) for task in found}

    before = inputs()
    assert inputs() == before
    templates = tmp_path / "templates.txt"
    templates.write_text("{}的照片\n", encoding="utf-8")
    changed = inputs(templates=str(templates))
    assert {key for key in before["mnist"] if before["mnist"][key] != changed["mnist"][key]} == {"templates"}
    changed = inputs(templates="paper")
    assert {key for key in before["mnist"] if before["mnist"][key] != changed["mnist"][key]} == {"templates"}
    (tmp_path / "sets" / "mnist" / "label_cn.txt").write_text("零\n一\n二\n", encoding="utf-8")
    changed = inputs()
    assert {key for key in before["mnist"] if before["mnist"][key] != changed["mnist"][key]} == {
        "labels", "set"
    }  # fmt: skip
    assert changed["colours"] == before["colours"]


def test_map_is_measured_by_both_rules_and_binds_the_task_to_them(context: Context, tmp_path: Path) -> None:
    source = ClassificationSource(
        name="colours", folder=str(tmp_path / "sets" / "colours"), metric="11-point-map"
    )
    config = dataclasses.replace(config_of(tmp_path), sets=(source,))
    (task,) = plan(config, context)
    assert task.inputs["rules"] == "VOC and ELEVATER"
    assert all("rules" not in task.inputs for task in plan(config_of(tmp_path), context))
    extra = run(config, context, task, no_progress).extra
    facts = ZeroshotFacts.from_json(json.loads(json.dumps(extra)))
    assert facts.to_json() == extra
    assert facts.by_elevater is not None
    assert (
        f"by ELEVATER's, from which the paper's figure comes, {facts.by_elevater.value:.1f}" in facts.notes[0]
    )
    done = Manifest("zeroshot", 1, "", "", {}, (), 0, 0, {}, {"0": extra})
    corpus = Manifest("corpus", 1, "", "", {}, (), 0, 0, {}, {})
    score = EvaluationConfig(stages=("stage2",), vocabulary=None, context_length=52)
    report = ReportConfig(score=score, model="RN50", training_stages=(), titles={})
    parents = {"corpus": corpus, "zeroshot": done}
    (table,) = comparisons(report, dataclasses.replace(context, parents=parents))
    assert [(line.label, line.ours) for line in table.lines] == [
        ("colours, by ELEVATER's rule", facts.by_elevater),
        ("colours, by VOC's own rule", facts.measured),
    ]


def test_a_run_has_the_stage_where_it_names_a_set(tmp_path: Path) -> None:
    plain, _ = load("demo")
    assert "zeroshot" not in [stage.name for stage in plain.stages]
    recipe = Path("pipeline/recipes/demo.toml").read_text(encoding="utf-8")
    own = tmp_path / "own.toml"
    own.write_text(f'{recipe}\n[[classification]]\nname = "mnist"\nfolder = "sets/mnist"\n', encoding="utf-8")
    stages = {stage.name: stage for stage in load(str(own))[0].stages}
    assert stages["zeroshot"].parents == ("vocabulary", "stage2")
    assert "zeroshot" in stages["report"].parents
