"""`[[stage2.phases]]`: cheaper trainings before the stage's own, which hand their weights on."""

from pathlib import Path

import pytest

from pipeline.catalog import load
from pipeline.core.records import ConfigError
from pipeline.planning.requirements import hardware, need, trainings_of_run
from training.stages import TrainStageConfig

RUN = """
[run]
folder = "runs/x"
[corpus]
kind = "demo"
[model]
name = "ViT-B-16"
[english]
epochs = 1
[[english.phases]]
epochs = 2
image_size_px = 64
[stage2]
epochs = 3
global_batch = 1_024
peak_learning_rate = 1e-5
[[stage2.phases]]
epochs = 20
image_size_px = 112
context_length = 16
patch_mask = 0.5
global_batch = 4_000
peak_learning_rate = 1e-4
[[stage2.phases]]
epochs = 4
image_size_px = 160
"""


def write(tmp_path: Path, text: str = RUN) -> str:
    (tmp_path / "run.toml").write_text(text)
    return str(tmp_path / "run.toml")


def test_phases_come_before_their_stage_and_hand_their_weights_on(tmp_path: Path) -> None:
    run, config = load(write(tmp_path))
    found = {stage.name: stage.config for stage in run.stages if isinstance(stage.config, TrainStageConfig)}
    assert list(found) == ["english_phase1", "english", "stage2_phase1", "stage2_phase2", "stage2"]
    starts = [(item.start_stage, item.image_stage) for item in found.values()]
    assert starts == [
        (None, None),
        ("english_phase1", None),
        (None, "english"),
        ("stage2_phase1", None),
        ("stage2_phase2", None),
    ]
    assert [item.validate for item in found.values()] == [False, False, True, True, True]
    assert [item.save_openai for item in found.values()] == [False, True, False, False, False]
    first, second, last = (found[name].train for name in ("stage2_phase1", "stage2_phase2", "stage2"))
    assert (first.epochs, first.image_size_px, first.context_length, first.patch_mask) == (20, 112, 16, 0.5)
    assert (first.global_batch, first.lanes, first.peak_learning_rate) == (4_000, 500, 1e-4)
    assert (second.epochs, second.image_size_px, second.context_length) == (4, 160, 52)
    assert (second.global_batch, second.patch_mask, second.peak_learning_rate) == (1_024, 0.0, 1e-5)
    assert (last.epochs, last.image_size_px) == (3, None)
    assert [item.phases for item in (first, second, last)] == [(), (), ()]
    assert config.stage2 is not None
    assert len(config.stage2.phases) == 2
    retrieval = next(stage for stage in run.stages if stage.name == "retrieval")
    assert retrieval.config.stages == ("stage2",)
    titles = {stage.name: stage.title for stage in run.stages}
    assert titles["stage2_phase1"] == (
        "both towers trained; images of 112 px; captions cut at 16 tokens; 50% of the patches left out"
    )


def test_a_plan_counts_smaller_images(tmp_path: Path) -> None:
    run, _ = load(write(tmp_path))
    on = hardware("H100", 0.4, None)
    days = {
        item.name: need(item, on, 20).gpu_days / item.config.epochs
        for item in trainings_of_run(run, 1_000_000)
        if item.name.startswith("stage2")
    }
    # 50 tokens of an image instead of 101 and 197, and half of them masked, in the first
    assert days["stage2_phase1"] < 0.25 * days["stage2"]
    assert 0.4 * days["stage2"] < days["stage2_phase2"] < 0.6 * days["stage2"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "image_size_px = 112",
            "image_size_px = 100",
            r"\[stage2_phase1\] image_size_px: an image size of 100 is not a multiple of 16 pixels",
        ),
        ("global_batch = 4_000\n", "cached_views = 2\n", r"stage2\.phases\.cached_views: unknown key"),
        ("epochs = 20\n", "", r"stage2\.phases\.0\.epochs: required"),
        ("[stage2]\n", "[stage2]\nlanes = 2\nranks = 4\n", r"ranks = 4 is more than lanes = 2"),
        (
            "[stage2]\n",
            "[stage2]\nlock_image = true\ncached_views = 2\n",
            r"\[stage2\] phase 1: patch_mask needs images, but cached_views = 2",
        ),
        (
            "[[stage2.phases]]\nepochs = 20",
            'distil.teacher = "x"\n[[stage2.phases]]\nepochs = 20',
            r"\[stage2\] phase 1: image_size_px = 112, but distil\.teacher reads images of the stage's size",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, RUN.replace(old, new)))


def test_a_vocabulary_covers_all_columns_that_are_drawn(tmp_path: Path) -> None:
    text = RUN.replace("epochs = 3\n", "epochs = 3\ncaption_weights = { caption = 3, caption_en = 1 }\n")
    run, _ = load(write(tmp_path, text.replace("[english]", '[english]\ncaption_column = "caption_en"')))
    (vocabulary,) = [stage for stage in run.stages if stage.name == "vocabulary"]
    assert vocabulary.config.columns == ("caption", "caption_en")
    assert vocabulary.config.together == {"caption": ("caption", "caption_en")}
    for key in ("columns=['title']", "together.caption=['title']"):
        with pytest.raises(ConfigError, match=r"vocabulary\.\w+: the run takes it from the caption_column"):
            load(write(tmp_path, text), [f"vocabulary.{key}"])
    with pytest.raises(ConfigError, match=r"stage2\.caption_weights\.caption: must be greater than 0"):
        load(write(tmp_path, text.replace("caption = 3", "caption = 0")))
