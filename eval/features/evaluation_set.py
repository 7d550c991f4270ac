"""Features of an evaluation set: written to disk from a model file, or held in memory during training.

Written in clip-retrieval's layout, one folder an evaluation:

    img_emb/img_emb_0.npy     float32 [num_images, dim], unit-norm      text_emb/text_emb_0.npy   of the texts
    metadata/metadata_0.parquet   image_id, caption: row i describes image i
    text_metadata/metadata_0.parquet   text_id, caption: row i describes text i
    model.json                which model the features are of (`eval.features.model_identity`)
    image.index, text.index       FAISS, row i = id i; added by `eval.index.flat.build_index`

clip-retrieval assumes one text per image and has no folder for rows of texts alone; `text_metadata` is ours,
and a clip-retrieval service reads the rest as it is. Rows are in id order (`eval.datasets.cnclip_tsv`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eval.datasets.cnclip_tsv import RetrievalSet, check_scorable
from eval.datasets.readable import UnreadableImage
from eval.datasets.retrieval_set import read_retrieval_set
from eval.features.model_identity import identify, write_identity
from eval.index.flat import EMBEDDING_FOLDERS, check_vectors
from eval.metrics.recall import (
    Positives,
    RetrievalScores,
    ranks_from_features,
    recall_at_k,
    retrieval_scores,
)
from pipeline.core import store
from pipeline.core.arrays import Float32Array, UInt8Array
from pipeline.core.config import digest
from pipeline.core.records import EmbeddingTable, InputError
from training.config.train import CONTEXT_LENGTH

if TYPE_CHECKING:
    import torch

    from training.model.clip import CLIP
    from training.model.tokenizer import Tokenizer


BATCH_SIZE = 64


def embed_evaluation(
    model_path: str,
    vocabulary: str | None,
    evaluation: RetrievalSet,
    out_folder: str,
    *,
    context_length: int = CONTEXT_LENGTH,
    batch_size: int = BATCH_SIZE,
) -> tuple[EmbeddingTable, EmbeddingTable]:
    """Embed an evaluation with weights of any known format; returns the tables of images and of texts.

    `vocabulary` is what `Tokenizer.load` takes: a `vocab.txt`, its folder, or a model id; unset, it is looked
    for. torch's own thread
    settings apply. Raises InputError for an image that cannot be decoded (naming its id), for a model that
    yields NaN, and whatever reading the model or vocabulary raises.
    """
    import torch

    from training.encoder import encode_tokens
    from training.model.preprocess import MEAN, STD
    from training.weights.formats import load_model
    from training.weights.vocabulary_lookup import find_vocabulary

    model = load_model(model_path)
    if torch.cuda.is_available():
        model = model.cuda()
    tokenizer = find_vocabulary(model_path, model.config.text.vocab_size, given=vocabulary)
    image_size_px = model.config.vision.image_size_px
    with evaluating(model):
        images = _image_batches(evaluation, image_size_px, batch_size)
        image_ND = _encode(model.encode_image, images, model.logit_scale.device)
        tokens_NL = tokenizer.encode(evaluation.texts, context_length)
        text_ND = encode_tokens(model, tokens_NL)

    identity = identify(model)
    write_identity(out_folder, identity)
    model_digest = identity.weights_sha256
    image_table = _write_side(
        store.join(out_folder, EMBEDDING_FOLDERS["image"], "img_emb_0.npy"),
        image_ND,
        store.join(out_folder, "metadata", "metadata_0.parquet"),
        {"image_id": evaluation.image_ids, "caption": _caption_of_images(evaluation)},
        digests=(model_digest, digest("squash, bicubic", image_size_px, MEAN, STD)),
    )
    text_table = _write_side(
        store.join(out_folder, EMBEDDING_FOLDERS["text"], "text_emb_0.npy"),
        text_ND,
        store.join(out_folder, "text_metadata", "metadata_0.parquet"),
        {"text_id": evaluation.text_ids, "caption": list(evaluation.texts)},
        digests=(model_digest, digest(tokenizer.digest, context_length)),
    )
    return image_table, text_table


def validator(
    evaluations: Mapping[str, str],
    tokenizer: "Tokenizer",
    context_length: int = CONTEXT_LENGTH,
    *,
    batch_size: int = BATCH_SIZE,
) -> "Callable[[CLIP], dict[str, RetrievalScores]]":
    """Recall during training: a function from the model as it stands to percent numbers by evaluation name.

    `evaluations` maps names to folders in CN-CLIP's layout; they are read and checked here, so bad ones stop
    a run before its first step. The first call resizes the images to the model's size and keeps them as
    uint8. The function runs in evaluation mode without gradients, draws no random numbers, and leaves the
    mode of every module as it was. Raises InputError for features that are not finite.
    """
    from training.encoder import encode_tokens

    sets = [read_retrieval_set(folder, name) for name, folder in evaluations.items()]
    for evaluation in sets:
        check_scorable(evaluation)
    tokens = {evaluation.name: tokenizer.encode(evaluation.texts, context_length) for evaluation in sets}
    pixels: dict[str, UInt8Array] = {}

    def validate(model: "CLIP") -> dict[str, RetrievalScores]:
        scores: dict[str, RetrievalScores] = {}
        device = model.logit_scale.device
        for evaluation in sets:
            name = evaluation.name
            if name not in pixels:
                images = _image_batches(evaluation, model.config.vision.image_size_px, batch_size)
                pixels[name] = np.concatenate([_to_uint8(image_BCHW) for image_BCHW in images])
            batches = (
                _from_uint8(pixels[name][start : start + batch_size])
                for start in range(0, evaluation.num_images, batch_size)
            )
            with evaluating(model):
                image_ND = _encode(model.encode_image, batches, device)
                text_ND = encode_tokens(model, tokens[name])
            check_vectors(image_ND, f"evaluation `{name}`, images")
            check_vectors(text_ND, f"evaluation `{name}`, texts")
            scores[name] = score_features(evaluation, image_ND, text_ND)
        return scores

    return validate


def score_features(
    evaluation: RetrievalSet, image_ND: Float32Array, text_ND: Float32Array
) -> RetrievalScores:
    """Recall of both directions from features in memory; the same numbers as `eval.retrieval.predictions.retrieve`."""
    texts_of_image = evaluation.texts_of_image
    named = np.flatnonzero([len(rows) > 0 for rows in texts_of_image])
    t2i = ranks_from_features(text_ND, image_ND, Positives.of(evaluation.images_of_text))
    i2t = ranks_from_features(image_ND[named], text_ND, Positives.of([texts_of_image[row] for row in named]))
    return retrieval_scores(recall_at_k(t2i), recall_at_k(i2t))


@contextmanager
def evaluating(model: "CLIP") -> "Iterator[None]":
    """Evaluation mode without gradients; afterwards every module is in the mode it was in before."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode  # not .train(mode): that would also set the modules below


