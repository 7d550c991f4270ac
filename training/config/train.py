"""The settings of a training stage. No heavy imports here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from pipeline.core.config import (
    BINDS_EXACTLY,
    BINDS_NEVER,
    BINDS_ONCE_DONE,
    IN_DIGEST_IF_SET,
    NOT_IN_DIGEST,
    formerly,
)
from pipeline.core.records import ConfigError, too_few
from training.config.averages import AveragesConfig
from training.config.deepspeed_file import check_model, offloads_optimizer, read_deepspeed_file
from training.config.float8 import check_float8
from training.model.config import ModelConfig, at_size

_MOST_LANES = 512  # if the file does not set lanes
CONTEXT_LENGTH = 52  # tokens of a caption with [CLS] and [SEP] (Table 8: 50 without)

CaptionCut = Literal["end", "words", "random"]
PositiveInt = Annotated[int, Gt(0)]
NotNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """How training changes images. The defaults are the paper's and CN-CLIP's (A.2).

    What the paper does not have is off by default and is meant for small corpora of drawn images on white.
    """

    crop_area: tuple[PositiveShare, PositiveShare] = (0.9, 1.0)
    """Smallest and largest share of the image's area that a random crop keeps (A.2)."""
    crop_aspect: tuple[Positive, Positive] = (0.75, 4 / 3)
    """Smallest and largest ratio of width to height of that crop, in pixels."""
    horizontal_flip: Probability = 0.5
    """Probability of a flip; 0 if captions mention left and right."""
    auto_augment: Literal["none", "original"] = "original"
    """AutoAugment policy (Cubuk et al. 2019; A.2). It changes colours."""
    zoom: tuple[Positive, Positive] = (1.0, 1.0)
    """Smallest and largest factor on the content's size; below 1 leaves white around it."""
    stretch: NotNegative = 0.0
    """Largest change of the logarithm of width / height, in either direction."""
    rotation_degrees: NotNegative = 0.0
    """Largest rotation in either direction, in degrees."""
    shear_degrees: NotNegative = 0.0
    """Largest shear in either direction, in degrees."""
    translation: NotNegative = 0.0
    """Largest shift along each axis in either direction, as a share of the side."""
    brightness: NotNegative = 0.0
    """Largest relative change of pixel values: factors are 1 ± this."""
    contrast: NotNegative = 0.0
    """Largest relative change of the distance to the mean luma: factors are 1 ± this."""
    saturation: NotNegative = 0.0
    """Largest relative change of the distance to each pixel's luma: factors are 1 ± this."""
    hue: NotNegative = 0.0
    """Largest rotation of the hue circle in either direction, in turns."""
    colour_probability: Probability = 1.0
    """Probability that brightness, contrast, saturation and hue change at all."""
    grey_probability: Probability = 0.0
    """Probability of conversion to grey."""
    erase_probability: Probability = 0.0
    """Probability of erasing 2–20% of the area with one colour (Zhong et al. 2017)."""

    def __post_init__(self) -> None:
        for name in ("crop_area", "crop_aspect", "zoom"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}]: the smaller one comes first")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilConfig:
    """A larger model from which a smaller one learns (the paper's future work, section 5)."""

    teacher: str
    """Weights of any known format with both towers; the vocabulary must be the student's."""
    weight: Positive = 1.0
    """Factor on the distillation loss, which is added to the contrastive loss."""
    temperature: Positive = 2.0
    """Divisor of both models' logits; at 1 they stay as trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NegationConfig:
    """True and false statements that an image shows a thing or does not (sections 3.2.3 and 5).

    A thing counts as shown if the caption names it and as absent otherwise, so the captions of the corpus
    must name all the `objects` in their images.
    """

    objects: tuple[str, ...]
    """Words for things, such as 圆形; at least two."""
    affirmed: Annotated[tuple[str, ...], MinLen(1)] = ("图中有{}", "有{}")
    """Templates of statements that the image shows the thing, which replaces {}."""
    negated: Annotated[tuple[str, ...], MinLen(1)] = ("图中没有{}", "没有{}")
    """Templates of statements that the image does not show it."""
    weight: Positive = 1.0
    """Factor on the loss over true and false statements, which is added to the contrastive loss."""

    def __post_init__(self) -> None:
        for text in (*self.affirmed, *self.negated):
            if text.count("{}") != 1:
                raise ValueError(f"template {text!r}: must hold {{}} once")
        if len(set(self.objects)) < 2 or "" in self.objects:
            raise ValueError("objects: at least two different words, none empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseConfig:
    """A training before the stage's own, with smaller images or shorter captions (CLIPA, Li et al. 2023).

    What it does not set is as in the stage. Each phase has its own warm-up, cosine and optimizer, and its own
    folder, `<stage>_phase1` and so on; position embeddings are interpolated from one to the next.
    """

    epochs: PositiveInt
    """Passes over the corpus."""
    image_size_px: PositiveInt | None = None
    """Side of the images in pixels."""
    context_length: Annotated[int, Ge(3)] | None = None
    """Tokens of a caption, including [CLS] and [SEP]."""
    caption_cut: CaptionCut | None = None
    """Which words of a longer caption are kept."""
    patch_mask: BelowOne | None = None
    """Share of a ViT's patches that training drops at random."""
    global_batch: PositiveInt | None = None
    """Samples per optimizer step over all ranks; lanes are then derived from it."""
    micro_batch: PositiveInt | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Largest number of samples whose activations a rank holds at once."""
    peak_learning_rate: Positive | None = None
    """Learning rate after the warm-up."""
    warmup_steps: NotNegativeInt | None = None
    """Steps of linear warm-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training stage. The defaults are the paper's Table 8, ViT column."""

    epochs: PositiveInt = field(metadata=BINDS_EXACTLY)
    """Passes over the corpus; the last incomplete batch of an epoch carries over to the next (A.2). If you
    raise it later, training resumes from the warm-up, because the cosine after it depends on the number.
    """
    global_batch: PositiveInt = 32_768
    """Samples per optimizer step over all ranks (Table 8)."""
    optimizer: Literal["adamw", "muon"] = field(default="adamw", metadata=IN_DIGEST_IF_SET)
    """`adamw` for all weights (Table 8), or `muon` for the matrices of both towers (Jordan et al. 2024), with
    steps of AdamW's size (Liu et al. 2025), and AdamW for convolutions, embeddings, biases and gains.
    """
    peak_learning_rate: Positive = 1e-4
    """Learning rate after the warm-up; a cosine then takes it to 0 (Table 8)."""
    warmup_steps: NotNegativeInt = 5_000
    """Steps of linear warm-up (Table 8)."""
    weight_decay: NotNegative = 1e-3
    """Decoupled weight decay, on weight matrices and embeddings only (Table 8)."""
    adam_beta1: BelowOne = 0.9
    """Decay of Adam's mean of gradients (Table 8)."""
    adam_beta2: BelowOne = 0.98
    """Decay of Adam's mean of squared gradients; 0.999 for a ResNet (Table 8)."""
    adam_eps: Positive = 1e-6
    """Adam's epsilon; 1e-8 for a ResNet (Table 8)."""
    max_gradient_norm: Positive | None = None
    """Norm to which longer gradients are clipped. Unset: no clipping, as in the paper."""
    max_temperature: Annotated[float, Ge(1)] = 100.0
    """Upper limit of the logits' scale, which is clamped to 1 and above (Table 8)."""
    lock_image: bool = False
    """Whether the image tower stays as it is, byte for byte (stage 1; 2.3)."""
    compile: bool | None = field(default=None, metadata=formerly("compile_image", NOT_IN_DIGEST))
    """Whether torch compiles the towers' layers, which takes some time at each start. Unset: on a GPU."""
    cached_views: NotNegativeInt = 0
    """Augmented views of each image whose features are cached; 0 recomputes the features each time."""
    checkpoint_activations: bool = field(default=False, metadata=NOT_IN_DIGEST)
    """Whether both towers recompute activations in the backward pass (A.2)."""
    context_length: Annotated[int, Ge(3)] = CONTEXT_LENGTH
    """Tokens of a caption, including [CLS] and [SEP]."""
    caption_cut: CaptionCut = field(default="end", metadata=IN_DIGEST_IF_SET)
    """Which words of a longer caption are kept: the first ones (`end`), nouns, then verbs and adjectives,
    then others (`words`), or random ones (`random`).
    """
    image_size_px: PositiveInt | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Side of the images in pixels, a multiple of the patch's. Unset: the model's."""
    phases: tuple[PhaseConfig, ...] = field(default=(), metadata=IN_DIGEST_IF_SET)
    """Cheaper trainings before this one, in order."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training changes images (A.2)."""
    caption_column: str = "caption"
    """Caption column of the shards' sidecars."""
    caption_weights: Annotated[Mapping[str, Positive], MinLen(1)] | None = field(
        default=None, metadata=IN_DIGEST_IF_SET
    )
    """Several caption columns, and how often each is drawn, as in `{ caption = 3, caption_en = 1 }`. A sample
    without a caption in one has more of the others. Unset: only `caption_column`.
    """
    exclude_duplicates: bool = False
    """Whether pairs with the same image or caption are excluded from each other's negatives."""
    several_positives: bool = field(default=False, metadata=IN_DIGEST_IF_SET)
    """Whether pairs with the same image or caption are positives of each other (UniCL, Yang et al. 2022)."""
    loss: Literal["softmax", "sigmoid"] = field(default="softmax", metadata=IN_DIGEST_IF_SET)
    """The contrastive loss: cross-entropy over the batch (2.1), or a question of its own for each pair, with
    a bias that is learned (SigLIP, Zhai et al. 2023).
    """
    patch_mask: BelowOne = 0.0
    """Share of a ViT's patches that training drops at random (FLIP, Li et al. 2023)."""
    distil: DistilConfig | None = None
    """A teacher whose similarities the model also learns."""
    negation: NegationConfig | None = None
    """Statements about absent objects as hard negatives."""
    averages: AveragesConfig | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Averages of weights, scored next to the plain ones."""

    lanes: PositiveInt | None = None
    """Streams into which the corpus is split; must divide `global_batch` and be at least `ranks`. Unset: the
    largest divisor of `global_batch` up to 512.
    """
    window_shards: PositiveInt = 4
    """Shards of a lane whose samples are shuffled together."""
    ranks: PositiveInt = field(default=1, metadata=BINDS_NEVER)
    """Training processes; batches do not depend on their number."""
    threads_per_rank: PositiveInt = field(default=1, metadata=NOT_IN_DIGEST)
    """Threads of each rank for computing."""
    workers_per_rank: PositiveInt | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Processes of each rank that decode and augment images, several hundred a second each. Unset: as many as
    `threads_per_rank`.
    """
    micro_batch: PositiveInt | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Largest number of samples whose activations a rank holds at once. The gradient is still that of the
    whole batch. Unset: the rank's whole share.
    """
    cache_folder: str | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Folder for shards, checkpoints and logs of a run in an object store; best on a disk of each machine's
    own. Unset: this user's cache.
    """
    cache_gb: Positive = field(default=100.0, metadata=NOT_IN_DIGEST)
    """Most GB of an object store's shards that a machine keeps; two windows of each lane must fit."""
    deepspeed: str = field(default="zero1", metadata=BINDS_NEVER)
    """File of `deepspeed_configs/` or a path ending in `.json`: memory, precision, communication."""
    fp8: bool = field(default=False, metadata={**BINDS_NEVER, **IN_DIGEST_IF_SET})
    """Whether the towers' largest matrix products run in float8: on Hopper, Ada or newer, next to bf16."""

    validate_every_steps: NotNegativeInt = field(default=1_000, metadata=BINDS_ONCE_DONE)
    """Steps between validations; one before the first step and one after the last always take place. 0: only
    these two.
    """
    validate_every_epoch: bool = field(default=False, metadata=BINDS_ONCE_DONE)
    """Whether to validate also after each pass over the corpus (A.3)."""
    choose: Literal["last", "best"] = field(default="last", metadata=BINDS_ONCE_DONE)
    """Weights with which the stage ends: the last ones, or those with the best mean recall (A.2)."""
    choose_on: tuple[str, ...] = field(default=(), metadata=BINDS_ONCE_DONE)
    """Evaluation sets whose mean recall decides; empty: all of the run's sets."""
    salient_gain: NotNegative = field(default=0.0, metadata=BINDS_ONCE_DONE)
    """Points of mean recall by which a validation must beat the last salient one."""
    patience: NotNegativeInt = field(default=0, metadata=BINDS_ONCE_DONE)
    """Epochs without a salient gain after which the stage ends (2.3); 0: never."""
    on_non_finite: Literal["stop", "skip"] = field(default="stop", metadata=NOT_IN_DIGEST)
    """What to do about a loss or gradient that is not finite: stop the run, or skip the batch."""
    stall_seconds: Positive = field(default=1_800.0, metadata=NOT_IN_DIGEST)
    """Longest time of a step before a rank ends the run, in seconds; validations and checkpoints have 8 times
    as long.
    """
    save_every_steps: PositiveInt = field(default=1_000, metadata=NOT_IN_DIGEST)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: PositiveInt = field(default=2, metadata=NOT_IN_DIGEST)
    """Newest checkpoints to keep on disk, in addition to the best one and the last of the warm-up."""

    def __post_init__(self) -> None:
        if self.several_positives and self.exclude_duplicates:
            raise ValueError(
                "several_positives = true, but exclude_duplicates = true: pairs with the same image or"
                " caption cannot be positives of each other and left out; set one of them to false"
            )
        if self.patience and self.averages is not None and self.averages.last_steps:
            raise ValueError(
                f"averages.last_steps = {self.averages.last_steps}, but patience = {self.patience}: a stage"
                " that may end early does not know its last steps; leave one of them out"
            )
        if self.cached_views and not self.lock_image:
            raise ValueError(
                f"cached_views = {self.cached_views}: only features of a locked image tower can be cached;"
                " set lock_image = true or cached_views = 0"
            )
        for name, wants_images in (("patch_mask", self.patch_mask > 0), ("distil", self.distil is not None)):
            if self.cached_views and wants_images:
                raise ValueError(
                    f"{name} needs images, but cached_views = {self.cached_views} reads features instead;"
                    f" set cached_views = 0 or leave {name} out"
                )
        if self.lanes is None:
            # Set here, so that digests and jobs hold the number. It depends only on the batch, because the
            # order of samples must not depend on the number of ranks.
            object.__setattr__(self, "lanes", _largest_divisor(self.global_batch, _MOST_LANES))
            if self.ranks > self.num_lanes:
                raise ValueError(
                    f"ranks = {self.ranks} is more than {self.num_lanes}, the largest divisor of"
                    f" global_batch = {self.global_batch} up to {_MOST_LANES}: a rank owns whole lanes;"
                    " choose a global_batch that is a multiple of ranks, or set lanes"
                )
        if self.global_batch % self.num_lanes:
            raise ValueError(
                f"global_batch = {self.global_batch} is not a multiple of lanes = {self.lanes}: every step"
                " takes the same number of samples from each lane; change one of them"
            )
        if self.ranks > self.num_lanes:
            raise ValueError(
                f"ranks = {self.ranks} is more than lanes = {self.lanes}: a rank owns whole lanes; raise"
                " lanes or use fewer ranks"
            )

    @property
    def weight_of_columns(self) -> Mapping[str, float]:
        """Return the caption columns with the weights by which they are drawn."""
        return self.caption_weights or {self.caption_column: 1.0}

    @property
    def ends_by_recall(self) -> bool:
        """Return whether recall decides when the stage ends, or with which weights."""
        is_best = self.averages is not None and self.averages.use == "best"
        return self.choose == "best" or self.patience > 0 or is_best

    @property
    def num_workers(self) -> int:
        """Return how many processes of each rank decode."""
        return self.workers_per_rank or self.threads_per_rank

    @property
    def num_lanes(self) -> int:
        """Return the number of lanes: from the file, or derived from the batch."""
        assert self.lanes is not None  # __post_init__ has set it
        return self.lanes


