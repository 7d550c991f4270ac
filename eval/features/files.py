"""`cnclip embed`: features of images and of texts in files, for clip-retrieval and FAISS.

Written are `img_emb/img_emb_0.npy` and `text_emb/text_emb_0.npy` (unit-norm), `metadata/metadata_0.parquet`,
whose row i has the path of image i and the caption of text i, null if one side is shorter, and
`model.json`, which says whose features they are. Images that cannot be decoded have no row: `left_out.jsonl`
lists them with the reasons. Memory does not grow with the number of images.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal, TypeVar

import numpy as np

from eval.features.image_source import ImageSource, open_images
from eval.features.layout import EMBEDDING_FOLDERS, vectors_path
from eval.features.model_identity import ModelIdentity, identify, read_identity, write_identity
from eval.features.tables import read_texts
from pipeline.core import store
from pipeline.core.arrays import Float32Array
from pipeline.core.files.foreign import foreign
from pipeline.core.files.lock import one_at_a_time
from pipeline.core.files.written import check_npy, check_parquet, naming
from pipeline.core.records import ConfigError, InputError
from pipeline.core.stage import Show, show_nothing

if TYPE_CHECKING:
    from training.encoder import Encoder

FeatureType = Literal["float16", "float32"]  # in files
T = TypeVar("T")

_LEFT_OUT = "left_out.jsonl"
_TEXT_COLUMNS = ("caption", "text", "query_text", "TEXT", "name_zh")
FEATURE_TYPES = {"float16": "<f2", "float32": "<f4"}
_TEXTS_PER_STEP = 16_384  # grouped by length among themselves


@dataclass(frozen=True, slots=True)
class Embedded:
    """What was written."""

    num_images: int
    num_texts: int
    num_truncated: int  # texts that were cut at the context length
    dim: int
    left_out: list[tuple[str, str]]  # (image, reason) of those that cannot be read or decoded
    passed_over: list[tuple[str, str]]  # (path, reason) of files in a folder that are not images
    num_texts_left_out: int  # texts whose image was left out


@one_at_a_time("out")
def embed_files(
    encoder: "Encoder",
    *,
    images: str | None,
    texts: str | None,
    out: str,
    context_length: int,
    dtype: FeatureType = "float32",
    redo: bool = False,
    show: Show = show_nothing,
) -> Embedded:
    """Embed and write; `images` is a folder (in the order of its sorted file names, subfolders included) or a
    table, CN-CLIP's `_imgs.tsv` among them; `texts` a file with one text a line, or a table.

    Images that cannot be read or decoded are left out and listed. If there are as many texts as images, row i
    of both is a pair, and goes as one. `out` may hold what an earlier call wrote of the same model and input,
    or of fewer images and texts of it; `redo` replaces other features. `show` draws how far each side is.

    Raises:
        ConfigError: if `out` holds other features and `redo` is not set.
        InputError: if an input is empty, no image can be decoded, or a table has no known column or a row
        without
            text.
    """
    dim = encoder.model.config.embed_dim
    names, captions, num_truncated = list[str](), list[str](), 0
    source = None if images is None else open_images(images)
    if texts is not None:
        captions = read_texts(texts, _TEXT_COLUMNS)
    identity = identify(encoder.model, encoder.decode)
    _make_room(out, identity, [] if source is None else source.names, captions, redo=redo)
    write_identity(out, identity)
    left_out, num_texts_left_out = dict[int, str](), 0
    if source is not None:
        _write_features(
            vectors_path(out, "image"), _image_features(encoder, source, left_out, show), dim, dtype
        )
        names = [name for row, name in enumerate(source.names) if row not in left_out]
        if left_out and len(captions) == len(source.names):
            captions = [text for row, text in enumerate(captions) if row not in left_out]
            num_texts_left_out = len(left_out)
        _write_left_out(store.join(out, _LEFT_OUT), source, left_out)
    if texts is not None:
        counts, progress = list[int](), show("texts", "text")

        def embedded() -> Iterator[Float32Array]:
            for number, chunk in enumerate(_chunks(captions, _TEXTS_PER_STEP)):
                tokens_NL, cut = encoder.tokenizer.encode_counting(chunk, context_length)
                counts.append(cut)
                before = number * _TEXTS_PER_STEP

                def so_far(done: int, total: int, text: str = "", before: int = before) -> None:
                    progress(before + done, len(captions))

                yield encoder.embed_tokens(tokens_NL, so_far)

        _write_features(vectors_path(out, "text"), embedded(), dim, dtype)
        num_truncated = sum(counts)
    _write_metadata(store.join(out, "metadata", "metadata_0.parquet"), names, captions)
    bad = [] if source is None else [(source.called(row), reason) for row, reason in left_out.items()]
    passed_over = [] if source is None else source.passed_over
    return Embedded(len(names), len(captions), num_truncated, dim, bad, passed_over, num_texts_left_out)


def _make_room(
    out: str, identity: ModelIdentity, names: Sequence[str], captions: Sequence[str], *, redo: bool
) -> None:
    """Refuse to replace features of another model or input; with `redo` remove them.

    A killed run leaves features of its model without metadata, which the next run replaces.
    """
    folders = [store.join(out, folder) for folder in (*EMBEDDING_FOLDERS.values(), "metadata")]
    held = [store.join(folder, name) for folder in folders for name in store.list_files(folder)]
    if redo:
        for folder in folders:
            store.remove(folder)
    elif held and (found := _other_features(out, held, identity, names, captions)):
        raise ConfigError(f"{out}: holds {found}; give another --out, or --redo to replace them")


def _other_features(
    out: str, held: Sequence[str], identity: ModelIdentity, names: Sequence[str], captions: Sequence[str]
) -> str | None:
    """Return which other features the files of a folder are, or None if they are of this model and input."""
    import pyarrow.parquet as pq

    found = read_identity(out)
    if found is None:
        return "features of an unknown model"
    if found != identity:
        return f"features of {found} with --decode {found.decode or 'unknown'}"
    if any(not name.rpartition(".")[0].endswith("_0") for name in held):
        return "features of several files, as of shards"
    path = store.join(out, "metadata", "metadata_0.parquet")
    if path not in held:
        return None
    with foreign(path, "table", "embed into another folder"):
        table = pq.read_table(path)
    for column, what, given in (("image_path", "images", names), ("caption", "texts", captions)):
        before = set(table[column].to_pylist()) - {None} if column in table.column_names else set()
        others = before - set(map(_whole, given))
        if others:
            return f"features of other {what}, {min(others)!r} among them"
    return None


def _image_features(
    encoder: "Encoder", source: "ImageSource", left_out: dict[int, str], show: Show
) -> Iterator[Float32Array]:
    first, progress = 0, show("images", "image")
    progress(0, len(source.names))
    for feature_BD, bad, num_images in encoder.image_features(source.read()):
        left_out |= {first + row: reason for row, reason in bad.items()}
        first += num_images
        progress(min(first, len(source.names)), len(source.names))
        yield feature_BD
    if first != len(source.names):
        raise InputError(
            f"{source.origin}: the input has {first} rows now, {len(source.names)} before: it"
            " changed meanwhile"
        )
    if len(left_out) == first:
        row, reason = next(iter(left_out.items()))
        raise InputError(
            f"{source.called(row)}: no image that can be decoded: {reason}; nor can any other of {first}:"
            " repair them or correct the path"
        )


def _write_left_out(path: str, source: "ImageSource", left_out: Mapping[int, str]) -> None:
    """List what has no row, and why; no list stays from before if there is nothing to list."""
    items = [(source.called(row), reason) for row, reason in left_out.items()] + source.passed_over
    if not items:
        store.remove(path)
        return
    lines = (json.dumps({"image": name, "reason": reason}) for name, reason in items)
    store.write_text(path, "".join(f"{line}\n" for line in lines))


def _chunks(items: Iterable[T], size: int) -> Iterator[Sequence[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _write_features(path: str, chunks: Iterable[Float32Array], dim: int, dtype: FeatureType) -> None:
    """Write a .npy chunk by chunk; it appears once whole.

    Raises:
        InputError: for features that are not finite.
    """
    with store.publish(path) as temporary, open(temporary, "wb") as file:
        _write_header(file, 0, dim, dtype)
        start, written = file.tell(), 0
        for chunk_ND in chunks:
            if not np.isfinite(chunk_ND).all():
                raise InputError(f"{path}: the model gives NaN: its weights or the input are damaged")
            file.write(np.ascontiguousarray(chunk_ND, dtype=FEATURE_TYPES[dtype]).tobytes())
            written += len(chunk_ND)
        # How many rows there are is known at the end; NumPy leaves room for any count.
        file.seek(0)
        _write_header(file, written, dim, dtype)
        if file.tell() != start:
            raise InputError(f"{path}: NumPy gave two lengths of header; install that of constraints.txt")
        file.flush()
        check_npy(temporary, path)


def _write_header(file: IO[bytes], num_rows: int, dim: int, dtype: FeatureType) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": FEATURE_TYPES[dtype], "fortran_order": False, "shape": (num_rows, dim)}
    )


def _write_metadata(path: str, names: Sequence[str], captions: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_rows = max(len(names), len(captions))
    columns = {
        name: pa.array([*map(_whole, values), *[None] * (num_rows - len(values))], pa.string())
        for name, values in (("image_path", names), ("caption", captions))
        if len(values)
    }
    with store.publish(path) as temporary, naming(path):
        pq.write_table(pa.table(columns), temporary)
        check_parquet(temporary, path, num_rows)


def _whole(text: str) -> str:
    """Return a text without halves of surrogate pairs, which broken JSON escapes leave and no file holds."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
