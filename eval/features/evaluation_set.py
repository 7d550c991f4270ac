"""Features of an evaluation set: written to disk from a model file, or held in memory during training.

Written in clip-retrieval's layout, one folder an evaluation:

    img_emb/img_emb_0.npy     float32 [num_images, dim], unit-norm      text_emb/text_emb_0.npy   of the texts
    metadata/metadata_0.parquet   image_id, caption: row i describes image i
    text_metadata/metadata_0.parquet   text_id, caption: row i describes text i
    model.json                which model the features are of (`eval.features.model_identity`)
    image.index, text.index       FAISS, row i = id i; added by `eval.index.flat.build_index`

clip-retrieval assumes one text per image and has no folder for rows of texts only; `text_metadata` is ours,
and a clip-retrieval service reads the rest as it is. Rows are in id order (`eval.datasets.cnclip_tsv`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eval.datasets.cnclip_tsv import RetrievalSet, check_scorable
from eval.datasets.readable import decoded_rows
from eval.datasets.retrieval_set import read_retrieval_set
from eval.features.encoder import BATCH_SIZE, EvaluationEncoder
from eval.features.layout import check_vectors, vectors_path, write_vectors
from eval.features.model_identity import identify, write_identity
from eval.metrics.recall import Positives, RetrievalScores, ranks_from_features
from eval.retrieval.measure import evaluate_retrieval
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int32Array, Int64Array, UInt8Array
from pipeline.core.config import digest
from pipeline.core.files.written import check_parquet, naming
from pipeline.core.records import EmbeddingTable
from training.config.train import CONTEXT_LENGTH

if TYPE_CHECKING:
    import torch

    from training.model.clip import CLIP
    from training.model.tokenizer import Tokenizer

_BATCH_SIZE_ACCELERATED = 512  # images at once in validation: fewer leave a GPU waiting for the host


def embed_evaluation(
    encoder: EvaluationEncoder, evaluation: RetrievalSet, out_folder: str
) -> tuple[EmbeddingTable, EmbeddingTable]:
    """Embed an evaluation set and write its features; returns the tables of images and of texts.

    Raises:
        UnreadableImage: if an image cannot be decoded; it names the image's id.
        InputError: if the model gives NaN.
    """
    from training.model.preprocess import MEAN, STD

    image_ND, text_ND = encoder.encode(evaluation)
    identity = identify(encoder.base.model, encoder.base.decode)
    write_identity(out_folder, identity)
    model_digest = identity.weights_sha256
    image_table = _write_side(
        vectors_path(out_folder, "image"),
        image_ND,
        store.join(out_folder, "metadata", "metadata_0.parquet"),
        {"image_id": evaluation.image_ids, "caption": _caption_of_images(evaluation)},
        digests=(
            model_digest,
            digest("squash, bicubic", encoder.base.decode, encoder.base.image_size_px, MEAN, STD),
        ),
    )
    text_table = _write_side(
        vectors_path(out_folder, "text"),
        text_ND,
        store.join(out_folder, "text_metadata", "metadata_0.parquet"),
        {"text_id": evaluation.text_ids, "caption": list(evaluation.texts)},
        digests=(model_digest, digest(encoder.base.tokenizer.digest, encoder.context_length)),
    )
    return image_table, text_table


def validator(
    evaluations: Mapping[str, str],
    tokenizer: "Tokenizer",
    context_length: int = CONTEXT_LENGTH,
    *,
    batch_size: int | None = None,
) -> "Callable[[CLIP], dict[str, RetrievalScores]]":
    """Return a function from a model in training to its recall in percent, by evaluation name.

    `evaluations` maps names to folders in CN-CLIP's layout. They are read and checked here, so that a bad one
    stops a run before its first step. `batch_size` images are encoded at once: unset, 64 on a CPU and 512 on
    an accelerator.

    All ranks call the function, and share the work: each decodes, embeds and ranks a part. The numbers are
    those of one rank. The first call resizes the images to the model's size and keeps them as uint8. The
    function runs in evaluation mode without gradients, in the precision that its caller sets, draws no random
    numbers, and leaves the mode of every module as it was. It raises InputError if an image cannot be decoded
    or features are not finite.
    """
    sets = [read_retrieval_set(folder, name) for name, folder in evaluations.items()]
    for evaluation in sets:
        check_scorable(evaluation)
    tokens = {evaluation.name: tokenizer.encode(evaluation.texts, context_length) for evaluation in sets}
    pixels: dict[tuple[str, int], UInt8Array] = {}

    def validate(model: "CLIP") -> dict[str, RetrievalScores]:
        size = batch_size
        if size is None:
            size = BATCH_SIZE if model.logit_scale.device.type == "cpu" else _BATCH_SIZE_ACCELERATED
        encoder = _ModelInTraining(model, tokens, pixels, size)
        return {
            evaluation.name: evaluate_retrieval(encoder, evaluation, encoder.rank).scores
            for evaluation in sets
        }

    return validate


@dataclass(frozen=True, slots=True)
class _ModelInTraining:
    """A model between two steps, with the tokens and pixels of its sets kept from call to call."""

    model: "CLIP"
    tokens: Mapping[str, Int32Array]  # evaluation name → tokens_NL
    pixels: dict[tuple[str, int], UInt8Array]  # evaluation name and batch → pixels_BCHW; of this rank's
    batch_size: int

    def encode(self, evaluation: RetrievalSet) -> tuple[Float32Array, Float32Array]:
        """Return image_ND and text_ND, checked; a collective."""
        import torch

        from training.encoder import batches_of_tokens, tokens_per_batch
        from training.engine.shared_work import embed_by_all

        name, model = evaluation.name, self.model
        device, tokens_NL = model.logit_scale.device, self.tokens[name]
        rows = np.arange(evaluation.num_images)
        images = np.split(rows, rows[self.batch_size :: self.batch_size])
        texts = batches_of_tokens(tokens_NL, tokens_per_batch(device))

        def embed_images(number: int) -> "torch.Tensor":
            if (name, number) not in self.pixels:
                image_BCHW = decoded_rows(evaluation, images[number], model.config.vision.image_size_px)
                self.pixels[name, number] = _to_uint8(image_BCHW)
            return model.encode_image(_from_uint8(self.pixels[name, number], device))

        def embed_texts(number: int) -> "torch.Tensor":
            return model.encode_text(torch.from_numpy(tokens_NL[texts[number]]))

        with evaluating(model):
            image_ND = embed_by_all(images, embed_images, model.config.embed_dim, device).numpy()
            text_ND = embed_by_all(texts, embed_texts, model.config.embed_dim, device).numpy()
        check_vectors(image_ND, f"evaluation `{name}`, images")
        check_vectors(text_ND, f"evaluation `{name}`, texts")
        return image_ND, text_ND

    def rank(self, query_QD: Float32Array, gallery_ND: Float32Array, positives: Positives) -> Int64Array:
        """Return what `ranks_from_features` does, of which every rank computes a part; a collective."""
        import torch

        from training.engine.shared_work import split_evenly, summed

        own = split_evenly(len(query_QD))
        ranks_Q = np.zeros(len(query_QD), dtype=np.int64)
        if own.start < own.stop:
            part = positives.block(own.start, own.stop)
            ranks_Q[own] = ranks_from_features(query_QD[own], gallery_ND, part)
        found: Int64Array = summed(torch.from_numpy(ranks_Q).to(self.model.logit_scale.device)).cpu().numpy()
        return found


@contextmanager
def evaluating(model: "CLIP") -> "Iterator[None]":
    """Set evaluation mode without gradients; afterwards every module is in the mode it was in before."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode  # not .train(mode): that would also set the modules below