def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that is at most `limit`."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def check_fits(config: TrainConfig, model: ModelConfig, stage: str) -> None:
    """Check that a model can be trained with these settings.

    Raises:
        ConfigError: if captions are too long for the model, or the DeepSpeed file does not suit it or the
            stage.
    """
    try:
        settings = read_deepspeed_file(config.deepspeed)
    except ConfigError as error:
        raise ConfigError(f"[{stage}] {error}") from None
    try:
        model = sized(model, config)
    except ValueError as error:
        raise ConfigError(f"[{stage}] image_size_px: {error}") from None
    if config.compile and settings.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            f"[{stage}] compile = true, but {config.deepspeed} is ZeRO 3: it gathers weights while the model"
            " runs, which cannot be compiled; use a lower stage or leave compile out"
        )
    if config.averages is not None and settings.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            f"[{stage}.averages] with {config.deepspeed}, which is ZeRO 3: no rank has whole weights to"
            " average; use a lower stage or leave averages out"
        )
    if config.optimizer == "muon":
        zero = settings.get("zero_optimization", {})
        if zero.get("stage") == 3 or offloads_optimizer(zero):
            raise ConfigError(
                f'[{stage}] optimizer = "muon", but {config.deepspeed} is ZeRO 3 or keeps the optimizer in'
                " host memory: Muon needs whole matrices on the device; use zero1 or zero2, or the optimizer"
                " adamw"
            )
    check_model(config.deepspeed, model, stage)
    if config.fp8:
        check_float8(config.deepspeed, model, locks_image=config.lock_image, stage=stage)
    if config.context_length > model.text.max_positions:
        raise ConfigError(
            f"[{stage}] context_length = {config.context_length}, but {model.name} has"
            f" {model.text.max_positions} positions"
        )


