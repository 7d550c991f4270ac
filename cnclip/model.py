"""`cnclip.load`: loads a model that embeds, compares and classifies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.arrays import Float32Array

if TYPE_CHECKING:
    from PIL import Image

    from eval.features.encoder import ModelSource
    from pipeline.core.files.images import Decode
    from training.encoder import Encoder
    from training.image_encoder import Precision

    ImageLike = str | bytes | Image.Image  # a path, the bytes of a file, or a decoded image

PROMPT = "一张{}的照片。"


@dataclass(frozen=True, slots=True)
class Classification:
    """The result of `Model.classify`.

    `probability_NC` has shape [N, C], float32, in the order of the images and of `classes`; rows sum to 1.
    """

    classes: tuple[str, ...]
    probability_NC: Float32Array

    @property
    def best(self) -> list[str]:
        """Return the most probable class of each image, N names."""
        return [self.classes[column] for column in self.probability_NC.argmax(axis=1)]


class Model:
    """A Chinese CLIP model with its vocabulary on one device.

    Use `load` to get one.
    """

    def __init__(self, encoder: "Encoder", source: "ModelSource") -> None:
        self.encoder = encoder
        self.source = source

    def __repr__(self) -> str:
        return f"cnclip.Model({self.source.path!r}, dim={self.dim}, device={self.encoder.device!r})"

    @property
    def dim(self) -> int:
        """Return the width D of the features."""
        return int(self.encoder.model.config.embed_dim)

    @property
    def image_size_px(self) -> int:
        """Return the side of the image tower's square input, in pixels."""
        return self.encoder.image_size_px

    def embed_images(self, images: "Sequence[ImageLike]") -> Float32Array:
        """Return image_ND: float32, unit-norm rows, in the order of the images.

        Raises:
            InputError: if an image cannot be decoded; it names the file or the position in the list.
        """
        return self.encoder.embed_images(images)

    def embed_texts(self, texts: Sequence[str]) -> Float32Array:
        """Return text_ND: float32, unit-norm rows, in the order of the texts.

        Texts longer than the model's context are truncated, and a warning gives their number.
        """
        return self.encoder.embed_texts(texts, context_length=self.source.context_length)

    def similarity(
        self, images: "Float32Array | Sequence[ImageLike]", texts: Float32Array | Sequence[str]
    ) -> Float32Array:
        """Return cosine_MN of M images and N texts, each as features or as inputs of `embed_*`."""
        image_MD, text_ND = self._images(images), self._texts(texts)
        if image_MD.shape[1:] != text_ND.shape[1:]:
            raise ValueError(
                f"images of shape {image_MD.shape} and texts of shape {text_ND.shape} are of different models"
            )
        cosine_MN: Float32Array = image_MD @ text_ND.T
        return cosine_MN

    def classify(
        self,
        images: "Float32Array | Sequence[ImageLike]",
        classes: Sequence[str],
        templates: Sequence[str] = (PROMPT,),
    ) -> Classification:
        """Classify images zero-shot (paper, section 2.1): softmax over the classes of scaled cosines.

        A class is the normalised mean of its unit features over `templates`, each of which has `{}` for the
        name.

        Raises:
            ValueError: if `classes` or `templates` is empty, or a template has no `{}`.
        """
        from eval.datasets.labels import prompts
        from eval.zeroshot.classifier import class_vectors

        if isinstance(classes, str) or isinstance(templates, str):
            raise ValueError("classes and templates are lists of texts, not one text")
        if not classes or not templates:
            raise ValueError("give at least one class and one template")
        if without := [template for template in templates if "{}" not in template]:
            raise ValueError(f"template {without[0]!r} has no {{}} for the name of the class")
        text_CTD = self._texts(prompts(classes, templates)).reshape(len(classes), len(templates), -1)
        vector_CD = class_vectors(text_CTD, "features")
        return Classification(
            tuple(classes), self.encoder.probabilities(self._images(images), vector_CD).astype(np.float32)
        )

    def _images(self, images: "Float32Array | Sequence[ImageLike]") -> Float32Array:
        if isinstance(images, str | bytes):
            raise ValueError("images is a list of images, not one image")
        return images if isinstance(images, np.ndarray) else self.embed_images(images)

    def _texts(self, texts: Float32Array | Sequence[str]) -> Float32Array:
        if isinstance(texts, str):
            raise ValueError("texts is a list of texts, not one text")
        return texts if isinstance(texts, np.ndarray) else self.embed_texts(texts)


def load(
    name_or_path: str,
    *,
    device: str | None = None,
    vocabulary: str | None = None,
    context_length: int | None = None,
    decode: "Decode" = "upright",
    precision: "Precision" = "float32",
) -> Model:
    """Load a model: weights of any known format, or the last trained stage of a run's TOML.

    Args:
        name_or_path: weights (a file, a folder, a name or a hub id), a run's TOML, or the name of a shipped
            recipe that has run.
        device: torch's name of the device, such as "cuda:1" (default: an accelerator, otherwise the CPU).
        vocabulary: a vocab.txt, its folder or a model id (default: the run's, or found automatically).
        context_length: most tokens of a text, including [CLS] and [SEP] (default: the run's, or 52).
        decode: "upright" (EXIF rotation, 16 bits scaled, transparency on white), or "reference" for the
            decoding of Chinese CLIP's published code.
        precision: "float32", or "bf16" for matrix products on a GPU that keep three digits of a feature.

    Raises:
        InputError, ConfigError: one line that names the file and says what to do.
    """
    from dataclasses import replace

    from eval.features.encoder import find_checkpoint, load_encoder

    source = find_checkpoint(name_or_path, vocabulary, context_length)
    source = replace(source, decode=decode, precision=precision)
    return Model(load_encoder(source, device=device).base, source)


def score(
    model: Model | str, images: "Sequence[ImageLike]", captions: Sequence[str], *, batch_size: int = 256
) -> Float32Array:
    """Return cosine_N of N pairs: image i with caption i, float32, -1 to 1.

    Memory holds the features of one batch of pairs.

    Raises:
        ValueError: if the numbers of images and captions differ.
        InputError: if an image cannot be decoded.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: give pairs")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: give at least 1")
    loaded = load(model) if isinstance(model, str) else model
    cosine_N = np.empty(len(images), np.float32)
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        image_BD, text_BD = loaded.embed_images(images[rows]), loaded.embed_texts(captions[rows])
        cosine_N[rows] = np.einsum("bd,bd->b", image_BD, text_BD)
    return cosine_N
