"""A run without a model ends with its corpus's report; one with a model shows the corpus before it trains."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from data_prep.download import stage as download
from pipeline import catalog
from pipeline.cli.tables import closing_words
from pipeline.core.records import ConfigError
from pipeline.core.stage import Context, Outcome, Task
from pipeline.last_start import start
from tests.helpers.corpus_files import drawing, encoded
from tests.helpers.download import publish_images
from tests.helpers.evaluation_files import small_evaluation

CORPUS = """
[run]
folder = "{root}/run"
processes = 1
[corpus]
kind = "tables"
[[corpus.tables]]
path = "{root}/captions.csv"
name = "mine"
[dedup]
partitions = 1
[dedup_image]
"""
TRAINING = """
[model]
name = "tiny-rn"
[stage2]
epochs = 1
global_batch = 8
lanes = 2
[[evaluation]]
name = "valid"
folder = "{root}/valid"
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty rows, four of them with a copy's image, one too long, three with captions too short."""
    rows = {
        "url": [f"http://a.cn/{number}.jpg" for number in range(20)],
        "caption": ["短" if number % 7 == 5 else f"第{number}只橘猫趴在窗台上" for number in range(20)],
    }
    pl.DataFrame(rows).write_csv(tmp_path / "captions.csv")
    (tmp_path / "my.toml").write_text(CORPUS.format(root=tmp_path), encoding="utf-8")

    def draw(url: str) -> bytes:
        number = int(url.rsplit("/", 1)[1].partition(".")[0])
        image = drawing(number % 16)
        return encoded(image.resize((120, 20)) if number == 9 else image)

    def fetch(
        config: Any, context: Context, tasks: list[Task], progress: Any
    ) -> Iterator[tuple[Task, Outcome]]:
        for task in tasks:
            yield task, publish_images(context, task, draw)

    monkeypatch.setattr(download, "run_together", fetch)
    return tmp_path


def _section(page: str, name: str) -> str:
    found = re.search(rf'<section aria-labelledby="{name}">.*?</section>', page, re.DOTALL)
    assert found, name
    return found[0]


def test_a_run_of_the_corpus_alone_ends_with_its_report(root: Path) -> None:
    run, num_run, num_stages = start(str(root / "my.toml"))
    names = [stage.name for stage in run.stages]
    assert names[-3:] == ["shards", "lock", "report"]
    assert num_run == num_stages == len(names)
    report = json.loads((root / "run/report/report.json").read_text())
    dropped = {step["stage"]: step["dropped"] for step in report["funnel"]}
    assert dropped["filter_text"] == {"too_short": 3}
    assert dropped["filter_image"] == {"aspect": 1}
    num_copies = sum(dropped["dedup_image"].values())
    assert num_copies == 3  # of 0 to 3 and 16 to 19, less the one whose caption is too short
    kept = 20 - 3 - 1 - num_copies
    page = (root / "run/report/report.html").read_text()
    assert _section(page, "samples").count("data:image/webp") == kept
    assert "<svg" in _section(page, "funnel")  # how lengths and sizes are spread
    examples = _section(page, "dropped")
    assert (
        examples.count("data:image/webp") == 1 + num_copies
    )  # a caption that is too short was never fetched
    assert all(f">{reason}<" in examples for reason in ("too_short", "aspect"))
    assert _section(page, "copies").count("data:image/webp") == 2 * num_copies
    assert 'aria-labelledby="scores"' not in page
    assert "model.safetensors" not in page
    words = closing_words(run, num_run, num_stages)
    assert re.search(r"filter_text +20 +17 +85\.0% +too_short 3\n", words)
    assert words.endswith(f"report: {root}/run/report/report.html")
    assert not (root / "run/report.html").exists()
    assert start(str(root / "my.toml"))[1] == 0


def test_a_run_with_a_model_shows_its_corpus_as_soon_as_it_is_packed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_evaluation(root / "valid", "valid")
    with (root / "my.toml").open("a", encoding="utf-8") as file:
        file.write(TRAINING.format(root=root))
    run, *_ = start(str(root / "my.toml"), last="shards")
    assert f"report of the corpus: {root}/run/report.html" in capsys.readouterr().err
    page = (root / "run/report.html").read_text()
    assert "data:image/webp" in _section(page, "samples")
    assert "tiny-rn" in page
    assert run.stages[-1].name == "report"


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (
            '[model]\nname = "tiny-rn"\n',
            "model: nothing to train; give [stage1], [stage2] or both, or [finetune]",
        ),
        ('[index]\nfactory = "HNSW32"\n', "index: nothing to train; .* or leave out [index]"),
        ("[stage1]\nepochs = 1\nglobal_batch = 8\n", "model: required, but not set; name a size"),
        (
            '[model]\nname = "tiny-rn"\n[stage1]\nepochs = 1\nglobal_batch = 8\n',
            "no [[evaluation]]; name at least one set",
        ),
    ],
)
def test_what_belongs_to_training_goes_with_a_training_stage(root: Path, added: str, said: str) -> None:
    with (root / "my.toml").open("a", encoding="utf-8") as file:
        file.write(added)
    with pytest.raises(ConfigError, match=re.escape(said).replace(r"\.\*", ".*")):
        catalog.load(str(root / "my.toml"))
