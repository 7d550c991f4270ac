"""Small training jobs, and the functions that ranks run in tests."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.core.config import build
from tests.helpers.large_twins import TWINS
from tests.helpers.shard_files import write_shards, write_vocabulary
from training.config.job import TrainJob
from training.config.train import AugmentConfig, TrainConfig
from training.model.config import ModelConfig, ModifiedResNetConfig, TextConfig, VisionTransformerConfig

CONFIG = TrainConfig(
    epochs=2,
    global_batch=16,
    peak_learning_rate=2e-3,
    warmup_steps=2,
    weight_decay=0.05,
    context_length=12,
    augment=AugmentConfig(crop_area=(0.6, 1.0), horizontal_flip=0.0, auto_augment="none"),
    lanes=4,
    window_shards=2,
    save_every_steps=3,
    validate_every_steps=4,
)
# For what only reads the files of a training; give it a folder.
UNTRAINED_JOB = TrainJob(
    stage="stage1",
    model="small-vit",
    seed=0,
    shards=(),
    vocabulary="vocab.txt",
    config=CONFIG,
    folder="",
    output_model="",
)


def build_config(changes: Mapping[str, Any]) -> TrainConfig:
    """Return CONFIG with changes, as a run's file gives it: checked; tables are merged."""
    table = dataclasses.asdict(CONFIG)
    for name, value in changes.items():
        plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        table[name] = {**(table[name] or {}), **plain} if isinstance(plain, dict) else plain
    return build(TrainConfig, table, "run.toml")


def make_job(
    folder: Path, run: str, *, model: str = "small-vit", sizes: tuple[int, ...] = (20, 20, 9), **changes: Any
) -> TrainJob:
    """Return a job on shards that all runs of a test's folder share; `changes` are TrainConfig's fields."""
    shards = write_shards(folder / "shards", list(sizes))
    (folder / run).mkdir(exist_ok=True)
    return TrainJob(
        stage="stage2",
        model=model,
        seed=7,
        shards=shards,
        vocabulary=write_vocabulary(folder / "vocab.txt"),
        config=dataclasses.replace(CONFIG, **changes),
        folder=str(folder / run),
        output_model=str(folder / run / "model.safetensors"),
    )


def mean_similarity(clip: Any) -> dict[str, dict[str, Any]]:
    """Stand in for recall, by a number that depends on every weight and buffer."""
    import torch

    assert not clip.training
    generator = torch.Generator().manual_seed(1)
    size_px = clip.config.vision.image_size_px
    image_BCHW = torch.rand(4, 3, size_px, size_px, generator=generator)
    tokens_BL = torch.randint(1, 20, (4, 6), generator=generator)
    with torch.no_grad():
        similarity = clip.encode_image(image_BCHW) @ clip.encode_text(tokens_BL).T
    return {"toy": {"mean_recall": similarity.mean().item()}}


def train_rank(job: TrainJob, *, dropout: float = 0.1) -> None:
    """Do what one rank does, with the models of tests."""
    from training.model.config import MODELS
    from training.pretrain import pretrain

    MODELS.update(small_models(dropout))
    pretrain(job, mean_similarity)


def small_models(dropout: float = 0.1) -> dict[str, ModelConfig]:
    """Return a ViT, and a ResNet with its batch norms; the large one normalises even a single image."""
    text = TextConfig(layers=2, width=64, heads=2, max_positions=16, dropout=dropout)
    vit = VisionTransformerConfig(image_size_px=32, patch_size_px=8, layers=2, width=64, heads=2)
    resnet = ModifiedResNetConfig(image_size_px=32, blocks=(1, 1, 1, 1), width=256)
    twin = TWINS["ViT-bigG-14"]
    return {
        twin.name: dataclasses.replace(twin, text=text),
        "small-vit": ModelConfig(name="small-vit", embed_dim=32, vision=vit, text=text),
        "small-rn": ModelConfig(name="small-rn", embed_dim=32, vision=resnet, text=text),
        "small-rn-64": ModelConfig(
            name="small-rn-64",
            embed_dim=32,
            vision=dataclasses.replace(resnet, image_size_px=64),
            text=text,
        ),
    }


def save_deepspeed_checkpoints(folder: str, stages: list[int]) -> None:
    """Train the tiny ViT a step at each ZeRO stage and save it as DeepSpeed does, and as it is: `<stage>.pt`.

    The image tower is frozen: what is frozen is kept elsewhere in the files than what is trained.
    """
    import deepspeed
    from torch import nn

    from training.config.train import TrainConfig
    from training.engine.engine import join_ranks
    from training.model.clip import build_clip
    from training.model.config import MODELS

    join_ranks(TrainConfig(epochs=1, global_batch=4, lanes=2, ranks=2, peak_learning_rate=1e-3))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.clip = build_clip(MODELS["tiny-vit"])
            self.clip.lock_image_tower()

        def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
            return self.clip.encode_text(tokens_BL).sum() * self.clip.logit_scale.sum()

    for stage in stages:
        module = Wrapped().eval()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW([{"params": trained[:5]}, {"params": trained[5:]}], lr=1e-2),
            config={
                "zero_optimization": {"stage": stage},
                "train_micro_batch_size_per_gpu": 2,
                "zero_allow_untested_optimizer": True,
            },
            dist_init_required=False,
        )
        loss = engine(torch.tensor([[2, 5, 6, 3], [2, 9, 3, 0]]))
        engine.backward(loss)
        engine.step()
        engine.save_checkpoint(f"{folder}/zero{stage}")
        with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
            if torch.distributed.get_rank() == 0:
                torch.save(module.clip.state_dict(), f"{folder}/{stage}.pt")
