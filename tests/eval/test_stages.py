"""The evaluation stages one after another on a tiny run: what they hand on keeps its keys."""

import json
import shutil
from pathlib import Path

import pytest

from eval.stages import (
    EvaluationConfig,
    IndexConfig,
    RetrievalFacts,
    baseline_stage,
    embed_stage,
    index_stage,
    retrieval_stage,
)
from pipeline.core import store
from pipeline.core.evaluation_sets import EvaluationFacts, EvaluationSource
from pipeline.core.records import Manifest, Shard
from pipeline.core.stage import Context, Stage, fold, make_receipt
from tests.helpers.evaluation_files import png_bytes, small_evaluation, write_shards
from tests.helpers.tiny_model import write_tiny_model


def no_progress(done: int, total: int, text: str = "") -> None:
    pass


def manifest(stage: str, folder: Path) -> Manifest:
    shards = tuple(
        Shard(path.name, 1, path.stat().st_size, store.digest_file(str(path)))
        for path in sorted(folder.iterdir())
    )
    return Manifest(stage, 1, "", "", {}, shards, 0, 0, {}, {})


@pytest.mark.parametrize("name", ["small", "muge-valid"])
def test_stages_from_embed_to_baseline(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    for stage in ("stage2", "vocabulary"):
        (run / stage).mkdir(parents=True)
    write_tiny_model(tmp_path)
    shutil.move(tmp_path / "model.safetensors", run / "stage2" / "model.safetensors")
    shutil.move(tmp_path / "vocab.txt", run / "vocabulary" / "caption.txt")
    write_shards(run / "shards", [(png_bytes(row), f"第{row}张图片") for row in range(4)], 2)
    given = (EvaluationSource(name=name, folder=small_evaluation(tmp_path / "set", name)),)
    corpus = Manifest("corpus", 1, "", "", {}, (), 0, 0, {}, {"0": EvaluationFacts.of({}, given).to_json()})
    parents = {"corpus": corpus} | {
        stage: manifest(stage, run / stage) for stage in ("stage2", "vocabulary", "shards")
    }

    def done(stage: Stage) -> Manifest:
        context = Context(str(run), stage.name, 0, {name: parents[name] for name in stage.parents})
        tasks = stage.plan(stage.config, context)
        assert stage.run is not None
        receipts = [
            make_receipt(stage, context, task, stage.run(stage.config, context, task, no_progress), 0)
            for task in tasks
        ]
        parents[stage.name] = fold(stage, tasks, {}, receipts)
        return parents[stage.name]

    config = EvaluationConfig(stages=("stage2",), vocabulary=None, context_length=52)
    embedded = done(embed_stage(config, learned=("vocabulary",), sets_from=("corpus",)))
    assert f"{name}/stage2/img_emb/img_emb_0.npy" in [shard.path for shard in embedded.shards]
    for factory in ("IVF2,Flat", "Flat"):
        indexed = done(index_stage(IndexConfig(factory=factory)))
        files = {shard.path.rpartition("/")[2] for shard in indexed.shards}
        assert {"image.index", "text.index"} <= files
        assert ("image.search.json" in files) == (factory != "Flat")  # what the search was tuned to
    retrieved = done(retrieval_stage(config, sets_from=("corpus",)))
    (extra,) = retrieved.extra.values()
    assert (extra["evaluation"], extra["stage"]) == (name, "stage2")
    assert set(extra["scores"]) == {"t2i", "i2t", "mean_recall"}
    assert (extra["scores"]["i2t"] is None) == (name == "muge-valid")
    written = [shard.path.rpartition("/")[2] for shard in retrieved.shards]
    assert (f"{name}.tr.predictions.jsonl" in written) == (name != "muge-valid")
    assert RetrievalFacts.from_json(extra).to_json() == extra
    assert done(baseline_stage(sets_from=("corpus",))).shards[0].path == "baselines.json"
    baselines = json.loads((run / "baseline" / "baselines.json").read_text())[name]
    assert {(scores["i2t"] is None) for scores in baselines.values()} == {name == "muge-valid"}