def _to_uint8(image_BCHW: "torch.Tensor") -> UInt8Array:
    """Return the pixel values that `preprocess` normalised, exactly: they were whole numbers in 0…255."""
    import torch

    mean_C11, std_C11 = _mean_and_std()
    pixels: UInt8Array = (image_BCHW * std_C11 + mean_C11).mul(255).round().to(torch.uint8).numpy()
    return pixels


def _from_uint8(pixels_BCHW: UInt8Array, device: "torch.device") -> "torch.Tensor":
    """Invert `_to_uint8` on a device, by the same operations as `preprocess`: on a CPU the same bits."""
    import torch

    from training.model.transfer import send

    mean_C11, std_C11 = (tensor.to(device) for tensor in _mean_and_std())
    image_BCHW = send(torch.from_numpy(pixels_BCHW), device).to(torch.float32)
    return image_BCHW.div_(255).sub_(mean_C11).div_(std_C11)


def _mean_and_std() -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    from training.model.preprocess import MEAN, STD

    return torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)


def _caption_of_images(evaluation: RetrievalSet) -> list[str]:
    """Return the first text of each image, empty for an image that no text names."""
    return [evaluation.texts[rows[0]] if len(rows) else "" for rows in evaluation.texts_of_image]


def _write_side(
    path: str,
    vectors_ND: Float32Array,
    metadata_path: str,
    columns: Mapping[str, Sequence[str] | npt.NDArray[np.int64]],
    *,
    digests: tuple[str, str],
) -> EmbeddingTable:
    """Write vectors and metadata of one side."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_vectors(path, vectors_ND)
    with store.publish(metadata_path) as temporary, naming(metadata_path):
        pq.write_table(pa.table(dict(columns)), temporary)
        check_parquet(temporary, metadata_path, len(vectors_ND))
    return EmbeddingTable(
        ids=metadata_path,
        vectors=path,
        num_rows=vectors_ND.shape[0],
        dim=vectors_ND.shape[1],
        model_digest=digests[0],
        preprocessing_digest=digests[1],
    )
