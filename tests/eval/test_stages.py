"""The evaluation stages one after another on a tiny run: what they hand on keeps its keys."""

import shutil
from pathlib import Path

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


def test_stages_from_embed_to_baseline(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("stage2", "vocabulary"):
        (run / name).mkdir(parents=True)
    write_tiny_model(tmp_path)
    shutil.move(tmp_path / "model.safetensors", run / "stage2" / "model.safetensors")
    shutil.move(tmp_path / "vocab.txt", run / "vocabulary" / "caption.txt")
    write_shards(run / "shards", [(png_bytes(row), f"第{row}张图片") for row in range(4)], 2)
    given = (EvaluationSource(name="small", folder=small_evaluation(tmp_path / "set")),)
    corpus = Manifest("corpus", 1, "", "", {}, (), 0, 0, {}, {"0": EvaluationFacts.of({}, given).to_json()})
    parents = {"corpus": corpus} | {
        name: manifest(name, run / name) for name in ("stage2", "vocabulary", "shards")
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
    embedded = done(embed_stage(config, learned=("vocabulary",)))
    assert "small/stage2/img_emb/img_emb_0.npy" in [shard.path for shard in embedded.shards]
    assert "small/stage2/image.index" in [shard.path for shard in done(index_stage(IndexConfig())).shards]
    (extra,) = done(retrieval_stage(config)).extra.values()
    assert (extra["evaluation"], extra["stage"]) == ("small", "stage2")
    assert set(extra["scores"]) == {"t2i", "i2t", "mean_recall"}
    assert RetrievalFacts.from_json(extra).to_json() == extra
    assert done(baseline_stage()).shards[0].path == "baselines.json"
