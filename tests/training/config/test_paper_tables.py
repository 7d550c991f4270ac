"""The recipes against the paper's tables, cell by cell. Every number here was typed from the paper's text."""

import dataclasses

import pytest

from pipeline.catalog import load
from pipeline.core.records import ConfigError
from training.config.recipes import finetune_recipe, paper_recipe
from training.config.train import TrainConfig

# Appendix A.2: epochs in stage 1, epochs in stage 2, batch size of stage 2, cards.
PRETRAINING = {
    "RN50": (20, 44, 16384, 64),
    "ViT-B-16": (44, 15, 16384, 128),
    "ViT-L-14": (64, 7, 4608, 128),
    "ViT-H-14": (26, 7, 32768, 184),
}

# Table 9: batch size, peak learning rate, maximum epochs, warmup iterations, each on MUGE, Flickr, COCO.
TABLE_9 = """
RN50          24576 24576 24576   5e-5 6e-5 5e-5   60 30 40   100 20 6
ViT-B-16      12800  7680 12800   2e-5 5e-5 5e-5   20 16 30    40 20 6
ViT-L-14       4096  4096  4096   3e-5 2e-5 6e-5   20 16 18   100 60 9
ViT-L-14-336   8192  8192  8192   2e-5 2e-5 4e-5   20 18 18   100 20 2
ViT-H-14      20480  4096  5120   2e-5 6e-6 2e-5   20 18 18    20  6 10
"""
DATA = ("muge", "flickr30k-cn", "coco-cn")


def table_8(config: TrainConfig, is_resnet: bool) -> None:
    """Table 8's cells that are the same in both stages."""
    assert config.context_length - 2 == 50  # the table counts without [CLS] and [SEP]
    assert config.max_temperature == 100
    assert config.weight_decay == 0.001
    assert config.warmup_steps == 5000
    assert config.adam_beta1 == 0.9
    assert config.adam_beta2 == (0.999 if is_resnet else 0.98)
    assert config.adam_eps == (1e-8 if is_resnet else 1e-6)
    # A.2: random resize cropping and AutoAugment; the flip is CN-CLIP's.
    assert config.augment.crop_area == (0.9, 1.0)
    assert config.augment.auto_augment == "original"
    assert config.augment.horizontal_flip == 0.5
    assert config.deepspeed == "zero1_autocast"  # "Mixed-precision training is activated"


@pytest.mark.parametrize("model", PRETRAINING)
def test_table_8_and_a_2(model: str) -> None:
    epochs_1, epochs_2, batch_2, cards = PRETRAINING[model]
    first, second = paper_recipe(model, "stage1"), paper_recipe(model, "stage2")
    for config in (first, second):
        table_8(config, is_resnet=model == "RN50")
        assert config.ranks == cards
        assert config.choose == "best"
        assert config.patience > 0
    assert (first.global_batch, first.peak_learning_rate, first.epochs) == (32768, 0.0001, epochs_1)
    assert (second.global_batch, second.peak_learning_rate, second.epochs) == (batch_2, 0.00002, epochs_2)
    assert (first.lock_image, second.lock_image) == (True, False)
    assert not first.checkpoint_activations
    assert second.checkpoint_activations == (model == "ViT-H-14")


def test_the_larger_resolution_goes_on_for_two_epochs() -> None:
    config = paper_recipe("ViT-L-14-336", "stage2")
    table_8(config, is_resnet=False)
    assert (config.epochs, config.ranks, config.peak_learning_rate) == (2, 128, 0.00002)
    with pytest.raises(ConfigError, match="the paper has no stage1 of 'ViT-L-14-336'"):
        paper_recipe("ViT-L-14-336", "stage1")


@pytest.mark.parametrize("row", TABLE_9.strip().splitlines(), ids=lambda row: row.split()[0])
def test_table_9(row: str) -> None:
    model, *cells = row.split()
    batches, rates, epochs, warm_ups = (cells[i : i + 3] for i in range(0, 12, 3))
    for column, data in enumerate(DATA):
        config = finetune_recipe(model, data)
        assert config.global_batch == int(batches[column])
        assert config.peak_learning_rate == float(rates[column])
        assert config.epochs == int(epochs[column])
        assert config.warmup_steps == int(warm_ups[column])
        table_8(dataclasses.replace(config, warmup_steps=5000), is_resnet=model == "RN50")
        assert config.ranks == 32  # A.3
        assert config.checkpoint_activations == (model in ("ViT-L-14-336", "ViT-H-14"))  # A.3
        assert (config.choose, config.validate_every_epoch, config.patience) == ("best", True, 0)  # A.3
        assert config.validate_every_steps == 0  # at the end of each epoch alone (A.3)
        assert not config.lock_image


def test_longer_texts_are_128_tokens() -> None:
    for model in ("ViT-B-16", "ViT-L-14"):  # Table 10's models
        assert finetune_recipe(model, "icr").context_length == 128
    with pytest.raises(ConfigError, match="no finetuning of 'RN50' on 'icr'; it has RN50 on muge, "):
        finetune_recipe("RN50", "icr")


def test_the_ablations_of_figure_2_differ_in_what_they_are_about() -> None:
    _, two_stage = load("figure2_two_stage")
    _, unlocked = load("figure2_without_locking")
    _, scratch = load("figure2_from_scratch")
    assert two_stage.model.name == unlocked.model.name == scratch.model.name == "ViT-B-16"
    assert two_stage.model == unlocked.model  # the same start
    assert two_stage.model.image_weights is not None
    assert two_stage.model.text_weights is not None
    assert scratch.model.image_weights is None
    assert scratch.model.text_weights is None
    three_tasks = ("muge-valid", "flickr30k-cn-valid", "coco-cn-valid")
    to_the_end = {"patience": 0, "choose_on": three_tasks}  # curves of the same number of samples
    assert two_stage.stage1 == dataclasses.replace(paper_recipe("ViT-B-16", "stage1"), **to_the_end)
    assert two_stage.stage2 == dataclasses.replace(paper_recipe("ViT-B-16", "stage2"), **to_the_end)
    assert unlocked.stage1 is None
    assert scratch.stage1 is None
    assert unlocked.stage2 == scratch.stage2
    assert unlocked.stage2 is not None
    assert not unlocked.stage2.lock_image
    assert unlocked.stage2.epochs == 44 + 15
    assert unlocked.stage2.patience == 0
    assert two_stage.corpus == unlocked.corpus == scratch.corpus
    assert len({config.run.folder for config in (two_stage, unlocked, scratch)}) == 3
