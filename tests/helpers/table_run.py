"""A run of one small caption table, for tests of commands and settings that download and train nothing."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

_RUN = """
[run]
folder = "{folder}/run"
processes = 1
[corpus]
kind = "tables"
[[corpus.tables]]
path = "{folder}/table.csv"
name = "mine"
[model]
name = "tiny-rn"
[[evaluation]]
name = "test"
folder = "{folder}"
[stage1]
epochs = {epochs}
global_batch = 4
peak_learning_rate = 1e-3
warmup_steps = 1
weight_decay = 0.1
lanes = 2
[dedup]
partitions = 2
"""
KEPT_URL, SHORT_URL = "http://a.cn/1.jpg", "http://a.cn/2.jpg"
_TWO_ROWS = ((KEPT_URL, "一只黑色的猫"), (SHORT_URL, "猫"))  # the second caption is too short


def write_table_run(folder: Path, rows: Sequence[Sequence[object]] = _TWO_ROWS, *, epochs: int = 1) -> Path:
    """Write the table, an evaluation set and the run's file, whose path is returned.

    Rows are (url, caption) or (url, caption, score).
    """
    columns = ("url", "caption", "score")[: len(rows[0])]
    pl.DataFrame([*rows], schema=columns, orient="row").write_csv(folder / "table.csv")
    (folder / "test_imgs.tsv").write_text("".join(f"{number}\tAAAA\n" for number in range(10)))
    texts = "".join(f'{{"text_id": {n}, "text": "猫", "image_ids": [{n}]}}\n' for n in range(10))
    (folder / "test_texts.jsonl").write_text(texts)
    path = folder / "run.toml"
    path.write_text(_RUN.format(folder=folder, epochs=epochs))
    return path