def sized(model: ModelConfig, config: TrainConfig) -> ModelConfig:
    """Return a model at the size of a training's images.

    Raises:
        ValueError: if the size is no multiple of the patch's.
    """
    return model if config.image_size_px is None else at_size(model, config.image_size_px)


def shared_steps(config: TrainConfig) -> int:
    """Return the number of first steps that do not depend on `epochs`.

    The warm-up does not depend on the total, nor does the step after it, which has the peak learning rate
    (`training.engine.optim.learning_rate`). Return 0 without a warm-up: a checkpoint at step 0 saves nothing.
    """
    return config.warmup_steps + 1 if config.warmup_steps else 0


def count_steps(config: TrainConfig, num_samples: int, stage: str) -> int:
    """Return the number of optimizer steps of a stage over `num_samples`.

    Raises:
        ConfigError: if the corpus does not fill a batch or has fewer samples than ranks.
    """
    if config.ranks > num_samples:
        found = f"[{stage}] ranks = {config.ranks}, but the corpus has {num_samples} samples"
        raise too_few(ConfigError(found), num_samples)
    if config.global_batch > num_samples:
        found = (
            f"[{stage}] global_batch = {config.global_batch}, but the corpus has {num_samples} samples:"
            f" lower global_batch (and lanes, if the file sets it)"
        )
        raise too_few(ConfigError(found), num_samples)
    return config.epochs * num_samples // config.global_batch
