"""What a run may say about training, and what every rank is told. No heavy imports here."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, Self

from pipeline.core.config import NOT_IN_DIGEST, build
from pipeline.core.records import ConfigError, Shard
from training.config.deepspeed_file import check_model, read_deepspeed_file
from training.model.config import ModelConfig

CONTEXT_LENGTH = 52  # tokens of a caption with [CLS] and [SEP] (Table 8: 50 without)


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """How an image is changed before a step sees it. The defaults are the paper's and CN-CLIP's (A.2).

    What the paper does not have is off by default. It is for small corpora of drawn pictures on white.
    """

    crop_area: tuple[float, float] = (0.9, 1.0)  # share of the image's area a random crop keeps (A.2)
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)  # width / height of that crop, in pixels
    horizontal_flip: float = 0.5  # probability; 0 where captions speak of left and right
    auto_augment: Literal["none", "original"] = "original"  # Cubuk et al. 2019 (A.2); it changes colours
    zoom: tuple[float, float] = (1.0, 1.0)  # factor on the content's size; under 1 leaves white around it
    stretch: float = 0.0  # largest logarithm of the change of width / height, either way
    rotation_degrees: float = 0.0  # largest turn, either way
    shear_degrees: float = 0.0  # largest slant, either way
    translation: float = 0.0  # largest shift along each axis, share of the side, either way
    brightness: float = 0.0  # factor on pixel values is 1 ± this
    contrast: float = 0.0  # factor on the distance to the mean luma is 1 ± this
    saturation: float = 0.0  # factor on the distance to each pixel's luma is 1 ± this
    hue: float = 0.0  # largest turn of the colour circle, in turns, either way
    colour_probability: float = 1.0  # of changing brightness, contrast, saturation and hue at all
    grey_probability: float = 0.0  # of dropping all colour
    erase_probability: float = 0.0  # of one colour over 2–20 % of the area (Zhong et al. 2017)

    def check(self, stage: str) -> None:
        """Raise ConfigError for numbers that are no share, probability, range or amount."""
        for name in ("crop_area", "crop_aspect", "zoom"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "crop_area" and high > 1):
                what = "a share of the area" if name == "crop_area" else "a factor"
                raise ConfigError(
                    f"[{stage}.augment] {name} = [{low}, {high}]: {what}, from above 0, the smaller one first"
                    + (", to at most 1" if name == "crop_area" else "")
                )
        for name in ("horizontal_flip", "colour_probability", "grey_probability", "erase_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"[{stage}.augment] {name} = {getattr(self, name)}: a probability, from 0 to 1"
                )
        amounts = "stretch rotation_degrees shear_degrees translation brightness contrast saturation hue"
        for name in amounts.split():
            if getattr(self, name) < 0:
                raise ConfigError(f"[{stage}.augment] {name} = {getattr(self, name)}: must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilConfig:
    """A larger model that a smaller one learns from (the paper's future work, section 5)."""

    teacher: str  # weights of any known format with both towers; the vocabulary is the student's
    weight: float = 1.0  # factor on the distillation loss, which is added to the contrastive loss
    temperature: float = 2.0  # both models' logits are divided by this; at 1 they stand as trained


@dataclass(frozen=True, slots=True, kw_only=True)
class NegationConfig:
    """Statements that a picture shows a thing or does not, true and false (sections 3.2.3 and 5).

    A thing counts as shown where the caption names it and as absent where it does not: for corpora whose
    captions name all there is of `objects`.
    """

    objects: tuple[str, ...]  # words for things, such as 圆形; at least two
    affirmed: tuple[str, ...] = ("图中有{}", "有{}")  # templates; {} is the thing
    negated: tuple[str, ...] = ("图中没有{}", "没有{}")
    weight: float = 1.0  # factor on the loss over true and false statements, added to the contrastive loss


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training stage. The defaults are the paper's Table 8, ViT column."""

    epochs: int  # passes over the corpus; the last incomplete batch of an epoch carries over (A.2)
    global_batch: int = 32_768  # samples an optimizer step sees over all ranks (Table 8)
    peak_learning_rate: float = 1e-4  # reached after the warm-up, then a cosine to 0 (Table 8)
    warmup_steps: int = 5_000  # steps of linear warm-up (Table 8)
    weight_decay: float = 1e-3  # decoupled, on weight matrices and embeddings alone (Table 8)
    adam_beta1: float = 0.9  # (Table 8)
    adam_beta2: float = 0.98  # 0.999 for a ResNet (Table 8)
    adam_eps: float = 1e-6  # 1e-8 for a ResNet (Table 8)
    max_gradient_norm: float | None = None  # longer gradients are shortened to this; the paper has none
    max_temperature: float = 100.0  # the logits' scale is clamped to 1…this (Table 8)
    lock_image: bool = False  # stage 1: the image tower stays as it is, byte for byte (2.3)
    # torch compiles the locked tower: some 20 seconds at each start, then a picture takes less time.
    compile_image: bool = field(default=False, metadata=NOT_IN_DIGEST)
    cached_views: int = 0  # augmented views of a picture whose features are computed once; 0: every time anew
    # Both towers recompute activations in the backward pass (A.2).
    checkpoint_activations: bool = field(default=False, metadata=NOT_IN_DIGEST)
    context_length: int = CONTEXT_LENGTH
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # images (A.2)
    caption_column: str = "caption"  # column of the shards' sidecars
    exclude_duplicates: bool = False  # pairs of equal image or caption are no negatives of each other
    patch_mask: float = 0.0  # share of a ViT's patches left out at random in training (FLIP, Li et al. 2023)
    distil: DistilConfig | None = None  # a teacher whose similarities the model learns too
    negation: NegationConfig | None = None  # statements with absent objects as hard negatives

    lanes: int = 512  # streams the corpus is cut into; divides global_batch, at least ranks
    window_shards: int = 4  # shards of a lane whose samples are shuffled together
    ranks: int = 1  # processes; the batches do not depend on it
    threads_per_rank: int = field(
        default=1, metadata=NOT_IN_DIGEST
    )  # threads that compute, and threads that decode
    # Most samples whose activations a rank holds; unset: its whole share. The gradient is the whole batch's.
    micro_batch: int | None = field(default=None, metadata=NOT_IN_DIGEST)
    deepspeed: str = "zero1"  # file of deepspeed_configs, or a path ending in .json

    validate_every_steps: int = 1_000  # also before the first step and after the last; 0: these two alone
    validate_every_epoch: bool = False  # also at the end of every pass over the corpus (A.3)
    # Which weights the stage ends with: the last ones, or those of the best mean recall while training (A.2).
    choose: Literal["last", "best"] = "last"
    choose_on: tuple[str, ...] = ()  # evaluation sets whose mean recall decides; empty: all of the run's
    salient_gain: float = 0.0  # points of mean recall by which a validation has to beat the last salient one
    patience: int = 0  # epochs since the last salient gain that end the stage (2.3); 0: never
    # What a loss or gradient that is not finite does: end the run, or leave that one batch out.
    on_non_finite: Literal["stop", "skip"] = field(default="stop", metadata=NOT_IN_DIGEST)
    # Longest time of a step before a rank ends the run; validations and checkpoints have 8 times that.
    stall_seconds: float = field(default=1_800.0, metadata=NOT_IN_DIGEST)
    save_every_steps: int = field(
        default=1_000, metadata=NOT_IN_DIGEST
    )  # optimizer steps between checkpoints
    keep_checkpoints: int = field(default=2, metadata=NOT_IN_DIGEST)  # newest left on disk, beside the best

    def check(self, stage: str) -> None:
        """Raise ConfigError for values that are each well typed but cannot train."""
        positive = (
            "epochs global_batch peak_learning_rate context_length lanes window_shards ranks"
            " threads_per_rank save_every_steps keep_checkpoints stall_seconds"
        )
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ConfigError(f"[{stage}] {name} = {getattr(self, name)}: must be above 0")
        for name in ("warmup_steps", "weight_decay", "patience", "salient_gain", "validate_every_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"[{stage}] {name} = {getattr(self, name)}: must not be negative")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"[{stage}] {name} = {getattr(self, name)}: must be from 0 to below 1")
        if self.adam_eps <= 0:
            raise ConfigError(f"[{stage}] adam_eps = {self.adam_eps}: must be above 0")
        if self.max_gradient_norm is not None and self.max_gradient_norm <= 0:
            raise ConfigError(f"[{stage}] max_gradient_norm = {self.max_gradient_norm}: must be above 0")
        if self.cached_views < 0:
            raise ConfigError(f"[{stage}] cached_views = {self.cached_views}: must not be negative")
        if self.cached_views and not self.lock_image:
            raise ConfigError(
                f"[{stage}] cached_views = {self.cached_views}: features can be kept only of an image tower"
                " that stays as it is; set lock_image = true or cached_views = 0"
            )
        if self.compile_image and not self.lock_image:
            raise ConfigError(
                f"[{stage}] compile_image = true: only a tower that stays as it is runs compiled; set"
                " lock_image = true or leave compile_image out"
            )
        self.augment.check(stage)
        self._check_extras(stage)
        if self.micro_batch is not None and self.micro_batch <= 0:
            raise ConfigError(f"[{stage}] micro_batch = {self.micro_batch}: must be above 0")
        if self.max_temperature < 1:
            raise ConfigError(f"[{stage}] max_temperature = {self.max_temperature}: must be at least 1")
        if self.context_length < 3:
            raise ConfigError(
                f"[{stage}] context_length = {self.context_length}: [CLS] and [SEP] leave no caption"
            )
        self._check_deepspeed(stage)
        if self.global_batch % self.lanes:
            raise ConfigError(
                f"[{stage}] global_batch = {self.global_batch} is no multiple of lanes = {self.lanes}:"
                f" every step takes the same number of samples from each lane; change one of them"
            )
        if self.ranks > self.lanes:
            raise ConfigError(
                f"[{stage}] ranks = {self.ranks} is more than lanes = {self.lanes}:"
                f" a rank owns whole lanes; raise lanes or use fewer ranks"
            )

    def _check_deepspeed(self, stage: str) -> None:
        try:
            settings = read_deepspeed_file(self.deepspeed)
        except ConfigError as error:
            raise ConfigError(f"[{stage}] {error}") from None
        if self.compile_image and settings.get("zero_optimization", {}).get("stage") == 3:
            raise ConfigError(
                f"[{stage}] compile_image = true, but {self.deepspeed} is ZeRO 3: it gathers weights while"
                " the model runs, which cannot be compiled; take a lower stage or leave compile_image out"
            )

    def _check_extras(self, stage: str) -> None:
        if not 0 <= self.patch_mask < 1:
            raise ConfigError(f"[{stage}] patch_mask = {self.patch_mask}: a share from 0 to below 1")
        for name, wants_pictures in (
            ("patch_mask", self.patch_mask > 0),
            ("distil", self.distil is not None),
        ):
            if self.cached_views and wants_pictures:
                raise ConfigError(
                    f"[{stage}] {name} needs pictures, but cached_views = {self.cached_views} reads features"
                    f" in their place; set cached_views = 0 or leave {name} out"
                )
        if self.distil is not None and (self.distil.weight <= 0 or self.distil.temperature <= 0):
            raise ConfigError(f"[{stage}] distil: weight and temperature must be above 0")
        if self.negation is not None:
            wrong = [
                text for text in (*self.negation.affirmed, *self.negation.negated) if text.count("{}") != 1
            ]
            if wrong:
                raise ConfigError(f"[{stage}] negation: template {wrong[0]!r}: must hold {{}} once")
            if not self.negation.affirmed or not self.negation.negated:
                raise ConfigError(f"[{stage}] negation: affirmed and negated need a template each")
            if len(set(self.negation.objects)) < 2 or "" in self.negation.objects:
                raise ConfigError(f"[{stage}] negation: objects: at least two different words, none empty")
            if self.negation.weight <= 0:
                raise ConfigError(f"[{stage}] negation: weight = {self.negation.weight}: must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """Everything a rank needs, written as one JSON file by whoever launches the ranks."""

    stage: str  # name in messages: english, stage1, stage2
    model: str  # key of training.model.config.MODELS
    seed: int  # of the order of samples, the augmentation, dropout and new weights
    shards: tuple[Shard, ...]  # tars in order, each with its .parquet sidecar beside it
    vocabulary: str  # path or model id that Tokenizer.load takes
    image_weights: str | None = None  # weights of any known format that give a new model its image tower
    text_weights: str | None = None  # the same for the text tower
    start_checkpoint: str | None = None  # our safetensors of the stage before
    start_weights: str | None = None  # a whole Chinese CLIP of any known format to go on from
    config: TrainConfig
    evaluations: Mapping[str, str] = field(default_factory=dict)  # name → folder, for whoever validates
    folder: str  # checkpoints/, metrics.jsonl, log.jsonl and tokens/ go here
    output_model: str  # the consolidated weights, written last
    openai_model: str | None = None  # where to write them in OpenAI CLIP's layout too

    def to_json(self) -> str:
        """The text of a job's file; `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Read a job; ConfigError names `where` (its file) and the key."""
        return build(cls, json.loads(text), where)


def check_fits(config: TrainConfig, model: ModelConfig, stage: str) -> None:
    """Raise ConfigError where a model cannot be trained so: captions too long for it, or its precision."""
    check_model(config.deepspeed, model, stage)
    if config.context_length > model.text.max_positions:
        raise ConfigError(
            f"[{stage}] context_length = {config.context_length}, but {model.name} has"
            f" {model.text.max_positions} positions"
        )


def count_steps(config: TrainConfig, num_samples: int, stage: str) -> int:
    """Number of optimizer steps of a stage over `num_samples`; ConfigError where there is none."""
    if config.ranks > num_samples:
        raise ConfigError(f"[{stage}] ranks = {config.ranks}, but the corpus has {num_samples} samples")
    if config.global_batch > num_samples:
        raise ConfigError(
            f"[{stage}] global_batch = {config.global_batch}, but the corpus has {num_samples} samples:"
            f" lower global_batch (and lanes, which divides it)"
        )
    return config.epochs * num_samples // config.global_batch


def paper_recipe(model: str, stage: Literal["stage1", "stage2"]) -> TrainConfig:
    """How the paper pretrained a model (Table 8, A.2); ConfigError where it did not."""
    name = "training/recipes/pretrain.toml"
    recipes = _read_recipes("pretrain")
    common, stages = recipes.pop("common"), {key: recipes.pop(key) for key in ("stage1", "stage2")}
    own: dict[str, Any] = recipes.get(model, {})
    if stage not in own:
        trained = ", ".join(key for key, table in recipes.items() if stage in table)
        raise ConfigError(f"{name}: the paper has no {stage} of {model!r}; it has that of {trained}")
    of_all_stages = {key: value for key, value in own.items() if key not in stages}
    return build(TrainConfig, {**common, **stages[stage], **of_all_stages, **own[stage]}, name)


def finetune_recipe(model: str, data: str) -> TrainConfig:
    """How the paper finetuned a model on `muge`, `flickr30k-cn`, `coco-cn` or `icr` (Table 9, A.3, A.4).

    ConfigError where it did not.
    """
    name = "training/recipes/finetune.toml"
    recipes, pretraining = _read_recipes("finetune"), _read_recipes("pretrain")
    common, data_sets = recipes.pop("common"), recipes.pop("data")
    own: dict[str, Any] = recipes.get(model, {})
    if data not in own:
        known = [
            f"{key} on {found}" for key, table in recipes.items() for found in table if found in data_sets
        ]
        raise ConfigError(
            f"{name}: the paper has no finetuning of {model!r} on {data!r}; it has {', '.join(known)}"
        )
    backbone = {key: value for key, value in pretraining[model].items() if key.startswith("adam_")}
    of_all_data = {key: value for key, value in own.items() if key not in data_sets}
    tables = (pretraining["common"], backbone, common, data_sets[data], of_all_data, own[data])
    return build(TrainConfig, {key: value for table in tables for key, value in table.items()}, name)


def pretrained_stages(model: str) -> list[Literal["stage1", "stage2"]]:
    """The stages in which the paper pretrained a model; none for a model that is not the paper's."""
    stages: tuple[Literal["stage1", "stage2"], ...] = ("stage1", "stage2")
    recipes = _read_recipes("pretrain")
    return [stage for stage in stages if stage in recipes.get(model, {})]


def finetuned_data(model: str) -> list[str]:
    """The data sets that the paper finetuned a model on, as `finetune_recipe` takes them."""
    recipes = _read_recipes("finetune")
    return [data for data in recipes["data"] if data in recipes.get(model, {})]


def _read_recipes(name: Literal["pretrain", "finetune"]) -> dict[str, Any]:
    return tomllib.loads((resources.files("training.recipes") / f"{name}.toml").read_text("utf-8"))
