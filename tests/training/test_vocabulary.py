from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.records import Manifest, Shard
from pipeline.core.stage import Context, Task
from training.model.tokenizer import SPECIAL_TOKENS
from training.vocabulary import VocabularyConfig, VocabularyTask, run

SIDECARS = (
    {"caption": ["猫", "狗"]},
    {"caption": ["马", "羊"], "captions": [["马", "鱼"], None]},  # of a source that keeps several
    {"caption": ["牛"], "captions": [["牛", "牛"]]},
)


def test_each_caption_of_each_sidecar_counts(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    shards = []
    for number, columns in enumerate(SIDECARS):
        path = f"{number:05d}.parquet"
        pq.write_table(pa.table(columns), tmp_path / "shards" / path)
        shards += [Shard(path, 2, 1, "0" * 64), Shard(f"{number:05d}.tar", 2, 1, "0" * 64)]
    manifest = Manifest("shards", 1, "", "", {}, tuple(shards), 5, 5, {})
    context = Context(str(tmp_path), "vocabulary", 0, {"shards": manifest})
    shown: list[tuple[int, int]] = []
    outcome = run(
        VocabularyConfig(size=len(SPECIAL_TOKENS) + 4),
        context,
        Task("caption", {}, VocabularyTask(column="caption").to_json()),
        lambda done, total, text="": shown.append((done, total)),
    )
    assert outcome.num_in == outcome.outputs["caption.txt"] == 7
    learned = (tmp_path / "vocabulary" / "caption.txt").read_text().splitlines()
    assert learned == [*SPECIAL_TOKENS, "牛", "狗", "猫", "羊"]
    assert shown == [(1, 3), (2, 3), (3, 3)]
