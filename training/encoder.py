"""Features in a few lines: load any weights, embed images and captions, compare them.

from training.model.encoder import load
model = load("clip_cn_vit-b-16.pt")
images = model.embed_images(["cat.jpg", "dog.jpg"])
texts = model.embed_texts(["一只猫", "一只狗", "一辆汽车"])
print(model.probabilities(images, texts))
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from pipeline.core.arrays import Float32Array, Int32Array, Int64Array
from pipeline.core.files.image_files import read_image
from pipeline.core.files.images import BadImageError, Decode
from pipeline.core.records import InputError
from pipeline.core.stage import Progress
from training.config.train import CONTEXT_LENGTH
from training.model.clip import CLIP
from training.model.preprocess import preprocess_readable
from training.model.tokenizer import Tokenizer
from training.weights.formats import load_model
from training.weights.hub.locate import local_path
from training.weights.vocabulary_lookup import find_vocabulary

ImageSource = str | bytes | Image.Image  # path or URL, encoded bytes, or decoded

IMAGES_PER_BATCH = 32
TOKENS_PER_BATCH = 2048  # of texts, counted without padding
TOKENS_PER_BATCH_ACCELERATED = 32_768  # fewer would leave it waiting for the host


class Encoder:
    """A model with its vocabulary, on one device."""

    def __init__(
        self, model: CLIP, tokenizer: Tokenizer, *, device: str | None = None, decode: Decode = "upright"
    ) -> None:
        """Put a model on a device.

        `device` is as torch names it; unset, the accelerator if there is one, else the CPU.

        `decode` says how images other than 8-bit RGB are decoded (`pipeline.core.files.images`).

        Raises:
            InputError: if the vocabulary is of another size than the model's embedding.
        """
        if tokenizer.vocab_size != model.config.text.vocab_size:
            raise InputError(
                f"{tokenizer.origin}: a vocabulary of {tokenizer.vocab_size} tokens, but the model's"
                f" embedding has {model.config.text.vocab_size}: give the vocabulary that it was trained with"
            )
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.eval().to(self.device)
        self.tokenizer = tokenizer
        self.decode = decode

    @property
    def image_size_px(self) -> int:
        return self.model.config.vision.image_size_px

    def embed_images(
        self, images: Sequence[ImageSource], *, names: Sequence[str] | None = None
    ) -> Float32Array:
        """Return image_ND, unit-norm, of files, bytes or PIL images.

        `names` are what an error calls them; unset, by their paths or their places.

        Raises:
            InputError: if one is not an image; it names the image.
        """
        features = [np.empty((0, self.model.config.embed_dim), np.float32)]
        for start in range(0, len(images), IMAGES_PER_BATCH):
            feature_BD, left_out = self.embed_readable(images[start : start + IMAGES_PER_BATCH])
            for row, reason in left_out.items():
                image, number = images[start + row], start + row
                unnamed = image if isinstance(image, str) else f"image {number + 1} of {len(images)}"
                name = names[number] if names else unnamed
                raise InputError(f"{name}: no image that can be decoded: {reason}")
            features.append(feature_BD)
        return np.concatenate(features)

    def embed_readable(
        self, images: Sequence[ImageSource | BadImageError]
    ) -> tuple[Float32Array, dict[int, str]]:
        """Return image_ND, unit-norm, of images that can be read, and the rows of the others with reasons."""
        features = [np.empty((0, self.model.config.embed_dim), np.float32)]
        left_out = dict[int, str]()
        for start in range(0, len(images), IMAGES_PER_BATCH):
            encoded = [_encoded(image) for image in images[start : start + IMAGES_PER_BATCH]]
            image_BCHW, bad = preprocess_readable(encoded, self.image_size_px, self.decode)
            if len(image_BCHW):
                features.append(self.embed_pixels(image_BCHW))
            left_out |= {start + row: reason for row, reason in bad.items()}
        return np.concatenate(features), left_out

    def embed_pixels(self, image_BCHW: torch.Tensor) -> Float32Array:
        """Return image_BD, unit-norm, of preprocessed images."""
        with torch.inference_mode():
            image_BD: Float32Array = self.model.encode_image(image_BCHW.to(self.device)).cpu().numpy()
        return image_BD

    def embed_texts(self, texts: Sequence[str], *, context_length: int = CONTEXT_LENGTH) -> Float32Array:
        """Return text_ND, unit-norm, of texts of any lengths; no padding is ever computed on.

        A text of more than `context_length` tokens is cut there, and a warning says how many were.

        Raises:
            ValueError: if the model has fewer positions than `context_length`.
        """
        tokens_NL, cut = self.tokenizer.encode_counting(texts, self._checked(context_length))
        if cut:
            warnings.warn(
                f"{cut} of {len(texts)} texts are longer than {context_length} tokens and were truncated",
                stacklevel=2,
            )
        return self.embed_tokens(tokens_NL)

    def embed_tokens(self, tokens_NL: Int32Array, progress: Progress | None = None) -> Float32Array:
        """Return text_ND, unit-norm, of padded token ids; `progress` counts texts."""
        with torch.inference_mode():
            return encode_tokens(self.model, tokens_NL, progress)

    def probabilities(self, image_MD: Float32Array, text_ND: Float32Array) -> Float32Array:
        """Return probability_MN: for each image, the softmax over the texts of scaled cosines (section
        2.1).
        """
        scale = float(self.model.logit_scale.detach().exp())
        logits_MN = scale * image_MD @ text_ND.T
        weight_MN = np.exp(logits_MN - logits_MN.max(axis=1, keepdims=True))
        probability_MN: Float32Array = weight_MN / weight_MN.sum(axis=1, keepdims=True)
        return probability_MN

    def _checked(self, context_length: int) -> int:
        positions = self.model.config.text.max_positions
        if not 3 <= context_length <= positions:
            raise ValueError(f"context_length is {context_length}; this model takes 3 to {positions} tokens")
        return context_length


def load(
    path: str,
    *,
    vocabulary: str | None = None,
    image_size_px: int | None = None,
    device: str | None = None,
    decode: Decode = "upright",
) -> Encoder:
    """Load weights of any format that `training.weights.formats` reads, by path or by name.

    `vocabulary` is a `vocab.txt`, its folder or a model id; unset, it is looked for.

    Raises:
        InputError: one line if weights, vocabulary or their sizes are wrong.
    """
    path = local_path(path)  # once, so that model and vocabulary are of one commit
    model = load_model(path, image_size_px=image_size_px)
    tokenizer = find_vocabulary(path, model.config.text.vocab_size, given=vocabulary)
    return Encoder(model, tokenizer, device=device, decode=decode)


def encode_tokens(model: CLIP, tokens_NL: Int32Array, progress: Progress | None = None) -> Float32Array:
    """Return text_ND, unit-norm, in row order, of token ids padded with 0, by the model as it is set."""
    text_ND = np.empty((len(tokens_NL), model.config.embed_dim), np.float32)
    size = tokens_per_batch(model.logit_scale.device)
    done = 0
    if progress is not None:
        progress(0, len(tokens_NL))
    for rows in batches_of_tokens(tokens_NL, size):
        text_ND[rows] = model.encode_text(torch.from_numpy(tokens_NL[rows])).cpu().numpy()
        done += len(rows)
        if progress is not None:
            progress(done, len(tokens_NL))
    return text_ND


def tokens_per_batch(device: torch.device) -> int:
    """Return how many tokens of texts, counted without padding, suit a device at once."""
    return TOKENS_PER_BATCH if device.type == "cpu" else TOKENS_PER_BATCH_ACCELERATED


def batches_of_tokens(tokens_NL: Int32Array, size: int) -> list[Int64Array]:
    """Yield row numbers, every row once, of batches of about `size` tokens.

    Texts of like lengths come together, since attention takes those of one length at once.
    """
    length_N = (tokens_NL != 0).sum(axis=1)
    order_N = np.argsort(length_N, kind="stable")
    batch_N = (np.cumsum(length_N[order_N]) - 1) // size
    return np.split(order_N, np.flatnonzero(np.diff(batch_N)) + 1) if len(order_N) else []


def _encoded(image: ImageSource | BadImageError) -> bytes | Image.Image | BadImageError:
    """Read what is given by its path; the rest stays as it is."""
    if not isinstance(image, str):
        return image
    try:
        return read_image(image)
    except BadImageError as error:
        return error
