"""A model ready to turn texts and images into features: the one place where evaluation loads weights."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eval.datasets.classification import EncodedImage
from eval.datasets.cnclip_tsv import RetrievalSet
from eval.datasets.readable import refuse
from eval.features.layout import check_vectors
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.config import find_recipe, read_run
from pipeline.core.files.images import BadImageError, Decode
from pipeline.core.records import ConfigError, InputError
from pipeline.core.stage import Show, show_nothing
from training.config.train import CONTEXT_LENGTH
from training.weights.hub.locate import locate
from training.weights.hub.names import PUBLISHED, find_id, is_name

if TYPE_CHECKING:
    from training.data.squares import ImageRange
    from training.encoder import Encoder as TextAndImageEncoder
    from training.image_encoder import Precision

BATCH_SIZE = 64  # images that a CPU encodes at once
_RESOLVED = "run.resolved.toml"  # in a run's folder
_STAGES = ("stage1", "stage2", "finetune")  # that end in a model, in order


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to load: weights, vocabulary, and how texts are cut."""

    path: str
    vocabulary: str | None  # what `Tokenizer.load` takes; unset, it is looked for
    context_length: int  # tokens with [CLS] and [SEP]
    run_folder: str | None = None  # of the run that trained it, if a run was given, or a file in one
    decode: Decode = "upright"  # how images other than 8-bit RGB are decoded
    precision: "Precision" = "float32"  # in which matrices are multiplied
    origin: str | None = None  # id of exactly these weights, if a name stood for them

    @property
    def is_finetuned(self) -> bool:
        """Return whether it is a run's finetuned model; false for weights without a run."""
        return self.run_folder is not None and os.path.basename(os.path.dirname(self.path)) == "finetune"