def _image_batches(evaluation: RetrievalSet, image_size_px: int, batch_size: int) -> "Iterator[torch.Tensor]":
    """image_BCHW float32, normalised, in row order."""
    from training.model.preprocess import preprocess

    for start in range(0, evaluation.num_images, batch_size):
        rows = range(start, min(start + batch_size, evaluation.num_images))
        images = list(evaluation.image_bytes(rows))
        try:
            yield preprocess(images, image_size_px)
        except InputError:
            for row, image in zip(rows, images, strict=True):  # once more, to say which image it is
                try:
                    preprocess([image], image_size_px)
                except InputError as error:
                    image_id = evaluation.image_ids[row]
                    raise UnreadableImage(f"{evaluation.images_path}: image {image_id}: {error}") from None
            raise


def _encode(
    encode: "Callable[[torch.Tensor], torch.Tensor]",
    batches: "Iterator[torch.Tensor]",
    device: "torch.device",
) -> Float32Array:
    features = [encode(batch.to(device)).float().cpu().numpy() for batch in batches]
    feature_ND: Float32Array = np.concatenate(features)
    return feature_ND


def _to_uint8(image_BCHW: "torch.Tensor") -> UInt8Array:
    """The pixel values that `preprocess` normalised, exactly: they were whole numbers in 0…255."""
    import torch

    mean_C11, std_C11 = _mean_and_std()
    pixels: UInt8Array = (image_BCHW * std_C11 + mean_C11).mul(255).round().to(torch.uint8).numpy()
    return pixels


def _from_uint8(pixels_BCHW: UInt8Array) -> "torch.Tensor":
    """Inverse of `_to_uint8`, by the same operations as `preprocess`: the same bits."""
    import torch

    mean_C11, std_C11 = _mean_and_std()
    return torch.from_numpy(pixels_BCHW).to(torch.float32).div_(255).sub_(mean_C11).div_(std_C11)


def _mean_and_std() -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    from training.model.preprocess import MEAN, STD

    return torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)


def _caption_of_images(evaluation: RetrievalSet) -> list[str]:
    """The first text of each image, empty for an image that no text names."""
    return [evaluation.texts[rows[0]] if len(rows) else "" for rows in evaluation.texts_of_image]


def _write_side(
    vectors_path: str,
    vectors_ND: Float32Array,
    metadata_path: str,
    columns: Mapping[str, Sequence[str] | npt.NDArray[np.int64]],
    *,
    digests: tuple[str, str],
) -> EmbeddingTable:
    """Write vectors and metadata of one side."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_vectors(vectors_ND, vectors_path)
    with store.publish(vectors_path) as temporary, open(temporary, "wb") as file:
        np.save(file, vectors_ND)
    with store.publish(metadata_path) as temporary:
        pq.write_table(pa.table(dict(columns)), temporary)
    return EmbeddingTable(
        ids=metadata_path,
        vectors=vectors_path,
        num_rows=vectors_ND.shape[0],
        dim=vectors_ND.shape[1],
        model_digest=digests[0],
        preprocessing_digest=digests[1],
    )
