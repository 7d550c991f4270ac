"""What a run may say about training. No heavy imports here."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from pipeline.core.config import BINDS_EXACTLY, BINDS_NEVER, BINDS_ONCE_DONE, NOT_IN_DIGEST
from pipeline.core.records import ConfigError, too_few
from training.config.deepspeed_file import check_model, read_deepspeed_file
from training.model.config import ModelConfig

CONTEXT_LENGTH = 52  # tokens of a caption with [CLS] and [SEP] (Table 8: 50 without)

PositiveInt = Annotated[int, Gt(0)]
NotNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """How an image is changed before a step sees it. The defaults are the paper's and CN-CLIP's (A.2).

    What the paper does not have is off by default. It is for small corpora of drawn images on white.
    """

    crop_area: tuple[PositiveShare, PositiveShare] = (
        0.9,
        1.0,
    )  # share of the image's area a random crop keeps (A.2)
    crop_aspect: tuple[Positive, Positive] = (0.75, 4 / 3)  # width / height of that crop, in pixels
    horizontal_flip: Probability = 0.5  # probability; 0 if captions speak of left and right
    auto_augment: Literal["none", "original"] = "original"  # Cubuk et al. 2019 (A.2); it changes colours
    zoom: tuple[Positive, Positive] = (
        1.0,
        1.0,
    )  # factor on the content's size; under 1 leaves white around it
    stretch: NotNegative = 0.0  # largest logarithm of the change of width / height, either way
    rotation_degrees: NotNegative = 0.0  # largest turn, either way
    shear_degrees: NotNegative = 0.0  # largest slant, either way
    translation: NotNegative = 0.0  # largest shift along each axis, share of the side, either way
    brightness: NotNegative = 0.0  # factor on pixel values is 1 ± this
    contrast: NotNegative = 0.0  # factor on the distance to the mean luma is 1 ± this
    saturation: NotNegative = 0.0  # factor on the distance to each pixel's luma is 1 ± this
    hue: NotNegative = 0.0  # largest turn of the colour circle, in turns, either way
    colour_probability: Probability = 1.0  # of changing brightness, contrast, saturation and hue at all
    grey_probability: Probability = 0.0  # of dropping all colour
    erase_probability: Probability = 0.0  # of one colour over 2–20% of the area (Zhong et al. 2017)

    def __post_init__(self) -> None:
        for name in ("crop_area", "crop_aspect", "zoom"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}]: the smaller one comes first")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilConfig:
    """A larger model that a smaller one learns from (the paper's future work, section 5)."""

    teacher: str  # weights of any known format with both towers; the vocabulary is the student's
    weight: Positive = 1.0  # factor on the distillation loss, which is added to the contrastive loss
    temperature: Positive = 2.0  # both models' logits are divided by this; at 1 they stand as trained


@dataclass(frozen=True, slots=True, kw_only=True)
class NegationConfig:
    """Statements that an image shows a thing or does not, true and false (sections 3.2.3 and 5).

    A thing counts as shown if the caption names it and as absent if it does not: for corpora whose
    captions name all there is of `objects`.
    """

    objects: tuple[str, ...]  # words for things, such as 圆形; at least two
    affirmed: Annotated[tuple[str, ...], MinLen(1)] = ("图中有{}", "有{}")  # templates; {} is the thing
    negated: Annotated[tuple[str, ...], MinLen(1)] = ("图中没有{}", "没有{}")
    weight: Positive = 1.0  # factor on the loss over true and false statements, added to the contrastive loss

    def __post_init__(self) -> None:
        for text in (*self.affirmed, *self.negated):
            if text.count("{}") != 1:
                raise ValueError(f"template {text!r}: must hold {{}} once")
        if len(set(self.objects)) < 2 or "" in self.objects:
            raise ValueError("objects: at least two different words, none empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training stage. The defaults are the paper's Table 8, ViT column."""

    # Passes over the corpus; the last incomplete batch of an epoch carries over (A.2). May be raised later
    # from a checkpoint of the warm-up: the cosine after it depends on them.
    epochs: PositiveInt = field(metadata=BINDS_EXACTLY)
    global_batch: PositiveInt = 32_768  # samples an optimizer step sees over all ranks (Table 8)
    peak_learning_rate: Positive = 1e-4  # reached after the warm-up, then a cosine to 0 (Table 8)
    warmup_steps: NotNegativeInt = 5_000  # steps of linear warm-up (Table 8)
    weight_decay: NotNegative = 1e-3  # decoupled, on weight matrices and embeddings only (Table 8)
    adam_beta1: BelowOne = 0.9  # (Table 8)
    adam_beta2: BelowOne = 0.98  # 0.999 for a ResNet (Table 8)
    adam_eps: Positive = 1e-6  # 1e-8 for a ResNet (Table 8)
    max_gradient_norm: Positive | None = None  # longer gradients are shortened to this; the paper has none
    max_temperature: Annotated[float, Ge(1)] = 100.0  # the logits' scale is clamped to 1…this (Table 8)
    lock_image: bool = False  # stage 1: the image tower stays as it is, byte for byte (2.3)
    # torch compiles the locked tower: some 20 seconds at each start, then an image takes less time.
    compile_image: bool = field(default=False, metadata=NOT_IN_DIGEST)
    cached_views: NotNegativeInt = (
        0  # augmented views of an image whose features are computed once; 0: every time anew
    )
    # Both towers recompute activations in the backward pass (A.2).
    checkpoint_activations: bool = field(default=False, metadata=NOT_IN_DIGEST)
    context_length: Annotated[int, Ge(3)] = CONTEXT_LENGTH  # tokens of a caption with [CLS] and [SEP]
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # images (A.2)
    caption_column: str = "caption"  # column of the shards' sidecars
    exclude_duplicates: bool = False  # pairs of equal image or caption are no negatives of each other
    patch_mask: BelowOne = (
        0.0  # share of a ViT's patches left out at random in training (FLIP, Li et al. 2023)
    )
    distil: DistilConfig | None = None  # a teacher whose similarities the model learns too
    negation: NegationConfig | None = None  # statements with absent objects as hard negatives

    lanes: PositiveInt = 512  # streams the corpus is cut into; divides global_batch, at least ranks
    window_shards: PositiveInt = 4  # shards of a lane whose samples are shuffled together
    # Processes; the batches do not depend on it.
    ranks: PositiveInt = field(default=1, metadata=BINDS_NEVER)
    threads_per_rank: PositiveInt = field(
        default=1, metadata=NOT_IN_DIGEST
    )  # threads that compute, and threads that decode
    # Most samples whose activations a rank holds; unset: its whole share. The gradient is the whole batch's.
    micro_batch: PositiveInt | None = field(default=None, metadata=NOT_IN_DIGEST)
    # File of deepspeed_configs, or a path ending in .json: memory, precision, communication.
    deepspeed: str = field(default="zero1", metadata=BINDS_NEVER)

    # Also before the first step and after the last; 0: only these two.
    validate_every_steps: NotNegativeInt = field(default=1_000, metadata=BINDS_ONCE_DONE)
    # Also at the end of every pass over the corpus (A.3).
    validate_every_epoch: bool = field(default=False, metadata=BINDS_ONCE_DONE)
    # Which weights the stage ends with: the last ones, or those of the best mean recall while training (A.2).
    choose: Literal["last", "best"] = field(default="last", metadata=BINDS_ONCE_DONE)
    # Evaluation sets whose mean recall decides; empty: all of the run's.
    choose_on: tuple[str, ...] = field(default=(), metadata=BINDS_ONCE_DONE)
    # Points of mean recall by which a validation has to beat the last salient one.
    salient_gain: NotNegative = field(default=0.0, metadata=BINDS_ONCE_DONE)
    # Epochs since the last salient gain that end the stage (2.3); 0: never.
    patience: NotNegativeInt = field(default=0, metadata=BINDS_ONCE_DONE)
    # What a loss or gradient that is not finite does: end the run, or leave that one batch out.
    on_non_finite: Literal["stop", "skip"] = field(default="stop", metadata=NOT_IN_DIGEST)
    # Longest time of a step before a rank ends the run; validations and checkpoints have 8 times that.
    stall_seconds: Positive = field(default=1_800.0, metadata=NOT_IN_DIGEST)
    save_every_steps: PositiveInt = field(
        default=1_000, metadata=NOT_IN_DIGEST
    )  # optimizer steps between checkpoints
    keep_checkpoints: PositiveInt = field(
        default=2, metadata=NOT_IN_DIGEST
    )  # newest left on disk, next to the best and the last of the warm-up

    def __post_init__(self) -> None:
        if self.cached_views and not self.lock_image:
            raise ValueError(
                f"cached_views = {self.cached_views}: features can be kept only of an image tower that stays"
                " as it is; set lock_image = true or cached_views = 0"
            )
        if self.compile_image and not self.lock_image:
            raise ValueError(
                "compile_image = true: only a tower that stays as it is runs compiled; set lock_image = true"
                " or leave compile_image out"
            )
        for name, wants_images in (("patch_mask", self.patch_mask > 0), ("distil", self.distil is not None)):
            if self.cached_views and wants_images:
                raise ValueError(
                    f"{name} needs images, but cached_views = {self.cached_views} reads features in their"
                    f" place; set cached_views = 0 or leave {name} out"
                )
        if self.global_batch % self.lanes:
            raise ValueError(
                f"global_batch = {self.global_batch} is no multiple of lanes = {self.lanes}: every step takes"
                " the same number of samples from each lane; change one of them"
            )
        if self.ranks > self.lanes:
            raise ValueError(
                f"ranks = {self.ranks} is more than lanes = {self.lanes}: a rank owns whole lanes; raise"
                " lanes or use fewer ranks"
            )


def check_fits(config: TrainConfig, model: ModelConfig, stage: str) -> None:
    """Check that a model can be trained so.

    Raises:
        ConfigError: if captions are too long for it, or the DeepSpeed file does not fit it or the stage.
    """
    try:
        settings = read_deepspeed_file(config.deepspeed)
    except ConfigError as error:
        raise ConfigError(f"[{stage}] {error}") from None
    if config.compile_image and settings.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            f"[{stage}] compile_image = true, but {config.deepspeed} is ZeRO 3: it gathers weights while the"
            " model runs, which cannot be compiled; take a lower stage or leave compile_image out"
        )
    check_model(config.deepspeed, model, stage)
    if config.context_length > model.text.max_positions:
        raise ConfigError(
            f"[{stage}] context_length = {config.context_length}, but {model.name} has"
            f" {model.text.max_positions} positions"
        )


def shared_steps(config: TrainConfig) -> int:
    """Return after how many steps a training is still the one that it would be with other `epochs`.

    The warm-up depends on no total, nor does the step after it, which has the peak learning rate
    (`training.engine.optim.learning_rate`). 0 without a warm-up: there is nothing worth returning to.
    """
    return config.warmup_steps + 1 if config.warmup_steps else 0


def count_steps(config: TrainConfig, num_samples: int, stage: str) -> int:
    """Return the number of optimizer steps of a stage over `num_samples`.

    Raises:
        ConfigError: if there is none.
    """
    if config.ranks > num_samples:
        found = f"[{stage}] ranks = {config.ranks}, but the corpus has {num_samples} samples"
        raise too_few(ConfigError(found), num_samples)
    if config.global_batch > num_samples:
        found = (
            f"[{stage}] global_batch = {config.global_batch}, but the corpus has {num_samples} samples:"
            f" lower global_batch (and lanes, which divides it)"
        )
        raise too_few(ConfigError(found), num_samples)
    return config.epochs * num_samples // config.global_batch