@dataclass(frozen=True, slots=True)
class EvaluationEncoder:
    """Both towers with what evaluation does to them: texts cut at a length, unreadable images left out."""

    base: "TextAndImageEncoder"
    context_length: int
    batch_size: int  # images that are encoded at once
    show: Show = show_nothing  # draws how far a set's images and texts are

    @property
    def name(self) -> str:
        return self.base.model.config.name

    @property
    def logit_scale(self) -> float:
        """The factor on cosine similarities, exp of the learned parameter."""
        return float(self.base.model.logit_scale.detach().exp())

    def num_parameters(self) -> tuple[int, int]:
        """Return the parameters of everything, and of the image tower."""
        model = self.base.model
        return (
            sum(tensor.numel() for tensor in model.parameters()),
            sum(tensor.numel() for tensor in model.visual.parameters()),
        )

    def encode(self, evaluation: RetrievalSet) -> tuple[Float32Array, Float32Array]:
        """Return image_ND and text_ND of a retrieval set, in its order of rows.

        Raises:
            UnreadableImage: if an image cannot be decoded; it names the image's id.
        """
        images = evaluation.image_bytes(range(evaluation.num_images))
        progress, done = self.show(f"{evaluation.name}: images", "image"), 0
        progress(0, evaluation.num_images)
        features = list[Float32Array]()
        for feature_BD, left_out, num_images in self.base.image_features(images, batch_size=self.batch_size):
            refuse(evaluation, range(done, done + num_images), left_out)
            features.append(feature_BD)
            done += num_images
            progress(done, evaluation.num_images)
        image_ND: Float32Array = np.concatenate(features)
        tokens_NL = self.base.tokenizer.encode(evaluation.texts, self.context_length)
        return image_ND, self.base.embed_tokens(tokens_NL, self.show(f"{evaluation.name}: texts", "text"))

    def texts(self, texts: Sequence[str]) -> Float32Array:
        """Return unit-norm features [num_texts, dim].

        Raises:
            InputError: if there are no texts or a feature is NaN.
        """
        if not texts:
            raise InputError("no texts to encode")
        feature_ND = self.base.embed_texts(texts, context_length=self.context_length)
        check_vectors(feature_ND, "text features")
        return feature_ND

    def images(
        self, images: Sequence[EncodedImage], *, left_out: dict[int, str] | None = None
    ) -> tuple[Float32Array, Int64Array]:
        """Return unit-norm features of the images that can be decoded, and their rows among those given.

        `left_out` takes the rows of the others with the reasons.

        Raises:
            InputError: if none can be decoded.
        """
        bad = dict[int, str]() if left_out is None else left_out
        progress = self.show("images", "image")
        progress(0, len(images))
        feature_ND, kept_N = self.encoded_images(
            map(_read, images), left_out=bad, progress=lambda done: progress(done, len(images))
        )
        if not len(kept_N):
            row, reason = next(iter(bad.items()))
            raise InputError(
                f"{images[row].path}: {reason}; none of {len(images)} images can be decoded: repair them or"
                " correct the folder"
            )
        return feature_ND, kept_N

    def encoded_images(
        self,
        encoded: "Iterable[bytes | ImageRange | BadImageError]",
        *,
        left_out: dict[int, str] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> tuple[Float32Array, Int64Array]:
        """Return what `images` does for bytes or places in tars, in turn; empty if none can be decoded.

        `progress` hears how many were read so far.
        """
        features, kept = list[Float32Array](), list[int]()
        first = 0
        for feature_BD, bad, num_images in self.base.image_features(encoded, batch_size=self.batch_size):
            features.append(feature_BD)
            kept += [first + row for row in range(num_images) if row not in bad]
            if left_out is not None:
                left_out |= {first + row: reason for row, reason in bad.items()}
            first += num_images
            progress(first)
        feature_ND = np.concatenate([np.empty((0, self.base.model.config.embed_dim), np.float32), *features])
        if kept:
            check_vectors(feature_ND, "image features")
        return feature_ND, np.array(kept, dtype=np.int64)

    def image(self, data: bytes) -> Float32Array:
        """Return the unit-norm feature [dim] of one encoded image.

        Raises:
            BadImageError: if it cannot be decoded.
        """
        feature_ND, left_out, _ = next(self.base.image_features([data]))
        if left_out:
            raise BadImageError(left_out[0])
        feature_D: Float32Array = feature_ND[0]
        return feature_D


def _read(image: EncodedImage) -> bytes | BadImageError:
    try:
        return image.read()
    except BadImageError as error:
        return error


def find_checkpoint(
    target: str, vocabulary: str | None, context_length: int | None, overrides: Sequence[str] = ()
) -> ModelSource:
    """Return what `target` names: a run's last trained stage, or weights.

    A run is given by its TOML, its folder or the name of a shipped recipe.
    Weights are a path, the name of a published model or a hub's id; the latter two are downloaded if need be.
    `overrides` are `--set` items for a run's file. Vocabulary and context length are those that the run was
    last resolved to.

    Raises:
        InputError: if a run has not trained yet, or weights cannot be had.
        ConfigError: for overrides of weights, and for a word that names nothing.
    """
    resolved_here = store.join(target, _RESOLVED)
    if os.path.isfile(resolved_here):  # a run's folder
        target = resolved_here
    is_word = os.path.basename(target) == target and "." not in target and not os.path.exists(target)
    if is_name(target) or not (target.endswith(".toml") or is_word):
        if overrides:
            raise ConfigError(f"--set {overrides[0]}: {target} is not a run's file; only these have settings")
        path, origin = locate(target)
        return ModelSource(
            path,
            vocabulary,
            context_length or CONTEXT_LENGTH,
            run_folder=_run_of(target),
            origin=None if origin == target else origin,
        )
    path = _find_run(target) if is_word else find_recipe(target)
    table = read_run(path, overrides)
    try:
        folder = str(table["run"]["folder"])
        resolved = store.join(folder, _RESOLVED)
        if os.path.isfile(resolved):
            table = read_run(resolved, overrides)
        model = table["model"]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: has no {error}; is it a run's file?") from None
    for stage in reversed(_STAGES):
        weights = store.join(folder, stage, "model.safetensors")
        if store.exists(weights):
            learned = store.join(folder, "vocabulary", "caption.txt")
            stages = [table[name] for name in _STAGES if isinstance(table.get(name), dict)]
            lengths = [stage.get("context_length", CONTEXT_LENGTH) for stage in stages]
            return ModelSource(
                weights,
                vocabulary or model.get("vocabulary") or learned,
                context_length or max(lengths, default=CONTEXT_LENGTH),
                folder,
            )
    raise InputError(f"{folder}: holds no trained stage; run `cnclip run {target}` first")


def _run_of(target: str) -> str | None:
    """Return the folder of the run that a weights file lies in, if it does."""
    stage = os.path.dirname(os.path.abspath(target))
    folder = os.path.dirname(stage)
    is_in_run = os.path.basename(stage) in _STAGES and os.path.isfile(store.join(folder, _RESOLVED))
    return folder if is_in_run and os.path.isfile(target) else None


def _find_run(word: str) -> str:
    """Return the path of a shipped recipe; the error for another word suggests weights too."""
    try:
        return find_recipe(word)
    except ConfigError as error:
        try:
            find_id(word)  # says what is near
        except InputError as suggestion:
            if "did you mean" in str(suggestion):
                raise ConfigError(str(suggestion)) from None
        raise ConfigError(
            f"{error}; or weights: a path, {', '.join(PUBLISHED)}, or a hub's owner/name"
        ) from None


def load_encoder(
    checkpoint: ModelSource, *, batch_size: int | None = None, device: str | None = None, many: bool = False
) -> EvaluationEncoder:
    """Load weights of any format that `training.weights.formats` reads.

    The model is on the accelerator if there is one.

    `device` is torch's name of another one. With `many` images to come, torch compiles the model for a GPU.

    Raises:
        ConfigError: if the model has fewer positions than the context length.
    """
    from training.encoder import load

    base = load(
        checkpoint.path,
        vocabulary=checkpoint.vocabulary,
        device=device,
        decode=checkpoint.decode,
        precision=checkpoint.precision,
        many=many,
    )
    positions = base.model.config.text.max_positions
    if not 3 <= checkpoint.context_length <= positions:
        raise ConfigError(
            f"--context {checkpoint.context_length}: {checkpoint.path} takes 3 to {positions} tokens"
        )
    fitting = max(BATCH_SIZE, base.images_per_batch)
    return EvaluationEncoder(base, checkpoint.context_length, batch_size or fitting)
